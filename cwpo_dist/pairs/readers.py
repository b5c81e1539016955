"""One file, saved folder or hub split in, its raw rows out, the unreadable ones marked as such.

A line or row that cannot be read never fails its file: it comes out with a fault and its text.
From where a file is damaged (a torn gzip, a Parquet file without its footer) its rest is one such
row, for nobody can count what it lost; of a Parquet file, the rest of the row group. Storage that
refuses to be read is an error: the same file may be whole a moment later.
"""

from __future__ import annotations

import io
import json
import lzma
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import IO, Any, Literal, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from cwpo_dist.pairs.csv_files import HeaderError, csv_rows
from cwpo_dist.pairs.rejects import Reason, printable, row_text

Reader = Literal["jsonl", "json", "csv", "parquet", "saved", "hub"]

READERS: dict[str, Reader] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
COMPRESSIONS = (".gz", ".bz2", ".xz")
BATCH_ROWS = 1000
BUFFER_BYTES = 2**20


# What damaged content raises, beside OSError, which storage raises too (see `_out_of_reach`).
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, UnicodeDecodeError)


class SourceError(ValueError):
    """A source that cannot be read; the message names it and the remedy."""


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
    """

    position: int
    value: Any
    text: str | None = None
    fault: Reason | None = None

    def as_text(self) -> str:
        """The raw row for `rejects/`."""
        return row_text(self.value) if self.text is None else printable(self.text)


def reader_of(path: str) -> Reader | None:
    """The reader for a file name, None where its suffix is none of ours."""
    name = path.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((reader for suffix, reader in READERS.items() if name.endswith(suffix)), None)


def read(part: Part, columns: Iterable[str] | None = None) -> Iterator[RawRow]:
    """All rows of a part, in their order.

    Args:
        part: what to read.
        columns: the columns needed, for formats that can skip the others; None: all.

    Raises:
        SourceError: when its storage, or the hub, refuses to be read.
    """
    wanted = None if columns is None else set(columns)
    try:
        yield from _until_damage(_rows(part, wanted), part.first)
    except (OSError, DataSetError) as error:
        raise SourceError(
            f"{part}: cannot be read: {error}. Mend the access to it, then run the same command"
        ) from error


def _until_damage(rows: Iterator[RawRow], position: int) -> Iterator[RawRow]:
    """The rows, and where they end in damage one more that stands for the rest."""
    try:
        for row in rows:
            yield row
            position = row.position + 1
    except (OSError, HeaderError, *_DAMAGE) as error:
        if _out_of_reach(error):
            raise
        why = f"cannot be read from here on: {type(error).__name__}: {error}"
        yield RawRow(position, None, why, fault=Reason.DAMAGED)


def _out_of_reach(error: Exception) -> bool:
    """True for what storage refused; gzip, bzip2 and Arrow report bad bytes as a bare OSError."""
    refused = isinstance(error, TimeoutError | ConnectionError)
    return refused or (isinstance(error, OSError) and error.errno is not None)


def _rows(part: Part, wanted: set[str] | None) -> Iterator[RawRow]:
    if part.reader in ("jsonl", "json", "csv"):
        return _text_rows(part)
    if part.reader == "parquet":
        return _parquet_rows(part, wanted)
    return _data_set_rows(part, wanted)


def _text_rows(part: Part) -> Iterator[RawRow]:
    with open_file(part.uri) as file:
        if part.reader == "csv":
            for position, (value, text) in enumerate(csv_rows(file, part.span), part.first):
                fault = Reason.MALFORMED if value is None else None
                yield RawRow(position, value, text, fault)
        elif part.reader == "json" and _opens_array(part.uri):
            yield from _array_rows(file.read().decode("utf-8-sig", "surrogateescape"))
        else:
            yield from _json_lines(file, part)


def open_file(uri: str) -> IO[bytes]:
    """A file for reading, unpacked where its suffix says so."""
    opened: Any = fsspec.open(uri, "rb", compression="infer").open()
    if uri.lower().endswith(COMPRESSIONS):  # they buffer, and give all that precedes damage
        return cast(IO[bytes], opened)
    # Without a buffer of its own a remote file copies a whole block for each line.
    return io.BufferedReader(opened, BUFFER_BYTES)


def _opens_array(uri: str) -> bool:
    """True for a `.json` file that is one array, not JSON lines."""
    with open_file(uri) as file:
        return file.read(4096).removeprefix(BOM_UTF8).lstrip().startswith(b"[")


def _json_lines(file: IO[bytes], part: Part) -> Iterator[RawRow]:
    """The lines that begin in the part's span."""
    at, stop = part.span or (0, None)
    if at:
        file.seek(at - 1)
        at += len(file.readline()) - 1  # what began before the span
    for position, line in enumerate(file, part.first):
        if stop is not None and at >= stop:
            return
        at += len(line)
        if line.strip():
            yield _json_line(position, line.rstrip(b"\r\n"))


