"""The `prepare` section in; about how many pairs each split will hold, and a sample of them, out.

Reads for a few seconds and writes nothing. Duplicates are not merged: that takes the whole.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cwpo_dist.config import PrepareConfig
from cwpo_dist.pairs.parsing import ParsedPair, parse
from cwpo_dist.pairs.pieces import Piece, columns_of
from cwpo_dist.pairs.readers import Part, RawRow, read
from cwpo_dist.pairs.records import content_hash
from cwpo_dist.pairs.rejects import BadRow, Tally
from cwpo_dist.pairs.sources import plan
from cwpo_dist.pairs.splits import SplitRule, split_of
from cwpo_dist.pairs.unread import Unread, columnar, tree

LOOKED_AT = 10_000  # rows of a columnar file, for what of them nothing reads


@dataclass(frozen=True)
class Census:
    """What the sources hold.

    Attributes:
        splits: pairs by split.
        labelled: those of them with a human's label.
        rejects: rows that will be set aside.
        exact: True when everything was read; else the counts are scaled up by file size.
        sample: pairs drawn evenly from what was read.
        tally: why rows of those that were read are set aside.
        sources: of each source, its path and how its rows are read.
        unread: of each source, what of the rows that were read nothing reads.
        ties: pairs of those that were read whose answers people found equal.
    """

    splits: Mapping[str, int]
    labelled: Mapping[str, int]
    rejects: int
    exact: bool
    sample: tuple[ParsedPair, ...]
    tally: Tally = field(default_factory=Tally)
    sources: tuple[tuple[str, str], ...] = ()
    unread: tuple[Unread, ...] = ()
    ties: int = 0

    def sentences(self) -> Iterator[str]:
        """How rows are read, what of them is not, and why some are set aside, for people."""
        of = "" if self.exact else " (of the rows that were read)"
        for (source, how), unread in zip(self.sources, self.unread, strict=True):
            yield f"{source}: reads {how}"
            for sentence in unread.sentences():
                yield f"{source}: {sentence}{of}"
        if self.tally.reasons:
            yield "\n".join([f"rows that are set aside{of}:", *self.tally.lines()])
        if self.ties:
            yield f"{self.ties:,} pairs{of} are ties, kept without a label"

    def pairs(self, *splits: str) -> int:
        """Pairs in these splits."""
        return sum(self.splits.get(split, 0) for split in splits)

    def labelled_pairs(self, *splits: str) -> int:
        """Pairs in these splits that carry a human's label."""
        return sum(self.labelled.get(split, 0) for split in splits)


def census(config: PrepareConfig, seed: int, *, seconds: float = 5.0, sample: int = 256) -> Census:
    """Reads the sources for a while.

    Args:
        config: the sources and the split settings.
        seed: of the split.
        seconds: stop reading after so long.
        sample: how many pairs to keep.

    Raises:
        ConfigError: for sources or columns that are missing.
    """
    rule = SplitRule(
        seed, config.labelled_fraction, config.validation_fraction, config.test_fraction
    )
    counts: Counter[str] = Counter()
    labelled: Counter[str] = Counter()
    tally, kept, ties = Tally(), list[ParsedPair](), 0
    draw = random.Random(seed)
    pieces = plan(config).pieces
    reading = _Reading(pieces, seconds)
    unread = [Unread() for _ in pieces]
    used = [tree(piece.layout.paths) for piece in pieces]
    for k, raw in reading:
        piece = pieces[k]
        unread[k].note(raw.value, used[k])
        try:
            if raw.fault is not None:
                raise BadRow(raw.fault)
            pair = parse(raw.value, piece.layout)
        except BadRow as bad:
            tally.add(bad.reason, bad.found)
            continue
        unread[k].note_keys(pair.unread)
        split = _split(pair, piece, rule)
        counts[split] += 1
        labelled[split] += pair.label in ("first", "second")
        ties += pair.label == "tie"
        _keep(kept, pair, draw, counts.total(), sample)
    for k, piece in enumerate(pieces):
        for part in piece.parts if columns_of(piece) else ():
            unread[k].add(columnar(part, used[k], LOOKED_AT))
    pairs, people = (
        {k: round(n * reading.scale) for k, n in c.items()} for c in (counts, labelled)
    )
    rejects = round(tally.reasons.total() * reading.scale)
    sources = tuple((piece.source, piece.layout.described()) for piece in pieces)
    return Census(
        pairs, people, rejects, reading.complete, tuple(kept), tally, sources, tuple(unread), ties
    )


class _Reading:
    """The rows of all pieces, each with its piece's number, until time is up; `scale` then."""

    def __init__(self, pieces: tuple[Piece, ...], seconds: float) -> None:
        self.pieces = pieces
        self.deadline = time.monotonic() + seconds
        self.complete = True
        self.size_done = 0

    def __iter__(self) -> Iterator[tuple[int, RawRow]]:
        for number, piece in enumerate(self.pieces):
            left = piece.limit
            for part in piece.parts:
                for raw in read(part, columns_of(piece)):
                    if left == 0:
                        break
                    if time.monotonic() > self.deadline:
                        self.complete = False
                        return
                    left = None if left is None else left - 1
                    yield number, raw
                self.size_done += part.size

    @property
    def scale(self) -> float:
        """All bytes over those of the parts that were read to their end; 1 where none was."""
        if self.complete or not self.size_done:
            return 1.0
        return sum(part.size for part in self._parts()) / self.size_done

    def _parts(self) -> Iterator[Part]:
        for piece in self.pieces:
            yield from piece.parts


def _split(pair: ParsedPair, piece: Piece, rule: SplitRule) -> str:
    key = content_hash(pair.prompt) if pair.group is None else pair.group
    label = None if pair.label == "tie" else pair.label
    return split_of(rule.side(key, piece.into), rule.is_labelled(key), label)


def _keep(
    kept: list[ParsedPair], pair: ParsedPair, draw: random.Random, seen: int, most: int
) -> None:
    """Reservoir sampling: after any number of pairs, each was kept with the same chance."""
    if len(kept) < most:
        kept.append(pair)
    elif (place := draw.randrange(seen)) < most:
        kept[place] = pair
