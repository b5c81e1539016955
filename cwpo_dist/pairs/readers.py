"""One file, saved folder or hub split in, its raw rows out, the unreadable ones marked as such.

A line or row that cannot be read never fails its file: it comes out with a fault and its text; a
cell, of which others may be without need, with a fault of its own.
From where a file is damaged (a torn gzip, a Parquet file without its footer) its rest is one such
row, for nobody can count what it lost; of a Parquet file, the rest of the row group. Storage that
refuses to be read is an error: the same file may be whole a moment later.
"""

from __future__ import annotations

import io
import itertools
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import IO, Literal, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from cwpo_dist.pairs.arrow_rows import batch_rows
from cwpo_dist.pairs.csv_files import HeaderError, csv_rows
from cwpo_dist.pairs.json_files import json_lines, json_rows
from cwpo_dist.pairs.rejects import Reason, printable, row_text
from cwpo_dist.redaction import redacted
from cwpo_dist.storage_faults import fault_of, told

Reader = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "saved", "hub"]

READERS: dict[str, Reader] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
# By suffix, how many bytes the signature has that such a file begins with.
SIGNATURES = {".gz": 2, ".bz2": 3, ".xz": 6, ".zst": 4, ".lz4": 4}
COMPRESSIONS = tuple(SIGNATURES)
DELIMITERS = {"csv": ",", "tsv": "\t"}
BATCH_ROWS = 1000
BUFFER_BYTES = 2**20

# Python unpacks the others itself.
_UNPACKED_BY_ARROW = {".zst": "zstd", ".lz4": "lz4"}
# What precedes damage is given up to so many bytes.
_UNPACKED_BYTES = 2**16
_ARROW_FILE = b"ARROW1"  # else it is a stream, as `datasets` writes them

# What damaged content raises, beside OSError, which storage raises too (see `out_of_reach`).
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, UnicodeDecodeError)


class SourceError(ValueError):
    """A source that cannot be read; the message names it and the remedy.

    What a server says may repeat a signed URL, to which it led us: it is told, and kept, without.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class DataSetError(ValueError):
    """What `datasets` has against a saved folder or a hub split."""


@dataclass(frozen=True)
class Part:
    """What one reader reads from its start to its end.

    Attributes:
        uri: a path, any URI that fsspec knows, or a hub id.
        reader: which reader takes it.
        name: subset of a hub data set.
        data_dir: folder inside a hub data set.
        split: split of a hub data set or saved folder.
        revision: commit of a hub data set.
        size: bytes on disk, 0 where unknown.
        shard: (index, count) of a hub split that is read in several parts.
        span: the bytes of a file of JSON lines whose lines begin here, those of whole rows of a
            CSV file, or the row groups of a Parquet file, from and to; None: the whole file.
        first: number of the first line or row of such bytes.
    """

    uri: str
    reader: Reader
    name: str | None = None
    data_dir: str | None = None
    split: str | None = None
    revision: str | None = None
    size: int = 0
    shard: tuple[int, int] = (0, 1)
    span: tuple[int, int] | None = None
    first: int = 1

    def __str__(self) -> str:
        """Where a row came from, as rejects name it."""
        if self.reader != "hub":
            return f"{self.uri}[{self.split}]" if self.split else self.uri
        of = f"#{self.shard[0]}/{self.shard[1]}" if self.shard[1] > 1 else ""
        subset = "/".join(filter(None, (self.name, self.data_dir, self.split)))
        return f"{self.uri}@{self.revision or 'main'}[{subset}]{of}"


@dataclass(frozen=True)
class RawRow:
    """One row as its source has it.

    Attributes:
        position: line number (JSON lines) or row number, from 1.
        value: the parsed row, usually a dict.
        text: the row as it stands in the file; None where that is `value` itself.
        fault: why it could not be read, if so.
        cells: why cells of it could not be read, by column.
    """

    position: int
    value: object
    text: str | None = None
    fault: Reason | None = None
    cells: Mapping[str, Reason] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Its bytes in a file of lines; 0 where its text is not kept."""
        return 0 if self.text is None else len(self.text.encode("utf-8", "surrogatepass")) + 1

    def as_text(self) -> str:
        """The raw row for `rejects/`."""
        return row_text(self.value) if self.text is None else printable(self.text)


