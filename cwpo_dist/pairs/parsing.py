"""One raw row in, one pair (prompt, two answers, label, votes) out, or the reason why not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from math import isfinite
from typing import Literal

from cwpo_dist.pairs.judging import HumanLabel, judged
from cwpo_dist.pairs.layout import Layout
from cwpo_dist.pairs.messages import MessageReader, as_json, checked, has_words
from cwpo_dist.pairs.numbers import NO_NUMBERS, Numbers, own_numbers
from cwpo_dist.pairs.readers import RawRow
from cwpo_dist.pairs.records import Text, Tools
from cwpo_dist.pairs.rejects import BadRow, Reason
from cwpo_dist.pairs.texts import read_texts, with_system

_WHOLE = re.compile(r"-?\d+\.0+", re.ASCII)


@dataclass(frozen=True)
class ParsedPair:
    """A pair in its source's order.

    Attributes:
        prompt: text or messages, as the answers are.
        first: chosen, or response_a.
        second: rejected, or response_b.
        label: the better one, a tie, or None where nobody said.
        votes_first: for the first answer; None where nobody counted.
        votes_second: for the second.
        votes_tie: for neither.
        tools: what the conversation could call.
        group: what decides the split in place of the prompt.
        kept: the columns that are carried along.
        unread: what its messages hold and nothing reads.
    """

    prompt: Text
    first: Text
    second: Text
    label: Literal["first", "second", "tie"] | None
    votes_first: int | None = None
    votes_second: int | None = None
    votes_tie: int | None = None
    numbers: Numbers = NO_NUMBERS
    tools: Tools | None = None
    group: str | None = None
    kept: Mapping[str, object] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()

    @property
    def alone(self) -> bool:
        """Whether it is an answer in a row of its own, which goes as a pair with itself."""
        return self.first == self.second

    @property
    def voted_against(self) -> bool:
        """Whether more people voted for the other answer than for the one that the label names."""
        a, b = self.votes_first or 0, self.votes_second or 0
        return (self.label == "first" and b > a) or (self.label == "second" and a > b)


def readable(raw: RawRow, layout: Layout) -> object:
    """The row, if all of it that a layout needs could be read.

    Raises:
        BadRow: else.
    """
    if raw.fault is not None:
        raise BadRow(raw.fault)
    needed = layout.needed if raw.cells else ()
    for name, fault in raw.cells.items():
        if name in layout.kept and fault is Reason.TYPE:
            raise BadRow(Reason.KEPT, name)
        if name in needed:
            raise BadRow(fault, name)
    return raw.value


def parse(row: object, layout: Layout) -> ParsedPair:
    """Reads one row.

    Raises:
        BadRow: with the reason and the field at fault, and what was found there.
    """
    row = refuse_media(row, layout)
    reader = MessageReader(nulls_are_absent=layout.nulls_are_absent)
    prompt, (first, second) = read_texts(row, layout, reader)
    _refuse_empty(prompt, first, second, layout)
    verdict = judged(row, layout, lambda: _turned(row, layout, reader, (first, second)))
    return pair_of(row, layout, reader, (prompt, first, second), verdict)


def refuse_media(row: object, layout: Layout) -> Mapping[str, object]:
    """The row.

    Raises:
        BadRow: for what is no row of texts.
    """
    if not isinstance(row, Mapping):
        raise BadRow(Reason.NOT_MAPPING)
    for name in layout.media:
        if row.get(name) not in (None, "", []):
            raise BadRow(Reason.MEDIA, name)
    return row


def pair_of(
    row: Mapping[str, object],
    layout: Layout,
    reader: MessageReader,
    texts: tuple[Text, Text, Text],
    verdict: HumanLabel,
) -> ParsedPair:
    """The pair of a prompt and two answers, with what its row has beside them.

    Raises:
        BadRow: for what stands there and cannot be read.
    """
    prompt, first, second = texts
    return ParsedPair(
        with_system(prompt, row, layout),
        first,
        second,
        verdict.label,
        verdict.votes_first,
        verdict.votes_second,
        verdict.votes_tie,
        numbers=_numbers(row, layout),
        tools=reader.tools(layout.optional(row, "tools")) if "tools" in layout.columns else None,
        group=_group(row, layout),
        kept={name: as_json(row.get(name), name, Reason.KEPT) for name in layout.kept},
        unread=frozenset(reader.unread),
    )


def _turned(
    row: Mapping[str, object], layout: Layout, reader: MessageReader, chosen: tuple[Text, Text]
) -> bool:
    """Whether the chosen answer is response_b.

    Raises:
        BadRow: where the two spellings are not of the same two answers.
    """
    _, (a, b) = read_texts(row, layout.as_either, reader)
    if (a, b) == chosen:
        return False
    if (b, a) == chosen:
        return True
    raise BadRow(Reason.WHOSE, found="chosen and rejected are not response_a and response_b")


def _refuse_empty(prompt: Text, first: Text, second: Text, layout: Layout) -> None:
    if not has_words(prompt):
        raise BadRow(Reason.EMPTY_PROMPT)
    for name, answer in zip(layout.answers, (first, second), strict=True):
        if not has_words(answer):
            raise BadRow(Reason.EMPTY_ANSWER, name)
    if first == second:
        raise BadRow(Reason.IDENTICAL)


def _numbers(row: Mapping[str, object], layout: Layout) -> Numbers:
    if not layout.has_numbers:  # as most data are
        return NO_NUMBERS
    return own_numbers(partial(layout.value, row), layout.answers)


def _group(row: Mapping[str, object], layout: Layout) -> str | None:
    if layout.group is None:
        return None
    value = row.get(layout.group)
    if value is None or value == "" or value != value:  # as CSV and data frames write null
        raise BadRow(Reason.MISSING, layout.group)
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise BadRow(Reason.TYPE, layout.group)
    return _group_name(checked(value, layout.group) if isinstance(value, str) else value)


def _group_name(value: str | int | float | Decimal) -> str:
    """One name for one number: 3 in JSON, 3.0 in a data frame with gaps, either as text in CSV."""
    if isinstance(value, str):
        return value.partition(".")[0] if _WHOLE.fullmatch(value) else value
    whole = isinstance(value, float | Decimal) and isfinite(value) and value == int(value)
    return str(int(value)) if whole else str(value)
