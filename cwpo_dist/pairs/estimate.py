"""The `prepare` section in; about how many pairs each split will hold, and a sample of them, out.

Reads for a few seconds and writes nothing. What was read is merged and split as `prepare` will;
where that is not all, copies that lie far apart are not seen.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cwpo_dist.config import PrepareConfig
from cwpo_dist.pairs import late_columns, numbers
from cwpo_dist.pairs.alone import AloneCounts, comparing
from cwpo_dist.pairs.counted_rows import CountedRows, Standing, sizes
from cwpo_dist.pairs.parsing import ParsedPair
from cwpo_dist.pairs.pieces import Piece, columns_of
from cwpo_dist.pairs.readers import Part, RawRow, begun, read
from cwpo_dist.pairs.rejects import BadRow, Reason, Tally, past_fault
from cwpo_dist.pairs.row_forms import ListCounts, parse_raw
from cwpo_dist.pairs.sampled_pairs import Sample, Sampled
from cwpo_dist.pairs.sources import plan
from cwpo_dist.pairs.splits import LEAKED, SplitRule, drawn
from cwpo_dist.pairs.unread import Tree, Unread, columnar, tree

LOOKED_AT = 10_000  # rows of a columnar file, for what of them nothing reads


@dataclass(frozen=True)
class Census:
    """What the sources hold.

    Attributes:
        splits: pairs by split.
        labelled: those of them with a human's label.
        prompts: different prompts that stand in pairs of each split.
        answers: different answers that do.
        rejects: rows that will be set aside.
        rows_in: rows that there are: a list, or a response in a row of its own, is one.
        exact: True when everything was read; else the counts are scaled up by file size.
        sample: pairs drawn evenly from what was read.
        own: pairs by split that can be weighed by numbers of their own, by the kinds of them that
            the sources have columns for.
        void: numbers of their own that cannot be used, by field and why.
        unlike: pairs whose copies have different numbers of their own, which then count for none.
        most_weight: the largest weight of their own that was read.
        files: inputs to read.
        damaged: those of them that were found damaged, with why.
        remarks: what should be known of the sources, a line each: what they leave out.
        tally: why rows of those that were read are set aside.
        sources: of each source, its path and how its rows are read.
        unread: of each source, what of the rows that were read nothing reads.
        lost: which of it may be a field of ours that the first rows lack, a line each.
        ties: pairs of those that were read whose answers people found equal.
        merged: rows that are copies of other rows' pairs.
        alone: what becomes of responses in rows of their own.
        answers_alone: those of them that stand in no pair, by split.
        prompts_alone: their different prompts.
        lists: what becomes of rows that hold lists of responses.
        of_lists: why responses of those that were read are set aside.
        sampled_ids: of some answers of each split's pairs; where it has none, of those in no pair.
        begun: whether something of every source was read.
        made: whether `prepare` is done, and these are its counts.
        standing: where each pair of the sample stands; None for what is in no split's pairs.
    """

    splits: Mapping[str, int]
    labelled: Mapping[str, int]
    rejects: int
    exact: bool
    sample: tuple[ParsedPair, ...]
    prompts: Mapping[str, int] = field(default_factory=dict)
    answers: Mapping[str, int] = field(default_factory=dict)
    own: Mapping[numbers.Own, Mapping[str, int]] = field(default_factory=dict)
    void: Mapping[str, int] = field(default_factory=dict)
    unlike: int = 0
    most_weight: float = 0.0
    files: int = 0
    damaged: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    tally: Tally = field(default_factory=Tally)
    sources: tuple[tuple[str, str], ...] = ()
    unread: tuple[Unread, ...] = ()
    lost: tuple[str, ...] = ()
    ties: int = 0
    merged: int = 0
    alone: AloneCounts = field(default_factory=AloneCounts)
    answers_alone: Mapping[str, int] = field(default_factory=dict)
    prompts_alone: Mapping[str, int] = field(default_factory=dict)
    lists: ListCounts = field(default_factory=ListCounts)
    of_lists: Tally = field(default_factory=Tally)
    sampled_ids: Mapping[str, Sequence[str]] = field(default_factory=dict)
    begun: bool = True
    rows_in: int = 0
    made: bool = False
    standing: tuple[Standing | None, ...] = ()

    def sentences(self) -> Iterator[str]:
        """How rows are read, what of them is not, and why some are set aside, for people."""
        of = "" if self.exact else " (of the rows that were read)"
        for (source, how), unread in zip(self.sources, self.unread, strict=True):
            yield f"{source}: reads {how}"
            for sentence in unread.sentences():
                yield f"{source}: {sentence}{of}"
        yield from (f"{line}{of}" for line in self.lost)
        if self.tally.reasons:
            every = self.tally.lines(most=len(self.tally.reasons))
            yield "\n".join([f"rows that are set aside{of}:", *every])
        if self.lists.rows:
            yield self.lists.sentence()
        if self.alone.rows:
            yield from self.alone.sentences()
        if self.of_lists.reasons:
            every = self.of_lists.lines(most=len(self.of_lists.reasons))
            yield "\n".join([f"responses in lists that are set aside{of}:", *every])
        if self.ties:
            yield f"{self.ties:,} pairs{of} are ties, kept without a label"

    def row_fault(self, most: float) -> str | None:
        """Why `prepare` would stop for rows that are set aside, as it asks once and again.

        Of rows, as they are read; then, with those that are in two splits, of rows where a list is
        its pairs. None where it would not, as far as can be told.

        Args:
            most: `max_reject_fraction`.
        """
        if not self.exact:
            return None
        read, made = self.tally.without(LEAKED.values()), self.lists.rows_of(self.rows_in)
        asked = past_fault(most, read, self.rows_in, made - read.reasons.total())
        left = sum(self.splits.values()) + sum(self.answers_alone.values())
        return asked or past_fault(most, self.tally, made, left)

    def pairs(self, *splits: str) -> int:
        """Pairs in these splits."""
        return sum(self.splits.get(split, 0) for split in splits)

    def labelled_pairs(self, *splits: str) -> int:
        """Pairs in these splits that carry a human's label."""
        return sum(self.labelled.get(split, 0) for split in splits)

    def lacks(self, *splits: str) -> bool:
        """Whether these splits have no pair, as far as can be told: no source is yet to be read."""
        return self.begun and not self.pairs(*splits)

    def lacks_labels(self, *splits: str) -> bool:
        """Whether none of their pairs has a human's label, as far as can be told."""
        return self.begun and not self.labelled_pairs(*splits)

    def prompts_of(self, *splits: str) -> int:
        """Different prompts in pairs of these splits; one in two of them counts twice."""
        return sum(self.prompts.get(split, 0) for split in splits)

    def answers_of(self, *splits: str) -> int:
        """Different answers in pairs of these splits; one in two of them counts twice."""
        return sum(self.answers.get(split, 0) for split in splits)

    def alone_of(self, *splits: str) -> tuple[int, int]:
        """Answers that stand in no pair, of these splits, and their different prompts."""
        counts = (self.answers_alone, self.prompts_alone)
        answers, prompts = (sum(of.get(split, 0) for split in splits) for of in counts)
        return answers, prompts

    def own_pairs(self, kind: numbers.Own, *splits: str) -> int:
        """Pairs in these splits that can be weighed by numbers of their own."""
        return sum(self.own.get(kind, {}).get(split, 0) for split in splits)


