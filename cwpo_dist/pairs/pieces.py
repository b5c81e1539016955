"""One piece of the inputs in, its pairs filed by bucket out, with rejects and a summary.

A bucket is a range of pair ids; `buckets` gathers one from all pieces. A piece writes what depends
on its arguments alone, with put-if-absent and its summary last: read twice, by anyone, it leaves
the same files.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cwpo_dist.pairs.layout import Layout
from cwpo_dist.pairs.piece_summary import Notes, PieceSummary
from cwpo_dist.pairs.readers import Part, RawRow, read
from cwpo_dist.pairs.records import Kind, Reject, table_of
from cwpo_dist.pairs.rejects import BadRow, Reason, Tally, write_rejects
from cwpo_dist.pairs.row_forms import parse_raw
from cwpo_dist.pairs.splits import SIDE_SCHEMA, Into, SplitRule, drawn
from cwpo_dist.pairs.stored import Pair, pair_table, whole_schema
from cwpo_dist.pairs.unread import columnar
from cwpo_dist.storage import Store

ROWS = "work/rows"
SUMMARIES = "work/pieces"
COUNT = "work/count.json"  # how many pieces there are

# Rows are kept in memory until one of these is reached, then written as one file.
CHUNK_ROWS = 50_000
CHUNK_CHARS = 32 * 2**20
# Rows as Python objects take several times the memory of their text.
_ROWS_AS_PYTHON = 2048

BESIDE_PAIRS = pa.schema(
    [
        *((name, pa.int32()) for name in ("bucket", "piece")),
        ("number", pa.int64()),
        ("origin", pa.string()),
        ("position", pa.int64()),
        *SIDE_SCHEMA,
        ("in_labelled_part", pa.bool_()),
        *((name, pa.string()) for name in ("answer_a", "answer_b", "kept")),
    ]
)


@dataclass(frozen=True)
class Piece:
    """What one task reads: a part of a huge input, or one, or several small ones of a source.

    Attributes:
        source: the source as the config spells it.
        parts: what is read, in this order.
        layout: how its rows spell a pair.
        into: the side all its rows go to, or the labelled part; None: by hash.
        limit: read at most so many rows.
    """

    source: str
    parts: tuple[Part, ...]
    layout: Layout
    into: Into | None = None
    limit: int | None = None


def piece_summaries(store: Store) -> list[PieceSummary]:
    """The summaries of all pieces, which are all done, in their order."""
    names = (f"{SUMMARIES}/{index:05d}.json" for index in range(store.read_json(COUNT)))
    return [PieceSummary(**store.read_json(name)) for name in names]


def damage_fault(damaged: Mapping[str, str], files: int, fraction: float) -> str | None:
    """Why so many damaged files stop the stage; None where they do not.

    One torn file among thousands must not stop a run, but its loss counts as a single row: past
    the share of rows that may be lost, so many files are too many as well.

    Args:
        damaged: the files that could not be read to their end, with why.
        files: how many there are in all.
        fraction: `max_reject_fraction`.
    """
    if len(damaged) <= fraction * files:
        return None
    lines = [f"  {name} {why}" for name, why in sorted(damaged.items())[:10]]
    return (
        f"prepare: {len(damaged)} of {files} files are damaged, more than "
        f"prepare.max_reject_fraction={fraction:g} allows. Fetch them again, then run the same "
        "command:\n" + "\n".join(lines)
    )


def read_piece(store: Store, index: int, piece: Piece, rule: SplitRule, n_buckets: int) -> None:
    """Reads and parses one piece; writes `work/rows/`, `rejects/` and `work/pieces/<index>.json`.

    Raises:
        SourceError: when storage refuses to be read.
    """
    name = f"{SUMMARIES}/{index:05d}.json"
    if _is_done(store, name):
        return
    files = _PieceFiles(store, index, piece.layout.kind)
    summary = PieceSummary(piece.source)
    notes = Notes(piece.layout)
    for number, (part, raw) in enumerate(raw_rows(piece)):
        summary.rows_in += 1
        notes.see(raw.value)
        if raw.fault is Reason.DAMAGED:
            summary.damaged[str(part)] = raw.as_text()
        try:
            made = parse_raw(raw, piece.layout)
        except BadRow as bad:
            files.reject(Reject(bad.reason, bad.found, str(part), raw.position, raw.as_text()))
            continue
        for reason, found, text in made.set_aside:
            files.reject(Reject(reason, found, str(part), raw.position, text), files.of_lists)
        notes.add(made)
        for parsed in made.pairs:
            notes.add_pair(parsed, part, raw)
            pair, place = drawn(parsed, rule, piece.source, piece.into)
            bucket = int(pair.pair_id[:8], 16) * n_buckets >> 32
            kept = json.dumps(dict(parsed.kept), ensure_ascii=False)
            files.add(pair, Filed(bucket, index, number, str(part), raw.position, *place, kept))
    files.flush()
    for part in piece.parts if columns_of(piece) else ():
        notes.unread.add(columnar(part, notes.used))
    notes.write(summary)
    summary.rejects, summary.found = files.tally.plain()
    summary.responses, summary.responses_found = files.of_lists.plain()
    summary.files = files.written
    store.create_json(name, asdict(summary))


def _is_done(store: Store, name: str) -> bool:
    """True for a summary with its files: a worker cut off from a dead driver may write late.

    Then a summary can appear while another driver removes the files that it speaks of.
    """
    if not store.exists(name):
        return False
    return all(map(store.exists, PieceSummary(**store.read_json(name)).files))


def columns_of(piece: Piece) -> set[str] | None:
    """The columns to read; None: all, for few rows are read, or a second look would fetch twice."""
    whole = piece.limit is not None or any(part.reader == "hub" for part in piece.parts)
    return None if whole else piece.layout.needed


def raw_rows(piece: Piece) -> Iterator[tuple[Part, RawRow]]:
    """The rows of a piece, in their order, each with what it was read from."""
    columns = columns_of(piece)
    rows = ((part, raw) for part in piece.parts for raw in read(part, columns))
    return itertools.islice(rows, piece.limit)


class Filed(NamedTuple):
    """What stands beside a pair in a piece's files: the columns of BESIDE_PAIRS."""

    bucket: int
    piece: int
    number: int
    origin: str
    position: int
    prompt_hash: str
    side: int
    in_labelled_part: bool
    answer_a: str
    answer_b: str
    kept: str


