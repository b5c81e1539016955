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

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from cwpo_dist.pairs.pieces import Piece
from cwpo_dist.pairs.readers import COMPRESSIONS, Part, SourceError

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


def count_lines(part: Part) -> int:
    """How many lines begin in a span of JSON lines.

    Raises:
        SourceError: when its storage refuses to be read.
    """
    assert part.span is not None
    start, stop = part.span
    at, count = (start - 1, 0) if start else (0, 1)  # a line begins behind the newline before it
    try:
        with fsspec.open(part.uri, "rb") as file:
            file.seek(at)
            while data := file.read(min(_READ_BYTES, stop - 1 - at)):
                count += data.count(b"\n")
                at += len(data)
    except OSError as error:
        raise SourceError(f"{part}: cannot be read: {error}; mend the access to it") from error
    return count


def is_numbered(piece: Piece) -> bool:
    """False for a piece whose first line number must be counted from the spans before it."""
    return not any(part.reader == "jsonl" and part.span for part in piece.parts)


def number_lines(pieces: Sequence[Piece], lines: Iterable[int]) -> list[Piece]:
    """Sets the first line number of each span of JSON lines, from the line counts of all spans."""
    counts, out = iter(lines), []
    first: dict[str, int] = {}
    for piece in pieces:
        if is_numbered(piece):
            out.append(piece)
            continue
        (part,) = piece.parts
        out.append(replace(piece, parts=(replace(part, first=first.get(part.uri, 1)),)))
        first[part.uri] = first.get(part.uri, 1) + next(counts)
    return out


def _cut_part(part: Part) -> list[Part]:
    if part.size <= CUT_BYTES or part.reader in ("saved", "hub"):
        return [part]
    if part.reader == "parquet":
        return [replace(part, span=span, size=size) for span, size in _group_spans(part)] or [part]
    if part.reader == "jsonl" and not part.uri.lower().endswith(COMPRESSIONS):
        bounds = [*range(0, part.size, CUT_BYTES), part.size]
        spans = itertools.pairwise(bounds)
        return [replace(part, span=(a, b), size=b - a) for a, b in spans]
    logger.info(
        "prepare: %s (%d MB) is read by one task: compressed files cannot be cut, nor CSV and JSON "
        "arrays, whose rows may hold line breaks; Parquet and plain JSON lines can",
        *(part, part.size >> 20),
    )
    return [part]


def _group_spans(part: Part) -> Iterator[tuple[tuple[int, int], int]]:
    """Ranges of row groups with their bytes; none where the footer cannot be read."""
    try:
        with fsspec.open(part.uri, "rb") as file:
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
    alone = part.span is not None or part.reader in ("saved", "hub")
    return JOIN_BYTES if alone else max(part.size, OPEN_BYTES)
