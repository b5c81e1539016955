"""The bytes of a CSV or TSV file in; its rows by column name, and where it can be cut, out."""

from __future__ import annotations

import csv
import io
import itertools
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from typing import IO

from cwpo_dist.pairs.rejects import printable

# The csv module's own 128 KiB is shorter than a long answer; without any bound one stray quote
# would swallow the rest of the file.
CSV_FIELD_BYTES = 16 * 2**20
# Of lines inside a quoted field: so many, of so many columns, of which so large a share are rows.
FEWEST_INNER, FEWEST_COLUMNS, ALIKE = 2, 3, 0.8


class HeaderError(ValueError):
    """A CSV file whose first line names no columns."""


def csv_rows(
    file: IO[bytes], span: tuple[int, int] | None = None, delimiter: str = ","
) -> Iterator[tuple[dict[str, str] | None, str]]:
    """Each row by column name, and its text; None for each line of what is no row.

    Args:
        file: at its start, where the header is.
        span: one of `csv_spans`, to which it keeps; None: all rows.
        delimiter: what stands between two fields; of ',' the header may say ';'.

    Raises:
        HeaderError: for a header that is none.
    """
    seen: list[str] = []
    lines, delimiter = _separated(file, delimiter)
    reader = _reader(lines, seen, delimiter)
    header = _header(reader)
    if span is not None:
        file.seek(span[0])
        rows = io.BytesIO(file.read(span[1] - span[0]))
        spanned = io.TextIOWrapper(rows, "utf-8", "surrogateescape", newline="")
        reader = _reader(spanned, seen, delimiter)
    for fields in _records(reader, seen) if header else ():
        yield from _rows(fields, seen, header, delimiter)


def csv_spans(file: IO[bytes], size: int, delimiter: str = ",") -> Iterator[tuple[int, int, int]]:
    """Where a CSV file can be cut: byte ranges of whole rows, with how many rows are in each.

    Only reading it from its start tells a line break between rows from one inside quotes.

    Args:
        file: at its start; not compressed.
        size: bytes that a range has at least, but for the last.
        delimiter: what stands between two fields; of ',' the header may say ';'.
    """
    seen: list[str] = []
    has_mark = file.read(len(BOM_UTF8)) == BOM_UTF8
    file.seek(0)
    lines, delimiter = _separated(file, delimiter)
    reader = _reader(lines, seen, delimiter)
    try:
        header = _header(reader)
    except HeaderError:  # whoever reads the rows says so
        return
    start = at = _bytes_of(seen) + (len(BOM_UTF8) if has_mark else 0)
    rows = 0
    for fields in _records(reader, seen):
        at += _bytes_of(seen)
        rows += len(_rows(fields, seen, header, delimiter))
        if at - start >= size:
            yield start, at, rows
            start, rows = at, 0
    if at > start:
        yield start, at, rows


def _lines(file: IO[bytes]) -> io.TextIOWrapper:
    """Bytes that are no UTF-8 become lone surrogates, which parsing sets aside row by row."""
    return io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")


def _separated(file: IO[bytes], delimiter: str) -> tuple[Iterable[str], str]:
    """All lines, and what separates their fields: ';' where the header has it and no comma.

    So do spreadsheets write where a comma is the decimal point.
    """
    lines = _lines(file)
    first = next(lines, "")
    bare = re.sub(r'"[^"]*"', "", first)  # without what column names hold
    found = ";" if delimiter == "," and ";" in bare and "," not in bare else delimiter
    return itertools.chain([first] if first else [], lines), found


def _reader(lines: Iterable[str], seen: list[str], delimiter: str) -> Iterator[list[str]]:
    """Rows of fields; `seen` grows by their physical lines: a quoted field spans several."""
    csv.field_size_limit(CSV_FIELD_BYTES)
    return csv.reader(_remembered(lines, seen), delimiter=delimiter, strict=True)


def _remembered(lines: Iterable[str], seen: list[str]) -> Iterator[str]:
    for line in lines:
        seen.append(line)
        yield line


def _header(reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise HeaderError(f"its first line is not a CSV header: {error}") from None
    if len(set(header)) < len(header):
        raise HeaderError(f"its header names a column twice: {printable(', '.join(header))}")
    return header


def _records(reader: Iterator[list[str]], seen: list[str]) -> Iterator[list[str] | None]:
    """The fields of each row, None for one that is no CSV; `seen` holds its lines."""
    while True:
        seen.clear()
        try:
            fields: list[str] | None = next(reader)
        except StopIteration:
            return
        except csv.Error:
            fields = None
        yield fields


def _rows(
    fields: list[str] | None, seen: list[str], header: list[str], delimiter: str
) -> list[tuple[dict[str, str] | None, str]]:
    """The row of some fields and its text; none of an empty line.

    Where they do not fit the header, or are no CSV, each of their lines counts as a row that is set
    aside, as it may have been one: a quote that is opened by mistake takes all lines up to the next
    one, and may even end in as many fields as there are columns.
    """
    if fields == []:
        return []
    fits = fields is not None and len(fields) == len(header)
    if fields is None or not fits or _swallowed(seen[1:-1], len(header), delimiter):
        return [(None, text) for line in seen if (text := line.rstrip("\r\n"))]
    return [(dict(zip(header, fields, strict=True)), "".join(seen).rstrip("\r\n"))]


def _swallowed(inner: list[str], width: int, delimiter: str) -> bool:
    """Whether lines inside a quoted field are rows themselves; within an answer they seldom are."""
    if len(inner) < FEWEST_INNER or width < FEWEST_COLUMNS:
        return False
    enough = sum(line.count(delimiter) >= width - 1 for line in inner)  # cheaper than to read them
    if enough < ALIKE * len(inner):
        return False
    rows = csv.reader(inner, delimiter=delimiter)
    try:
        alike = sum(len(row) == width for row in rows)
    except csv.Error:
        return False
    return alike >= ALIKE * len(inner)


def _bytes_of(lines: Iterable[str]) -> int:
    return len("".join(lines).encode("utf-8", "surrogateescape"))
