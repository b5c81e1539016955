"""A row with a prompt and a list of responses, or one, in; the pairs that are to be compared out.

The responses of a row are texts, messages or conversations, as the answers of a pair are; their
scores (higher is better) or ranks (lower is better) say which of two is the better one. One that
cannot be used is set aside by itself, the others stay. One in a row of its own goes as a pair with
itself, until those of its prompt are together (`alone`).
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

from cwpo_dist.pairs.counts import Counts
from cwpo_dist.pairs.judging import HumanLabel
from cwpo_dist.pairs.layout import Layout, not_null
from cwpo_dist.pairs.messages import MessageReader, has_words
from cwpo_dist.pairs.numbers import Numbers, number
from cwpo_dist.pairs.pairing import compared, is_tie, pair_with
from cwpo_dist.pairs.parsing import ParsedPair, pair_of, parse, readable, refuse_media
from cwpo_dist.pairs.readers import RawRow
from cwpo_dist.pairs.records import Text, answer_id, canonical
from cwpo_dist.pairs.rejects import BadRow, Reason, row_text, shown
from cwpo_dist.pairs.texts import read_texts
from cwpo_dist.pairs.written import listed

_GROWN_ROWS, _GROWN_PAIRS = 100, 20  # first rows, and pairs of each, whose text is measured
_PAIR_BYTES = 300  # of a pair by its ids


class Response(NamedTuple):
    """One response to a row's prompt.

    Attributes:
        text: text or messages.
        good: the higher, the better: its score, or its rank below 0; None where nobody said.
    """

    text: Text
    good: float | None

    @property
    def hashed(self) -> str:
        """The digits that end its answer's id."""
        return answer_id("", self.text)


class SetAside(NamedTuple):
    """A response that was set aside: the reason, what was found and where, and itself as text."""

    reason: str
    found: str
    text: str


@dataclass(frozen=True)
class ListCounts(Counts):
    """What became of the rows that hold lists; pairs + ties are all that were to be compared.

    Attributes:
        rows: with a list of responses of which two or more can be used.
        responses: in them.
        repeated: those that stand in their list before, with the same score or rank.
        set_aside: those that cannot be used.
        pairs: made of the others.
        ties: two responses with one score or rank, of which no pair is made.
    """

    rows: int = 0
    responses: int = 0
    repeated: int = 0
    set_aside: int = 0
    pairs: int = 0
    ties: int = 0

    def sentence(self) -> str:
        """What became of them, for people."""
        return (
            f"{self.rows:,} rows hold lists of {self.responses:,} responses: {self.pairs:,} pairs "
            f"are made of them, {self.ties:,} ties left out; {self.repeated:,} responses stand in "
            f"their list already, {self.set_aside:,} are set aside"
        )

    def rows_of(self, rows_in: int) -> int:
        """How many rows there are, where each of these counts as its pairs."""
        return rows_in - self.rows + self.pairs

    def fault(self, fraction: float, reasons: Sequence[str]) -> str | None:
        """Why so many responses that are set aside stop the stage; None where they do not."""
        if self.set_aside <= fraction * self.responses:
            return None
        head = (
            f"prepare.max_reject_fraction: {self.set_aside:,} of {self.responses:,} responses in "
            f"lists are set aside: more than {fraction:g} of them. Most frequent:"
        )
        return "\n".join([head, *reasons])


@dataclass(frozen=True)
class RowPairs:
    """The pairs of a row.

    Attributes:
        pairs: to be gone through once; they are made one by one.
        unread: what its messages hold and nothing reads.
        counts: of its list; None where the row is a pair already.
        set_aside: the responses of its list that cannot be used.
    """

    pairs: Iterable[ParsedPair]
    unread: frozenset[str]
    counts: ListCounts | None = None
    set_aside: tuple[SetAside, ...] = ()


def pairs_of_row(row: object, layout: Layout) -> RowPairs:
    """The pairs of a row: the one that it is, those of its list, or its response with itself.

    Raises:
        BadRow: where it is none, or has none, with the reason and the field at fault.
    """
    if "responses" in layout.columns:
        return _of_list(refuse_media(row, layout), layout)
    alone = "response" in layout.columns
    pair = _of_one(refuse_media(row, layout), layout) if alone else parse(row, layout)
    return RowPairs((pair,), pair.unread)


