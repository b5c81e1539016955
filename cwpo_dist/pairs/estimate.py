"""The `prepare` section in; about how many pairs each split will hold, and a sample of them, out.

Reads for a few seconds and writes nothing. What was read is merged and split as `prepare` will;
where that is not all, copies that lie far apart are not seen.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

from cwpo_dist.config import PrepareConfig
from cwpo_dist.pairs import numbers
from cwpo_dist.pairs.parsing import ParsedPair
from cwpo_dist.pairs.pieces import Piece, columns_of
from cwpo_dist.pairs.readers import Part, RawRow, read
from cwpo_dist.pairs.records import prompt_of
from cwpo_dist.pairs.rejects import BadRow, Reason, Tally
from cwpo_dist.pairs.response_lists import ListCounts, RowPairs, parse_raw
from cwpo_dist.pairs.sources import plan
from cwpo_dist.pairs.splits import LEAKED, SIDES, Drawn, SplitRule, drawn, merge, split_of
from cwpo_dist.pairs.stored import Pair, Told
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
        ties: pairs of those that were read whose answers people found equal.
        merged: rows that are copies of other rows' pairs.
        lists: what becomes of rows that hold lists of responses.
        of_lists: why responses of those that were read are set aside.
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
    ties: int = 0
    merged: int = 0
    lists: ListCounts = field(default_factory=ListCounts)
    of_lists: Tally = field(default_factory=Tally)

    def sentences(self) -> Iterator[str]:
        """How rows are read, what of them is not, and why some are set aside, for people."""
        of = "" if self.exact else " (of the rows that were read)"
        for (source, how), unread in zip(self.sources, self.unread, strict=True):
            yield f"{source}: reads {how}"
            for sentence in unread.sentences():
                yield f"{source}: {sentence}{of}"
        if self.tally.reasons:
            every = self.tally.lines(most=len(self.tally.reasons))
            yield "\n".join([f"rows that are set aside{of}:", *every])
        if self.lists.rows:
            yield self.lists.sentence()
        if self.of_lists.reasons:
            every = self.of_lists.lines(most=len(self.of_lists.reasons))
            yield "\n".join([f"responses in lists that are set aside{of}:", *every])
        if self.ties:
            yield f"{self.ties:,} pairs{of} are ties, kept without a label"

    @property
    def rows(self) -> int:
        """Pairs, copies of pairs, and what is set aside: all of them, a list as its pairs."""
        return sum(self.splits.values()) + self.merged + self.rejects

    def pairs(self, *splits: str) -> int:
        """Pairs in these splits."""
        return sum(self.splits.get(split, 0) for split in splits)

    def labelled_pairs(self, *splits: str) -> int:
        """Pairs in these splits that carry a human's label."""
        return sum(self.labelled.get(split, 0) for split in splits)

    def prompts_of(self, *splits: str) -> int:
        """Different prompts in pairs of these splits; one in two of them counts twice."""
        return sum(self.prompts.get(split, 0) for split in splits)

    def answers_of(self, *splits: str) -> int:
        """Different answers in pairs of these splits; one in two of them counts twice."""
        return sum(self.answers.get(split, 0) for split in splits)

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
    found, tally, sampled = _Counts(), Tally(), list[ParsedPair]()
    damaged: dict[str, str] = {}
    draw = random.Random(seed)
    planned = plan(config)
    pieces = planned.pieces
    reading = _Reading(pieces, seconds)
    unread = [Unread() for _ in pieces]
    used = [tree(piece.layout.paths) for piece in pieces]
    for k, part, raw in reading:
        piece = pieces[k]
        unread[k].note(raw.value, used[k])
        if raw.fault is Reason.DAMAGED:
            damaged[str(part)] = raw.as_text()
        try:
            made = parse_raw(raw, piece.layout)
        except BadRow as bad:
            tally.add(bad.reason, bad.found)
            continue
        unread[k].note_keys(made.unread)
        found.note(made)
        for parsed in made.pairs:
            if found.add(*drawn(parsed, rule, piece.source, piece.into), parsed.numbers):
                _sample(sampled, parsed, draw, len(found.copies), sample)
    found.gather(tally, learn_ties=config.ties == "labelled")
    for piece, of, paths in zip(pieces, unread, used, strict=True):
        _count_columns(piece, of, paths)
    return Census(
        reading.scaled(found.pairs),
        reading.scaled(found.labelled),
        round(tally.reasons.total() * reading.scale),
        reading.complete,
        tuple(sampled),
        prompts=reading.scaled(_sizes(found.prompts)),
        answers=reading.scaled(_sizes(found.answers)),
        own={own: reading.scaled(found.own[own]) for own in _kinds(pieces)},
        void=reading.scaled(found.void),
        unlike=round(found.unlike * reading.scale),
        most_weight=found.most_weight,
        files=reading.files,
        damaged=damaged,
        remarks=planned.remarks,
        tally=tally,
        sources=tuple((piece.source, piece.layout.described()) for piece in pieces),
        unread=tuple(unread),
        ties=found.ties,
        merged=round(found.merged * reading.scale),
        lists=found.lists.scaled(reading.scale),
        of_lists=found.of_lists,
    )