def reader_of(path: str) -> Reader | None:
    """The reader for a file name, None where its suffix is none of ours."""
    name, packed = path.lower(), compression_of(path)
    name = name.removesuffix(packed or "")
    reader = next((reader for suffix, reader in READERS.items() if name.endswith(suffix)), None)
    return None if packed and reader in ("parquet", "arrow") else reader


def compression_of(path: str) -> str | None:
    """The suffix that says how a whole file is compressed, None where none does."""
    return next((suffix for suffix in COMPRESSIONS if path.lower().endswith(suffix)), None)


def read(part: Part, columns: Iterable[str] | None = None) -> Iterator[RawRow]:
    """All rows of a part, in their order.

    Args:
        part: what to read.
        columns: the columns needed, for formats that can skip the others; None: all.

    Raises:
        SourceError: when its storage, or the hub, refuses to be read.
    """
    needed = None if columns is None else set(columns)
    with access(part):
        yield from _until_damage(_rows(part, needed), part.first)


def begun(part: Part, rows: int, size: int) -> int:
    """About how many of a part's bytes its first rows took; 0 where nothing tells.

    Args:
        part: of which more was not read.
        rows: how many were.
        size: of their texts.
    """
    if part.reader == "parquet" and rows:  # so its footer could be read
        with access(part), opened(part.uri) as file:
            there: int = pq.ParquetFile(file).metadata.num_rows
            return round(part.size * rows / max(rows, there))
    return 0 if compression_of(part.uri) else size  # of packed files the bytes read are not known


@contextmanager
def access(part: Part) -> Iterator[None]:
    """Says in words what storage, or the hub, has against reading a part.

    Raises:
        SourceError: naming it and the remedy.
    """
    try:
        yield
    except Exception as error:  # each service raises kinds of its own; what is none goes on
        fault = fault_of(error)
        if fault is None and not isinstance(error, OSError | DataSetError):
            raise
        what = "" if fault is None else f" ({fault.what})"
        remedy = "fix the access to it" if fault is None else fault.remedy
        raise SourceError(
            f"{part}: cannot be read: {told(error)}{what}; {remedy}, then run the same command"
        ) from error


def _until_damage(rows: Iterator[RawRow], position: int) -> Iterator[RawRow]:
    """The rows, and where they end in damage one more that stands for the rest."""
    try:
        for row in rows:
            yield row
            position = row.position + 1
    except (OSError, HeaderError, *_DAMAGE) as error:
        if out_of_reach(error):
            raise
        why = redacted(f"cannot be read from here on: {type(error).__name__}: {error}")
        yield RawRow(position, None, why, fault=Reason.DAMAGED)


def out_of_reach(error: Exception) -> bool:
    """True for what storage refused; gzip, bzip2 and Arrow report bad bytes as a bare OSError."""
    refused = fault_of(error) is not None
    return refused or (isinstance(error, OSError) and error.errno is not None)


def _rows(part: Part, columns: set[str] | None) -> Iterator[RawRow]:
    if part.reader in ("jsonl", "json"):
        return _json_rows(part)
    if part.reader in DELIMITERS:
        return _csv_rows(part)
    if part.reader == "parquet":
        return _parquet_rows(part, columns)
    return _arrow_rows(part, columns) if part.reader == "arrow" else _data_set_rows(part, columns)


def _json_rows(part: Part) -> Iterator[RawRow]:
    with open_file(part.uri) as file:
        if part.span is not None:
            rows = json_lines(file, part.span, part.first)
        else:
            rows = json_rows(file, document=part.reader == "json")
        yield from itertools.starmap(RawRow, rows)