def parse_raw(raw: RawRow, layout: Layout) -> RowPairs:
    """The pairs of a row as a file has it.

    Raises:
        BadRow: also for a row that could not be read.
    """
    return pairs_of_row(readable(raw, layout), layout)


def _of_one(row: Mapping[str, object], layout: Layout) -> ParsedPair:
    """A response with itself, rated or not."""
    reader = MessageReader(nulls_are_absent=layout.nulls_are_absent)
    name = layout.rated_by
    rating = None if name is None else layout.optional(row, name)
    good = None if name is None or rating is None else _good(rating, name)
    prompt, response = _response(row, layout, reader, layout.present(row, "response"), good)
    texts = prompt, response.text, response.text
    numbers = Numbers(score_first=response.good, score_second=response.good)
    return replace(pair_of(row, layout, reader, texts, HumanLabel(None)), numbers=numbers)


def _of_list(row: Mapping[str, object], layout: Layout) -> RowPairs:
    reader = MessageReader(nulls_are_absent=layout.nulls_are_absent)
    cells = _cells(row, layout, "responses") or []
    prompt, read, set_aside = _read(row, layout, reader, cells)
    responses, repeated, differing = _distinct(read, cells, layout)
    set_aside += differing
    if len(responses) < 2:
        raise _not_enough(len(responses), len(cells), set_aside)
    both = compared(responses, layout.pairing)
    ties = sum(map(is_tie, both))
    texts = prompt, responses[0].text, responses[1].text
    some = pair_of(row, layout, reader, texts, HumanLabel(None))
    return RowPairs(
        _pairs(some, both, scored="scores" in layout.columns),
        some.unread,
        ListCounts(1, len(cells), repeated, len(set_aside), len(both) - ties, ties),
        tuple(set_aside),
    )


def _cells(row: Mapping[str, object], layout: Layout, name: str) -> list[object] | None:
    """The items of a list, or of one written as text; None for none, and for nulls alone."""
    value = layout.optional(row, name)
    items = listed(value)
    if items is None and value is not None:
        raise BadRow(Reason.TYPE, name, shown(value))
    if items is None and name == "responses":
        raise BadRow(Reason.MISSING, name)
    return items if items is not None and any(item is not None for item in items) else None


def _read(
    row: Mapping[str, object], layout: Layout, reader: MessageReader, cells: Sequence[object]
) -> tuple[Text, list[tuple[int, Response]], list[SetAside]]:
    """The prompt, the responses that can be used with their places, and the others."""
    goods = _goods(row, layout, len(cells))
    prompt: Text | None = None
    read: list[tuple[int, Response]] = []
    set_aside: list[SetAside] = []
    faults: list[BadRow] = []
    for place, (cell, good) in enumerate(zip(cells, goods, strict=True)):
        try:
            asked, response = _response(row, layout, reader, cell, good)
            if prompt is not None and asked != prompt:
                raise BadRow(Reason.PREFIXES)
        except BadRow as bad:
            faults.append(bad)
            set_aside.append(_aside(bad, place, cell))
            continue
        prompt = asked
        read.append((place, response))
    if prompt is None:  # the prompt is at fault, or each of them
        raise faults[0] if faults else BadRow(Reason.ALONE, "responses", "an empty list")
    return prompt, read, set_aside


def _response(
    row: Mapping[str, object],
    layout: Layout,
    reader: MessageReader,
    cell: object,
    good: float | BadRow | None,
) -> tuple[Text, Response]:
    """One response, and the prompt that it replies to."""
    (field,) = layout.answers
    if not_null(cell) is None:
        raise BadRow(Reason.EMPTY_ANSWER, field)
    prompt, (text,) = read_texts(row, layout, reader, lambda _: cell)
    if not has_words(prompt):
        raise BadRow(Reason.EMPTY_PROMPT)
    if not has_words(text):
        raise BadRow(Reason.EMPTY_ANSWER, field)
    if isinstance(good, BadRow):
        raise good
    return prompt, Response(text, good)