def _json_line(position: int, line: bytes) -> RawRow:
    try:
        text = line.decode("utf-8-sig" if position == 1 else "utf-8")
    except UnicodeDecodeError:
        return RawRow(
            position, None, line.decode("utf-8", "backslashreplace"), fault=Reason.UNICODE
        )
    try:
        return RawRow(position, json.loads(text), text)
    except (ValueError, RecursionError):  # not JSON, a number too long, or nested too deep
        return RawRow(position, None, text, fault=Reason.MALFORMED)


def _array_rows(text: str) -> Iterator[RawRow]:
    """The elements of one JSON array; from the first malformed one on, the rest is one fault."""
    decoder = json.JSONDecoder()
    at = _skip_space(text, text.index("[") + 1)
    position = 1
    while text[at : at + 1] != "]":
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            yield RawRow(position, None, text[at:], fault=Reason.MALFORMED)
            return
        yield RawRow(position, value, text[at:end])
        position += 1
        at = _skip_space(text, end)
        if text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
        elif text[at : at + 1] != "]":
            yield RawRow(position, None, text[at:], fault=Reason.MALFORMED)
            return
    if text[at + 1 :].strip():
        yield RawRow(position, None, text[at + 1 :], fault=Reason.MALFORMED)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _data_set_rows(part: Part, wanted: set[str] | None) -> Iterator[RawRow]:
    """The rows of a saved folder or hub split."""
    from cwpo_dist.pairs import data_sets  # not above: it imports datasets

    tables = data_sets.tables(part, wanted)
    yield from _numbered((batch for table in tables for batch in table.to_batches()), 1)


def _parquet_rows(part: Part, wanted: set[str] | None) -> Iterator[RawRow]:
    """The rows of a Parquet file, group by group: behind a damaged one the next may be whole."""
    with fsspec.open(part.uri, "rb") as file, closing(pq.ParquetFile(file)) as parquet:
        names = [name for name in parquet.schema_arrow.names if wanted is None or name in wanted]
        start, stop = part.span or (0, parquet.num_row_groups)
        first = 1 + sum(parquet.metadata.row_group(group).num_rows for group in range(start))
        for group in range(start, stop):
            batches = parquet.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=names, use_threads=False
            )
            yield from _until_damage(_numbered(batches, first), first)
            first += parquet.metadata.row_group(group).num_rows


def _numbered(batches: Iterable[pa.RecordBatch], first: int) -> Iterator[RawRow]:
    for batch in batches:
        yield from _batch_rows(batch, first)
        first += batch.num_rows


@dataclass(frozen=True)
class _Unreadable:
    """Stands for a cell that Arrow holds but Python cannot."""

    text: str
    fault: Reason

    def __str__(self) -> str:
        return self.text


def _batch_rows(batch: pa.RecordBatch, first: int) -> Iterator[RawRow]:
    columns = [_values(column) for column in batch.columns]
    names = batch.schema.names
    for offset in range(batch.num_rows):
        value = {name: column[offset] for name, column in zip(names, columns, strict=True)}
        bad = next((cell for cell in value.values() if isinstance(cell, _Unreadable)), None)
        yield RawRow(first + offset, value, fault=bad.fault if bad else None)


def _values(column: pa.Array) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
        return values
    except (ValueError, OverflowError):  # bytes that are no UTF-8, dates beyond Python's
        return [_cell(cell) for cell in column]


def _cell(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        # Also inside nested values, `object` is the bytes of the string at fault.
        return _Unreadable(error.object.decode("utf-8", "backslashreplace"), Reason.UNICODE)
    except (ValueError, OverflowError) as error:
        return _Unreadable(str(error), Reason.TYPE)