def filed_table(pairs: Sequence[Pair], filed: Sequence[Filed], kind: Kind) -> pa.Table:
    """Pairs with what stands beside them."""
    table, beside = pair_table(pairs, whole_schema(kind)), table_of(filed, BESIDE_PAIRS)
    for field_ in BESIDE_PAIRS:
        table = table.append_column(field_, beside[field_.name])
    return table


class _PieceFiles:
    """The rows and rejects of one piece, written in files of bounded size."""

    def __init__(self, store: Store, index: int, kind: Kind) -> None:
        self._store = store
        self._index = index
        self._kind = kind
        self._pairs: list[Pair] = []
        self._filed: list[Filed] = []
        self._tables: list[pa.Table] = []
        self._rejects: list[Reject] = []
        self._chars = 0
        self._count = 0
        self._chunk = 0
        self.written: list[str] = []
        self.tally, self.of_lists = Tally(), Tally()  # rows; responses of lists

    def add(self, pair: Pair, filed: Filed) -> None:
        self._pairs.append(pair)
        self._filed.append(filed)
        if len(self._pairs) == _ROWS_AS_PYTHON:
            self._pack()
        self._grow(sum(len(str(value)) for value in (pair.prompt, *pair.answers, pair.tools)))

    def reject(self, reject: Reject, tally: Tally | None = None) -> None:
        (tally or self.tally).add(reject.reason, reject.found)
        self._rejects.append(reject)
        self._grow(len(reject.row))

    def _grow(self, chars: int) -> None:
        self._chars += chars
        self._count += 1
        if self._chars >= CHUNK_CHARS or self._count >= CHUNK_ROWS:
            self.flush()

    def _pack(self) -> None:
        self._tables.append(filed_table(self._pairs, self._filed, self._kind))
        self._pairs, self._filed = [], []

    def flush(self) -> None:
        name = f"{self._index:05d}-{self._chunk:05d}.parquet"
        self._pack()
        table = pa.concat_tables(self._tables)
        if table.num_rows:
            self._store.create(f"{ROWS}/{name}", _by_bucket(table))
            self.written.append(f"{ROWS}/{name}")
        write_rejects(self._store, f"part-read-{name}", self._rejects)
        self._tables, self._rejects, self._chars, self._count = [], [], 0, 0
        self._chunk += 1


def _by_bucket(table: pa.Table) -> bytes:
    """A table as Parquet with one row group a bucket, so that a bucket is read without the rest."""
    table = table.sort_by("bucket")
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema, compression="zstd") as writer:
        start = 0
        for _, group in itertools.groupby(table["bucket"].to_pylist()):
            length = sum(1 for _ in group)
            writer.write_table(table.slice(start, length))
            start += length
    return buffer.getvalue()