def census(config: PrepareConfig, seed: int, *, seconds: float = 5.0, sample: int = 256) -> Census:
    """Reads the sources for a while.

    Args:
        config: the sources and the split settings.
        seed: of the split.
        seconds: stop reading after so long.
        sample: how many pairs to draw.

    Raises:
        ConfigError: for sources or columns that are missing.
    """
    rule = SplitRule(
        seed, config.labelled_fraction, config.validation_fraction, config.test_fraction
    )
    found, tally, sampled = CountedRows(), Tally(), Sample(sample, seed)
    planned = plan(config)
    pieces = planned.pieces
    reading = _Reading(pieces, seconds)
    unread = [Unread() for _ in pieces]
    used = [tree(piece.layout.paths) for piece in pieces]
    for k, raw in reading:
        piece = pieces[k]
        unread[k].note(raw.value, used[k])
        try:
            made = parse_raw(raw, piece.layout)
        except BadRow as bad:
            tally.add(bad.reason, bad.found)
            continue
        unread[k].note_keys(made.unread)
        found.note(made)
        for parsed in made.pairs:
            pair, place = drawn(parsed, rule, piece.source, piece.into)
            if found.add(pair, place, parsed.numbers):
                sampled.add(Sampled(pair.pair_id, parsed), place, len(found.copies))
    how = comparing((piece.layout for piece in pieces), config.pairing, seed, planned.kind)
    found.gather(tally, how, learn_ties=config.ties == "labelled")
    _count_columns(pieces, unread, used)
    drawn_evenly = sampled.pairs(how)
    return Census(
        reading.scaled(found.pairs),
        reading.scaled(found.labelled),
        round(tally.reasons.total() * reading.scale),
        reading.complete,
        tuple(each.pair for each in drawn_evenly),
        prompts=reading.scaled(sizes(found.prompts)),
        answers=reading.scaled(sizes(found.answers)),
        own={own: reading.scaled(found.own[own]) for own in _kinds(pieces)},
        void=reading.scaled(found.void),
        unlike=round(found.unlike * reading.scale),
        most_weight=found.most_weight,
        files=reading.files,
        damaged=reading.damaged,
        remarks=planned.remarks,
        tally=tally,
        sources=tuple((piece.source, piece.layout.described()) for piece in pieces),
        unread=tuple(unread),
        lost=tuple(late_columns.lost(pieces, unread)),
        ties=found.ties,
        merged=round(found.merged * reading.scale),
        alone=found.alone.scaled(reading.scale),
        answers_alone=reading.scaled(sizes(found.answers_alone)),
        prompts_alone=reading.scaled(sizes(found.prompts_alone)),
        lists=found.lists.scaled(reading.scale),
        of_lists=found.of_lists,
        sampled_ids=found.sampled_ids(),
        begun=reading.begun == len(pieces),
        rows_in=round(reading.rows * reading.scale),
        standing=tuple(found.standing(each.name) for each in drawn_evenly),
    )