def _goods(row: Mapping[str, object], layout: Layout, count: int) -> list[float | BadRow | None]:
    """How good each response is said to be, or why that cannot be read; nothing for all of them."""
    name = layout.rated_by
    cells = None if name is None else _cells(row, layout, name)
    if name is None or cells is None:
        if name is not None and layout.pairing != "all":
            raise BadRow(Reason.MISSING, name)
        return [None] * count
    if len(cells) != count:
        raise BadRow(Reason.LENGTHS, name, f"{len(cells)} beside {count} responses")
    return [_good(cell, name) for cell in cells]


_TRUTH = {"true": 1.0, "false": 0.0}  # as KTO writes it, also in the cells of a CSV file


def _good(cell: object, name: str) -> float | BadRow:
    if not_null(cell) is None:
        return BadRow(Reason.MISSING, name)
    try:
        truth = _TRUTH.get(str(cell).lower()) if name == "score" else None
        value = number(cell) if truth is None else truth
    except ValueError:
        value = None
    if value is None:
        return BadRow(Reason.RATING, name, shown(cell))
    return value if name in ("scores", "score") else -value


def _distinct(
    read: Sequence[tuple[int, Response]], cells: Sequence[object], layout: Layout
) -> tuple[list[Response], int, list[SetAside]]:
    """Each response once; how many more there were; those that are rated in two ways."""
    alike: dict[str, list[tuple[int, Response]]] = defaultdict(list)
    for place, response in read:
        alike[canonical(response.text)].append((place, response))
    kept: list[Response] = []
    repeated, set_aside = 0, list[SetAside]()
    for copies in alike.values():
        if len({response.good for _, response in copies}) == 1:
            kept.append(copies[0][1])
            repeated += len(copies) - 1
            continue
        bad = BadRow(Reason.RATED_TWICE, layout.rated_by or "")
        set_aside += [_aside(bad, place, cells[place]) for place, _ in copies]
    return kept, repeated, set_aside


def _aside(bad: BadRow, place: int, cell: object) -> SetAside:
    where = f"responses.{place}"
    return SetAside(
        bad.reason, where if bad.found is None else f"{where}: {bad.found}", row_text(cell)
    )


def _not_enough(usable: int, count: int, set_aside: Sequence[SetAside]) -> BadRow:
    why = f" ({set_aside[0].reason})" if set_aside else ""
    return BadRow(Reason.ALONE, "responses", f"{usable} of {count} can be used{why}")


def _pairs(
    some: ParsedPair, both: Iterable[tuple[Response, Response]], *, scored: bool
) -> Iterator[ParsedPair]:
    """The pairs of those that are not equally good, of any pair of the row."""
    for better, worse in both:
        if not is_tie((better, worse)):
            yield pair_with(some, better, worse, scored=scored)


def growth(rows: Iterable[object], layout: Layout) -> float:
    """How much the pairs of rows hold over the rows: a list's responses stand in many."""
    if layout.pairing == "all" and "response" in layout.columns:
        return _growth_alone(rows, layout)
    if "responses" not in layout.columns:
        return 1.0
    read = made = 0.0
    for row in itertools.islice(rows, _GROWN_ROWS):
        try:
            found = pairs_of_row(row, layout)
        except BadRow:
            continue
        some = [len(row_text(_texts(pair))) for pair in itertools.islice(found.pairs, _GROWN_PAIRS)]
        read += len(row_text(row))
        made += fmean(some) * found.counts.pairs if some and found.counts else 0.0
    return max(1.0, made / read) if read else 1.0


def _growth_alone(rows: Iterable[object], layout: Layout) -> float:
    """The same of responses in rows of their own, whose pairs are ids: as many as stand together.

    A prompt's other rows may lie far apart, of which the first ones tell nothing.
    """
    of_prompts, read = Counter[str](), 0
    for row in rows:
        try:
            (pair,) = pairs_of_row(row, layout).pairs
        except BadRow:
            continue
        of_prompts[canonical(pair.prompt)] += 1
        read += len(row_text(row))
    pairs = sum(count * (count - 1) // 2 for count in of_prompts.values())
    return max(1.0, pairs * _PAIR_BYTES / read) if read else 1.0


def _texts(pair: ParsedPair) -> list[Text]:
    return [pair.prompt, pair.first, pair.second]
