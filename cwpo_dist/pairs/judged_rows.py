"""A labelled set of preferences in; its rows, each with what people chose and what not, out.

A row counts as it stands: nothing is split, and copies are not merged. Beside all that `prepare`
reads, a row may have lists of chosen and of rejected answers, as RewardBench 2 has.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from cwpo_dist.config import ConfigError, PrepareConfig, Source
from cwpo_dist.pairs.layout import CHOSEN, Layout
from cwpo_dist.pairs.locate import find
from cwpo_dist.pairs.pairing import MOST_PAIRS
from cwpo_dist.pairs.parsing import ParsedPair, parse, readable
from cwpo_dist.pairs.peeked import PEEK_ROWS
from cwpo_dist.pairs.pieces import Piece, raw_rows
from cwpo_dist.pairs.readers import RawRow
from cwpo_dist.pairs.records import canonical
from cwpo_dist.pairs.rejects import BadRow, Reason, shown
from cwpo_dist.pairs.row_forms import parse_raw
from cwpo_dist.pairs.sources import Plan, plan
from cwpo_dist.pairs.splits import ordered
from cwpo_dist.pairs.stored import Pair

logger = logging.getLogger(__name__)

_UNLABELLED, _EQUAL = "no label", "people found both equal"
_LISTS = Layout({name: name for name in ("prompt", *CHOSEN)}, "text", "text", as_text=True)
_SUBSET, _NAME = "subset", "id"  # of RewardBench 2


class Row(NamedTuple):
    """What people said of some answers to one prompt.

    Attributes:
        pairs: with a label: one; of lists each chosen answer with each rejected one, in order.
        domain: by which figures are divided; None: by none.
        chosen: how many answers are chosen.
        name: of a row with lists, its id.
    """

    pairs: tuple[Pair, ...]
    domain: str | None
    chosen: int = 1
    name: str = ""


@dataclass
class Benchmark:
    """The `rows` of a labelled set of `read` rows, by domains of column `by`; with `lists` or not.

    `left_out` counts the rows, pairs and responses of lists that are not among them, by reason.
    """

    by: str | None
    lists: bool
    read: int = 0
    rows: list[Row] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def read_benchmark(config: PrepareConfig, by: str | None) -> Benchmark:
    """Reads a labelled set.

    Args:
        config: its sources, and how they are read.
        by: the column of the domains; None: `subset`, where rows have lists, else none.

    Raises:
        ConfigError: for what cannot be read, naming the field and the remedy.
        SourceError: where storage refuses to be read.
    """
    lists = _lists(config.sources[0]) if len(config.sources) == 1 else None
    planned = lists or plan(config)
    names = list(dict.fromkeys(itertools.chain.from_iterable(planned.names)))
    by = _column(by, names, _SUBSET if lists else None)
    for line in planned.remarks:
        logger.info("bench: %s", line)
    found = Benchmark(by, lists is not None)
    for piece in planned.pieces:
        layout = replace(piece.layout, kept=(by,) if by else ())
        for _, raw in raw_rows(replace(piece, layout=layout)):
            found.read += 1
            try:
                found.rows += _rows(raw, layout, found)
            except BadRow as bad:
                found.left_out[bad.reason] += 1
    return found


def _column(by: str | None, names: Sequence[str], unless: str | None) -> str | None:
    """The column of the domains: as it was asked for, else this one, where it is there."""
    if by is None:
        return unless if unless in names else None
    if by not in names:
        raise ConfigError(f"--by: there is no column {by!r}, but {', '.join(names)}; name another")
    return by


def _lists(source: Source) -> Plan | None:
    """What is read where the first row has lists of chosen and rejected answers; else None."""
    there = find("prepare.sources.0", source)
    peek = Piece(source.path, there.parts, _LISTS, limit=PEEK_ROWS)
    row = next((raw.value for _, raw in raw_rows(peek) if not raw.fault), None)
    if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str):
        return None
    if not all(_is_list(row.get(name)) for name in CHOSEN):
        return None
    piece = replace(peek, limit=source.limit or sys.maxsize)  # with one, all columns are read
    return Plan((piece,), "text", 1, False, (tuple(row),), there.left_out)


def _is_list(cell: object) -> bool:
    return isinstance(cell, list) and bool(cell) and all(isinstance(each, str) for each in cell)


def _rows(raw: RawRow, layout: Layout, found: Benchmark) -> Iterator[Row]:
    if found.lists:
        yield _of_lists(raw, layout, found.by)
        return
    row = parse_raw(raw, layout)
    found.left_out.update(aside.reason for aside in row.set_aside)
    found.left_out.update([_EQUAL] * (row.counts.ties if row.counts else 0))
    for pair in row.pairs:
        if pair.label in ("first", "second"):
            yield Row((_ordered(pair),), _domain(pair, found.by))
        else:
            found.left_out[_UNLABELLED if pair.label is None else _EQUAL] += 1


def _of_lists(raw: RawRow, layout: Layout, by: str | None) -> Row:
    row = readable(raw, layout)
    if not isinstance(row, Mapping):
        raise BadRow(Reason.NOT_MAPPING)
    for name in CHOSEN:
        if not _is_list(row.get(name)):
            raise BadRow(Reason.TYPE, name, shown(row.get(name)))
    number, others = (len(row[name]) for name in CHOSEN)
    if number * others > MOST_PAIRS:
        raise BadRow(Reason.TOO_MANY, CHOSEN[0], f"{number} beside {others}")
    both = itertools.product(*(row[name] for name in CHOSEN))
    pairs = [parse({**row, **dict(zip(CHOSEN, two, strict=True))}, layout) for two in both]
    return Row(tuple(map(_ordered, pairs)), _domain(pairs[0], by), number, str(row.get(_NAME)))


def _ordered(pair: ParsedPair) -> Pair:
    """Which answer is `a` is drawn by hash, as everywhere: place tells nothing."""
    return ordered(pair, canonical(pair.prompt), 0, "")[0]


def _domain(pair: ParsedPair, by: str | None) -> str | None:
    if by is None:
        return None
    value = pair.kept[by]
    return value if isinstance(value, str) and value.isprintable() and value else shown(value)