def _count_columns(piece: Piece, unread: Unread, used: Tree) -> None:
    """Adds the columns of columnar files, of which rows come without those that are not needed."""
    for part in piece.parts if columns_of(piece) else ():
        unread.add(columnar(part, used, LOOKED_AT))


def _kinds(pieces: Iterable[Piece]) -> list[numbers.Own]:
    there = {own for piece in pieces for own in numbers.kinds(piece.layout.columns)}
    return [own for own in numbers.COLUMNS if own in there]


class _Counts:
    """What was read: rows, without their texts; and, when all are there, pairs by split."""

    def __init__(self) -> None:
        self.copies: dict[str, list[tuple[Told, Drawn]]] = {}  # by pair id
        self.pairs: Counter[str] = Counter()
        self.labelled: Counter[str] = Counter()
        # Ids by split. Those of answers are the texts that `copies` holds, and take a reference.
        self.prompts: defaultdict[str, set[str]] = defaultdict(set)
        self.answers: defaultdict[str, set[str]] = defaultdict(set)
        self.own: dict[numbers.Own, Counter[str]] = {own: Counter() for own in numbers.COLUMNS}
        self.void: Counter[str] = Counter()
        self.most_weight = 0.0
        self.ties = self.merged = self.unlike = 0
        self.lists, self.of_lists = ListCounts(), Tally()

    def note(self, made: RowPairs) -> None:
        """Counts a row's list."""
        self.lists += made.counts or ListCounts()
        for reason, found, _ in made.set_aside:
            self.of_lists.add(reason, found)

    def add(self, pair: Pair, place: Drawn, own: numbers.Numbers) -> bool:
        """Whether it is the first of its pair."""
        self.void.update(own.void)
        self.most_weight = max(self.most_weight, own.weight or 0.0)
        copies = self.copies.setdefault(pair.pair_id, [])
        copies.append((pair.told, place))
        return len(copies) == 1

    def gather(self, tally: Tally, *, learn_ties: bool) -> None:
        """Sets aside prompts of two sides, merges copies and splits, as `buckets` does."""
        sides: dict[str, int] = {}
        for _, place in chain.from_iterable(self.copies.values()):
            sides[place.prompt_hash] = max(place.side, sides.get(place.prompt_hash, 0))
        for pair_id, copies in self.copies.items():
            side = sides[copies[0][1].prompt_hash]  # a pair has one prompt
            staying = [(told, place) for told, place in copies if place.side == side]
            for _ in range(len(copies) - len(staying)):
                tally.add(LEAKED[SIDES[side]])
            if staying:
                all_told = [told for told, _ in staying]
                agreed, unlike = numbers.agreed(all_told)
                merged, _ = merge([agreed, *all_told[1:]])
                self.unlike += unlike
                self._count(pair_id, merged, staying[0][1], learn_ties=learn_ties)
                self.merged += len(staying) - 1

    def _count(self, pair_id: str, told: Told, place: Drawn, *, learn_ties: bool) -> None:
        tie = bool(told.tie)
        side, labelled = SIDES[place.side], place.in_labelled_part
        split = split_of(side, labelled, told.label, learned_tie=learn_ties and tie)
        self.pairs[split] += 1
        self.labelled[split] += told.label is not None
        self.prompts[split].add(prompt_of(pair_id))
        self.answers[split].update((place.answer_a, place.answer_b))
        self.ties += tie
        for kind in numbers.usable(told):
            self.own[kind][split] += 1


def _sizes(by_split: Mapping[str, set[str]]) -> dict[str, int]:
    return {split: len(ids) for split, ids in by_split.items()}


class _Reading:
    """The rows of all pieces, each with its piece's number, until time is up; `scale` then."""

    def __init__(self, pieces: tuple[Piece, ...], seconds: float) -> None:
        self.pieces = pieces
        self.deadline = time.monotonic() + seconds
        self.complete = True
        self.rows = self.rows_done = self.size_done = 0  # done: of parts that were read to an end

    def __iter__(self) -> Iterator[tuple[int, Part, RawRow]]:
        for number, piece in enumerate(self.pieces):
            left = piece.limit
            for part in piece.parts:
                before = self.rows
                # Behind the limit no file is opened, as `prepare` opens none.
                for raw in itertools.islice(read(part, columns_of(piece)), left):
                    if time.monotonic() > self.deadline:
                        self.complete = False
                        return
                    left = None if left is None else left - 1
                    self.rows += 1
                    yield number, part, raw
                if left != 0:
                    self.size_done += part.size
                    self.rows_done += self.rows - before

    @property
    def files(self) -> int:
        """How many inputs there are."""
        return len({str(part) for part in self._parts()})

    @property
    def scale(self) -> float:
        """All rows over those that were read, by the parts read to an end; 1 where none was."""
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


def _sample(
    sampled: list[ParsedPair], pair: ParsedPair, draw: random.Random, seen: int, most: int
) -> None:
    """Reservoir sampling: after any number of pairs, each was drawn with the same chance."""
    if len(sampled) < most:
        sampled.append(pair)
    elif (place := draw.randrange(seen)) < most:
        sampled[place] = pair