def _count_columns(pieces: Sequence[Piece], unread: Sequence[Unread], used: Sequence[Tree]) -> None:
    """Adds the columns of columnar files, of which rows come without those that are not needed."""
    for piece, found, paths in zip(pieces, unread, used, strict=True):
        for part in piece.parts if columns_of(piece) else ():
            found.add(columnar(part, paths, LOOKED_AT))


def _kinds(pieces: Iterable[Piece]) -> list[numbers.Own]:
    there = {own for piece in pieces for own in numbers.kinds(piece.layout.columns)}
    return [own for own in numbers.COLUMNS if own in there]


class _Reading:
    """The rows of all pieces, each with its piece's number, until time is up; `scale` then."""

    def __init__(self, pieces: tuple[Piece, ...], seconds: float) -> None:
        self.pieces = pieces
        self.damaged: dict[str, str] = {}  # inputs, and why
        self.deadline = time.monotonic() + seconds
        self.complete = True
        self.rows = self.rows_done = self.size_done = 0  # done: of parts whose share is known
        self.begun = 0  # pieces

    def __iter__(self) -> Iterator[tuple[int, RawRow]]:
        for number, piece in enumerate(self.pieces):
            left = piece.limit
            for part in piece.parts:
                before, size = self.rows, 0
                # Behind the limit no file is opened, as `prepare` opens none.
                for raw in itertools.islice(read(part, columns_of(piece)), left):
                    if time.monotonic() > self.deadline:
                        self.complete = False
                        self._note(begun(part, self.rows - before, size), self.rows - before)
                        return
                    size += raw.size
                    left = None if left is None else left - 1
                    self.rows += 1
                    if raw.fault is Reason.DAMAGED:
                        self.damaged[str(part)] = raw.as_text()
                    self.begun = number + 1
                    yield number, raw
                if left != 0:
                    self._note(part.size, self.rows - before)
            self.begun = number + 1

    def _note(self, size: int, rows: int) -> None:
        """Bytes that were read and the rows in them."""
        if size:
            self.size_done += size
            self.rows_done += rows

    @property
    def files(self) -> int:
        """How many inputs there are."""
        return len({str(part) for part in self._parts()})

    @property
    def scale(self) -> float:
        """All rows over those that were read, by bytes; 1 where none are known (`begun`)."""
        if self.complete or not self.size_done:
            return 1.0
        a_byte = self.rows_done / self.size_done
        rows = (
            min(a_byte * sum(part.size for part in piece.parts), piece.limit or math.inf)
            for piece in self.pieces
        )
        return max(sum(rows) / self.rows, 1.0)

    def scaled(self, counted: Mapping[str, int]) -> dict[str, int]:
        """Counts of what was read, as they will be of all rows."""
        return {name: round(count * self.scale) for name, count in counted.items()}

    def _parts(self) -> Iterator[Part]:
        for piece in self.pieces:
            yield from piece.parts
