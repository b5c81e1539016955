"""The inputs of each source in; pieces of about equal work out: huge files cut, tiny ones joined.

How inputs are cut changes no pair and no reject: pieces follow one another in the sources' order,
and every row keeps the position that it has in its file.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from cwpo_dist.pairs.csv_files import csv_spans
from cwpo_dist.pairs.json_files import opens_bracket
from cwpo_dist.pairs.pieces import Piece
from cwpo_dist.pairs.readers import DELIMITERS, Part, access, compression_of, open_file, opened

logger = logging.getLogger(__name__)

# A file larger than this is read by several tasks, where its format allows that.
CUT_BYTES = 64 * 2**20
# Smaller ones share a task up to this size, for a task costs some tens of milliseconds; a file
# counts as so many bytes at least, for opening one on object storage costs time as well.
JOIN_BYTES = 8 * 2**20
OPEN_BYTES = 64 * 2**10

_READ_BYTES = 8 * 2**20
_FOOTERS_AT_ONCE = 32


def cut(pieces: Sequence[Piece]) -> list[Piece]:
    """The same work in tasks of about equal size; a source with a limit stays one piece."""
    parts = [part for piece in pieces if piece.limit is None for part in piece.parts]
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as threads:  # each footer is a wait for storage
        cuts = iter(list(threads.map(_cut_part, parts)))
    out: list[Piece] = []
    for piece in pieces:
        if piece.limit is not None:
            out.append(piece)
            continue
        smaller = (part for _ in piece.parts for part in next(cuts))
        out += (replace(piece, parts=joined) for joined in _joined(smaller))
    return out


def spans(part: Part) -> list[tuple[int, int, int]]:
    """Byte ranges of a large text file for a task each, with how many rows begin in each.

    Args:
        part: a span of JSON lines, which is one range; or a whole CSV file, which is read once to
            find where its rows end: little work beside what its rows then are for several tasks.

    Raises:
        SourceError: when its storage refuses to be read.
    """
    with access(part):
        if part.reader in DELIMITERS:
            with open_file(part.uri) as file:
                return list(csv_spans(file, CUT_BYTES, DELIMITERS[part.reader]))
        assert part.span is not None
        return [(*part.span, _count_lines(part.uri, *part.span))]


def _count_lines(uri: str, start: int, stop: int) -> int:
    at, count = (start - 1, 0) if start else (0, 1)  # a line begins behind the newline before it
    with opened(uri) as file:
        file.seek(at)
        while data := file.read(min(_READ_BYTES, stop - 1 - at)):
            count += data.count(b"\n")
            at += len(data)
    return count


def is_numbered(piece: Piece) -> bool:
    """False for a piece whose `spans` must be known: where it is cut, or its first row's number."""
    return piece.limit is not None or not any(
        _is_cut_by_rows(part) or (part.reader == "jsonl" and part.span) for part in piece.parts
    )


def number_rows(pieces: Sequence[Piece], found: Iterable[Sequence[Sequence[int]]]) -> list[Piece]:
    """Cuts the pieces that are not numbered by their `spans`, and numbers each one's first row."""
    spans_of, out = iter(found), []
    number = 1
    for piece in pieces:
        spans_found = [] if is_numbered(piece) else next(spans_of)
        if not spans_found:
            out.append(piece)
            continue
        (part,) = piece.parts
        if part.span is None or part.span[0] == 0:  # a file begins
            number = 1
        for start, stop, rows in spans_found:
            span = replace(part, span=(start, stop), size=stop - start, first=number)
            out.append(replace(piece, parts=(span,)))
            number += rows
    return out


def _cut_part(part: Part) -> list[Part]:
    if part.size <= CUT_BYTES or part.reader in ("saved", "hub"):
        return [part]
    if part.reader == "parquet":
        return [replace(part, span=span, size=size) for span, size in _group_spans(part)] or [part]
    if _is_cut_by_lines(part):
        bounds = [*range(0, part.size, CUT_BYTES), part.size]
        return [replace(part, span=(a, b), size=b - a) for a, b in itertools.pairwise(bounds)]
    if _is_cut_by_rows(part):
        return [part]
    logger.info(
        "prepare: %s (%d MB) is read by one task: compressed files, Arrow files and JSON "
        "arrays cannot be cut; Parquet, plain JSON lines and plain CSV can",
        *(part, part.size >> 20),
    )
    return [part]


def _is_cut_by_lines(part: Part) -> bool:
    return part.reader == "jsonl" and not _is_compressed(part) and not _may_be_array(part)


def _is_cut_by_rows(part: Part) -> bool:
    """True for a large CSV file, whose line breaks may stand inside quotes."""
    large = part.span is None and part.size > CUT_BYTES
    return part.reader in DELIMITERS and large and not _is_compressed(part)


def _is_compressed(part: Part) -> bool:
    return compression_of(part.uri) is not None


def _may_be_array(part: Part) -> bool:
    try:
        with open_file(part.uri) as file:
            return opens_bracket(file)
    except OSError:  # the task that reads the file says what is wrong with it
        return False


def _group_spans(part: Part) -> Iterator[tuple[tuple[int, int], int]]:
    """Ranges of row groups with their bytes; none where the footer cannot be read."""
    try:
        with opened(part.uri) as file:
            footer = pq.read_metadata(file)
    except (OSError, pa.ArrowException):  # the task that reads the file says what is wrong with it
        return
    start = size = 0
    for group in range(footer.num_row_groups):
        columns = footer.row_group(group)
        size += sum(columns.column(i).total_compressed_size for i in range(columns.num_columns))
        if size >= CUT_BYTES or group == footer.num_row_groups - 1:
            yield (start, group + 1), size
            start, size = group + 1, 0


def _joined(parts: Iterable[Part]) -> Iterator[tuple[Part, ...]]:
    """Neighbours that fit into one task together."""
    together: list[Part] = []
    total = 0
    for part in parts:
        cost = _cost(part)
        if together and total + cost > JOIN_BYTES:
            yield tuple(together)
            together, total = [], 0
        together.append(part)
        total += cost
    if together:
        yield tuple(together)


def _cost(part: Part) -> int:
    """A part of a cut file, and a data set of unknown size, has a task of its own."""
    cut_up = part.span is not None or _is_cut_by_rows(part)
    alone = cut_up or part.reader in ("saved", "hub")
    return JOIN_BYTES if alone else max(part.size, OPEN_BYTES)