def _csv_rows(part: Part) -> Iterator[RawRow]:
    with open_file(part.uri) as file:
        rows = csv_rows(file, part.span, DELIMITERS[part.reader])
        for position, (value, text) in enumerate(rows, part.first):
            yield RawRow(position, value, text, Reason.MALFORMED if value is None else None)


def filesystem_of(path: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a path or URI, and the path there.

    What has no `://` is a path as it stands; fsspec would read `::` as one URI inside another.
    """
    if "://" in path:
        try:
            found: tuple[AbstractFileSystem, str] = fsspec.url_to_fs(path)
        except TypeError as error:  # of a kind that wants to be told more than a URI
            raise ValueError(str(error)) from error
        return found
    return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(path))


def open_file(uri: str) -> IO[bytes]:
    """A file for reading, unpacked where its suffix says so."""
    packed = compression_of(uri)
    by_arrow = _UNPACKED_BY_ARROW.get(packed or "")
    filesystem, path = filesystem_of(uri)
    packing = None if by_arrow else "infer"
    file = filesystem.open(path, "rb", compression=packing)
    if by_arrow:
        unpacked = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), by_arrow)
        return io.BufferedReader(unpacked, _UNPACKED_BYTES)
    if packed:  # they buffer, and give all that precedes damage
        return cast(IO[bytes], file)
    # Without a buffer of its own a remote file copies a whole block for each line.
    return io.BufferedReader(file, BUFFER_BYTES)


def opened(uri: str) -> IO[bytes]:
    """A file for reading, as its bytes are."""
    filesystem, path = filesystem_of(uri)
    return cast(IO[bytes], filesystem.open(path, "rb"))


def _data_set_rows(part: Part, columns: set[str] | None) -> Iterator[RawRow]:
    """The rows of a saved folder or hub split."""
    from cwpo_dist.pairs import data_sets  # not above: it imports datasets

    tables = data_sets.tables(part, columns)
    yield from _numbered((batch for table in tables for batch in table.to_batches()), 1)


def _parquet_rows(part: Part, columns: set[str] | None) -> Iterator[RawRow]:
    """The rows of a Parquet file, group by group: behind a damaged one the next may be whole."""
    with opened(part.uri) as file, closing(pq.ParquetFile(file)) as parquet:
        names = [name for name in parquet.schema_arrow.names if columns is None or name in columns]
        start, stop = part.span or (0, parquet.num_row_groups)
        first = 1 + sum(parquet.metadata.row_group(group).num_rows for group in range(start))
        for group in range(start, stop):
            batches = parquet.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=names, use_threads=False
            )
            yield from _until_damage(_numbered(batches, first), first)
            first += parquet.metadata.row_group(group).num_rows


def _arrow_rows(part: Part, columns: set[str] | None) -> Iterator[RawRow]:
    """The rows of an Arrow (Feather) file or stream."""
    with opened(part.uri) as file:
        is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        file.seek(0)
        batches = _batches_of_file(file) if is_file else pa.ipc.open_stream(file)
        yield from _numbered(_small_batches(batches, columns), 1)


def _batches_of_file(file: IO[bytes]) -> Iterator[pa.RecordBatch]:
    reader = pa.ipc.open_file(file)
    return map(reader.get_batch, range(reader.num_record_batches))


def _small_batches(
    batches: Iterable[pa.RecordBatch], columns: set[str] | None
) -> Iterator[pa.RecordBatch]:
    """The columns wanted, some rows at a time; checked, for Arrow trusts what lies in its files."""
    for batch in batches:
        names = enumerate(batch.schema.names)  # of which two may be alike
        batch = batch.select([k for k, name in names if columns is None or name in columns])
        for start in range(0, batch.num_rows, BATCH_ROWS):
            small = batch.slice(start, BATCH_ROWS)
            small.validate(full=True)
            yield small


def _numbered(batches: Iterable[pa.RecordBatch], first: int) -> Iterator[RawRow]:
    rows = (row for batch in batches for row in batch_rows(batch))
    for position, (value, cells) in enumerate(rows, first):
        yield RawRow(position, value, cells=cells)
