"""A source's parts behind its first rows in; a few of their rows, and what was not looked at, out.

The first rows tell how all are read, and other files, or the end of a long one, may have columns
that they lack. Files are opened at places that lie evenly spread, so many at most, however many
there are; where they lie depends on the parts alone, so that whoever looks decides alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from cwpo_dist.pairs.layout import cell
from cwpo_dist.pairs.readers import (
    Part,
    RawRow,
    Reader,
    access,
    compression_of,
    opened,
    out_of_reach,
    read,
)

MOST_LOOKS, FEW_ROWS = 32, 20
_PLACES = 8  # within a file, at most
_TAIL_BYTES = 2**16
_ARRAY_BYTES = 8 * 2**20  # an array is read as a whole
# What is read to find a column that the configuration names.
_SEARCHED_BYTES, _SEARCHED_FILES = 128 * 2**20, 256
_PACKED = 4  # text is about so much longer than its compressed file
# Their columns are named in one place; of the last two in one for all parts.
_NAMED: frozenset[Reader] = frozenset(("csv", "tsv", "parquet", "arrow", "saved", "hub"))
_ONCE: frozenset[Reader] = frozenset(("saved", "hub"))


@dataclass(frozen=True)
class Rest:
    """What of a source was not looked at.

    Attributes:
        parts: in which columns may stand that were not seen.
    """

    parts: tuple[Part, ...] = ()

    def may_have(self, path: str) -> bool:
        """Whether a column, or a value at a path, is there; True where that is too much to read."""
        return bool(self.parts) and (self._is_long or any(_may_have(p, path) for p in self.parts))

    @property
    def _is_long(self) -> bool:
        if len(self.parts) > _SEARCHED_FILES or not all(part.size for part in self.parts):
            return True
        lines = [part for part in self.parts if part.reader not in _NAMED]
        size = sum(part.size * (_PACKED if compression_of(part.uri) else 1) for part in lines)
        return size > _SEARCHED_BYTES


def _may_have(part: Part, path: str) -> bool:
    """Whether a part has it; where columns are named in one place, its outermost one is enough."""
    if part.reader not in _NAMED:
        return any(isinstance(raw.value, Mapping) and has(raw.value, path) for raw in read(part))
    if part.reader == "parquet":
        names = _columns(part)
    else:
        raw = next(iter(read(part)), None)
        names = [*raw.value] if raw is not None and isinstance(raw.value, Mapping) else []
    return path in names or path.partition(".")[0] in names


def has(row: Mapping[str, object], path: str) -> bool:
    """Whether a row has such a column, or a value at such a path."""
    return path in row or cell(row, path) is not None


def look(
    parts: Sequence[Part], n_opened: int, *, ended: bool, known: set[str]
) -> tuple[Iterator[RawRow], Rest]:
    """A few rows of the parts behind the first rows, which are read when they are asked for.

    Args:
        parts: all of the source.
        n_opened: how many of them gave the first rows.
        ended: whether the last of these was read to its end.
        known: the columns of the first rows, beside which a Parquet file need have no others.
    """
    begun = [] if ended else [part for part in parts[:n_opened][-1:] if part.reader not in _NAMED]
    behind = [part for part in parts[n_opened:] if part.reader not in _ONCE]
    places = _places(begun, behind)
    rows = (raw for place in places for raw in _few(place, known))
    seen = {place.uri for place in places if place.reader in _NAMED}
    rest = tuple(part for part in behind if part.uri not in seen)
    return rows, Rest((*begun, *rest))


def _places(begun: Sequence[Part], behind: Sequence[Part]) -> list[Part]:
    """Where rows are looked at: at the head of files, and of plain JSON lines also within them."""
    count = len(begun) + len(behind)
    if count > MOST_LOOKS:
        last = MOST_LOOKS - 1
        behind = [behind[k * (len(behind) - 1) // last] for k in range(MOST_LOOKS)]
    room = min(_PLACES, max(1, MOST_LOOKS // max(1, count)))
    within = [place for part in begun for place in _within(part, room)[1:]]
    return [*within, *(place for part in behind for place in _within(part, room))]


def _within(part: Part, room: int) -> list[Part]:
    if part.reader != "jsonl" or compression_of(part.uri):
        return [part]
    starts = [0]
    if room > 1 and part.size > _TAIL_BYTES:
        starts = [k * part.size // (room - 1) for k in range(room - 1)]
        starts.append(part.size - _TAIL_BYTES)
    return [replace(part, span=(start, part.size)) for start in starts]


def _few(place: Part, known: set[str]) -> list[RawRow]:
    if place.reader == "json" and place.size > _ARRAY_BYTES:
        return []
    if place.reader == "parquet" and known.issuperset(_columns(place)):
        return []  # without its rows, which may hold images
    return list(itertools.islice(read(place), FEW_ROWS))


def _columns(part: Part) -> list[str]:
    """The columns of a Parquet file; of a damaged one none."""
    with access(part):
        try:
            with opened(part.uri) as file:
                return list(pq.read_schema(file).names)
        except (OSError, pa.ArrowException) as error:
            if out_of_reach(error):
                raise
            return []
