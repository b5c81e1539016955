"""One raw row in; which of its two answers people found better, and how many of them, out.

Votes stay with the answer that they were given to: `votes_a` with response_a, `votes_chosen` with
chosen. Where a row spells both, the texts say which is which; where nothing does, it is set aside.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from cwpo_dist.pairs.layout import CHOSEN, Layout, cell, not_null
from cwpo_dist.pairs.rejects import BadRow, Reason, shown
from cwpo_dist.pairs.verdicts import Verdict, majority, spelled

MAX_VOTES = 1_000_000
Label = Literal["first", "second", "tie"] | None
_SIDES: dict[Verdict | None, Label] = {"a": "first", "b": "second", "tie": "tie", None: None}
_WHOLE = re.compile(r"([0-9]{1,9})(?:\.0*)?")
_OF_EITHER, _OF_CHOSEN = ("votes_a", "votes_b"), ("votes_chosen", "votes_rejected")


@dataclass(frozen=True)
class HumanLabel:
    """What people said of a pair, in its source's order; votes are None where nobody counted."""

    label: Label
    votes_first: int | None = None
    votes_second: int | None = None
    votes_tie: int | None = None


def judged(row: Mapping[str, object], layout: Layout, turned: Callable[[], bool]) -> HumanLabel:
    """Reads labels and votes.

    Without a label column votes make the label: the opinion that most people have. Where a row's
    label is null and its votes are even, it is a tie.

    Args:
        row: the row.
        layout: how its source spells a pair.
        turned: whether chosen is response_b, asked of rows that spell their answers in both ways.

    Raises:
        BadRow: for a value that is no label or no number of votes, or votes of nobody knows whom.
    """
    if layout.answers == CHOSEN:
        return _of_chosen(row, layout, turned)
    if layout.annotators:
        return _of_annotators(row, layout)
    if "label" in layout.columns:
        return _of_label(row, layout)
    a, b, tie = _votes(row, layout, _OF_EITHER)
    return HumanLabel(_SIDES[majority(a or 0, b or 0, tie or 0)], a, b, tie)


def _of_label(row: Mapping[str, object], layout: Layout) -> HumanLabel:
    """Of a row whose label says which of its answers is the chosen one."""
    verdict = _verdict(layout.optional(row, "label"), layout)
    if "votes_chosen" in layout.columns:
        votes = _by_label(verdict, *_votes(row, layout, _OF_CHOSEN))
    else:
        votes = _votes(row, layout, _OF_EITHER)
    if verdict is None and votes[0] and votes[0] == votes[1]:  # asked, and split evenly
        verdict = "tie"
    return HumanLabel(_SIDES[verdict], *votes)


def _of_chosen(row: Mapping[str, object], layout: Layout, turned: Callable[[], bool]) -> HumanLabel:
    """Of a row whose first answer is the chosen one."""
    if "response_a" not in layout.columns:
        names = _OF_CHOSEN if "votes_chosen" in layout.columns else _OF_EITHER
        return HumanLabel("first", *_votes(row, layout, names))
    is_turned = turned()
    verdict = _verdict(layout.optional(row, "label"), layout)
    if verdict not in (None, "b" if is_turned else "a"):
        chosen = "response_b" if is_turned else "response_a"
        raise BadRow(Reason.LABEL, found=f"label says {verdict}, but chosen is {chosen}")
    a, b, tie = _votes(row, layout, _OF_EITHER)
    return HumanLabel("first", b if is_turned else a, a if is_turned else b, tie)


def _of_annotators(row: Mapping[str, object], layout: Layout) -> HumanLabel:
    """Of several columns with one person's label each: their votes, and what most of them said."""
    said = [_verdict(not_null(cell(row, path)), layout) for path in layout.annotators]
    votes = Counter(said)
    if not votes.total() - votes[None]:
        return HumanLabel(None)
    a, b, tie = votes["a"], votes["b"], votes["tie"]
    return HumanLabel(_SIDES[majority(a, b, tie)], a, b, tie)


def _by_label(
    verdict: Verdict | None, chosen: int | None, rejected: int | None, tie: int | None
) -> tuple[int | None, int | None, int | None]:
    """Votes for the chosen and the rejected answer, given to the first and the second."""
    if verdict == "b":
        return rejected, chosen, tie
    if verdict != "a" and chosen != rejected:
        raise BadRow(Reason.WHOSE, found="no label says which answer was chosen")
    return chosen, rejected, tie


def _verdict(value: object, layout: Layout) -> Verdict | None:
    """What a label says; None where nobody judged."""
    if value is None:
        return None
    key = spelled(value)
    if key is None or key not in layout.values.meanings:
        raise BadRow(Reason.LABEL, found=shown(value))
    return layout.values.meanings[key]


def _votes(
    row: Mapping[str, object], layout: Layout, names: tuple[str, str]
) -> tuple[int | None, int | None, int | None]:
    """Votes for both answers and for neither; all of them None where nobody counted."""
    first, second = (_count(layout.optional(row, name), name) for name in names)
    tie = _count(layout.optional(row, "votes_tie"), "votes_tie")
    if (first is None) != (second is None) or (first is None and tie is not None):
        raise BadRow(Reason.VOTES, names[0] if first is None else names[1])
    return first, second, tie


def _count(value: object, name: str) -> int | None:
    if value is None:
        return None
    number = value
    if isinstance(value, str):  # a data frame writes 3.0 where a column has nulls
        digits = _WHOLE.fullmatch(value.strip())
        number = int(digits[1]) if digits else None
    if (
        isinstance(number, bool)
        or not isinstance(number, int | float)
        or number != number // 1
        or not 0 <= number <= MAX_VOTES
    ):
        raise BadRow(Reason.VOTES, name, shown(value))
    return int(number)
