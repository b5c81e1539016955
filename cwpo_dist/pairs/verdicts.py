"""What people write for "this answer is better" in; the answer that they mean out.

Letters, names of the answers' columns and words for a tie can mean one thing only. Numbers need
columns of their numbers, or a map: 0 is the first answer in some sets, a tie in others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["a", "b", "tie"]

_STEMS = ("", "model_", "response_", "answer_", "output_", "completion_", "assistant_", "text_")
_TIES = (
    *("tie", "ties", "tied", "draw", "equal", "equally good", "same", "no preference", "[[c]]"),
    *("both", "both good", "both_good", "bothgood", "tie (bothgood)", "tie (both good)"),
    *("both bad", "both_bad", "bothbad", "tie (bothbad)", "tie (both bad)", "neither"),
)
_LETTERS: dict[str, Verdict] = {
    **{stem + "a": "a" for stem in _STEMS},
    **{stem + "b": "b" for stem in _STEMS},
    **{"[[a]]": "a", "[[b]]": "b"},
    **dict.fromkeys(_TIES, "tie"),
}
MOST_SHOWN = 12  # values of a label that a message lists
_WHOLE = re.compile(r"([+-]?\d+)\.0+")


@dataclass(frozen=True)
class ValueMap:
    """What the values of a label column mean.

    Attributes:
        meanings: a value as `spelled` has it → what it says; None: nobody judged.
        given: the map was given, not found.
        seen: how often each value stands in the first rows.
        blank: how many of these say nothing.
    """

    meanings: Mapping[str, Verdict | None]
    given: bool = False
    seen: Mapping[str, int] = field(default_factory=dict)
    blank: int = 0

    def __str__(self) -> str:
        """The values that were seen, each with its number of rows, and what a map gives beside."""
        given = self.meanings if self.given else {}
        values = list(dict.fromkeys([*self.seen, *given]))
        if not values:
            return "a, b, tie, …"
        items = [f"{value} = {self._says(value)} ({self.seen.get(value, 0):,})" for value in values]
        more = [f"{len(items) - MOST_SHOWN} more"] if len(items) > MOST_SHOWN else []
        nothing = [f"no label ({self.blank:,})"] if self.blank else []
        return ", ".join(items[:MOST_SHOWN] + more + nothing)

    def _says(self, value: str) -> str:
        return (self.meanings[value] or "none") if value in self.meanings else "not known"


LETTERS = ValueMap(_LETTERS)


def spelled(value: object) -> str | None:
    """One spelling for a label's value: 1, 1.0 and "1" are one, "A" and "a " too.

    None for what cannot be a label: lists, objects.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(int(value)) if value == value // 1 and abs(value) < 1e15 else str(value)
    if not isinstance(value, str):
        return None
    text = value.strip().casefold()
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def found_in(values: Counter[str | None], first: str, second: str) -> ValueMap:
    """The map of which a column's values, and the names of the answers' columns, leave no doubt.

    Args:
        values: how often each value, as `spelled` has it, stands in the first rows.
        first: the column of the first answer.
        second: that of the second.
    """
    meanings: dict[str, Verdict | None] = {**_LETTERS, **_by_column(first, second)}
    numbers = {value for value in values if value is not None and is_number(value)}
    if numbers == {"1", "2"} and not numbers & meanings.keys():
        meanings = {"1": "a", "2": "b", **meanings}
    return ValueMap(meanings)


def counts_otherwise(values: Counter[str | None], found: ValueMap) -> bool:
    """Whether some numbers are known and others are not: then the known ones may mean another."""
    numbers = {value for value in values if value is not None and is_number(value)}
    return bool(numbers & found.meanings.keys() and numbers - found.meanings.keys())


def _by_column(first: str, second: str) -> dict[str, Verdict | None]:
    """Names of the answers' columns, whole and where they differ: response_0 and 0."""
    a, b = (str(spelled(name)) for name in (first, second))
    start = _shared(a, b)
    end = _shared(a[start:][::-1], b[start:][::-1])
    short_a, short_b = (name[start : len(name) - end] for name in (a, b))
    named: dict[str, Verdict | None] = {a: "a", b: "b"}
    if start and short_a and short_b:
        named |= {short_a.strip("_ "): "a", short_b.strip("_ "): "b"}
    return named


def _shared(a: str, b: str) -> int:
    """How many letters both begin with."""
    differ = (k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))


def is_number(value: str) -> bool:
    """Whether a value, as `spelled` has it, is one."""
    try:
        float(value)
    except ValueError:
        return False
    return True


def mapped(meanings: Mapping[str, Iterable[object]]) -> ValueMap:
    """The map that a configuration gives: a, b, tie and none → their values.

    Raises:
        ValueError: for a value that stands for two of them, or that cannot be a label.
    """
    made: dict[str, Verdict | None] = {}
    for meaning, values in meanings.items():
        for value in values:
            key = spelled(value)
            if key is None or key in made:
                raise ValueError(f"{value!r} stands for more than one of {', '.join(meanings)}")
            made[key] = None if meaning == "none" else meaning  # type: ignore[assignment]  # a field of ours
    return ValueMap(made, given=True)


def majority(a: int, b: int, tie: int) -> Verdict | None:
    """What most people said: a tie where no one opinion has the most votes; None without votes."""
    most = max(a, b, tie)
    if most == 0:
        return None
    counts: dict[Verdict, int] = {"a": a, "b": b, "tie": tie}
    said = [verdict for verdict, count in counts.items() if count == most]
    return said[0] if len(said) == 1 else "tie"
