"""What a source holds and nothing reads: columns and message keys, with the rows that have a value.

Rows come with the columns that are needed; of columnar files the others are counted where they lie,
by their footer or Arrow's own count of nulls, so that no image is fetched to say that it was there.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cwpo_dist.pairs.layout import EACH, not_null
from cwpo_dist.pairs.readers import DataSetError, Part, access, opened, out_of_reach
from cwpo_dist.pairs.rejects import printable
from cwpo_dist.redaction import redacted

logger = logging.getLogger(__name__)

MOST_NAMES = 200  # different names of a source; objects can have new ones in every row
OTHERS = "(others)"
SHOWN = 20  # of them that a sentence names; manifests have all
Tree = dict[str, "Tree"]


@dataclass
class Unread:
    """Rows with a value that nothing reads, by column and by message key."""

    columns: dict[str, int] = field(default_factory=dict)
    message_keys: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.columns or self.message_keys)

    def add(self, other: Unread) -> None:
        """Adds what was counted elsewhere."""
        for name, count in other.columns.items():
            _count(self.columns, name, count)
        for name, count in other.message_keys.items():
            _count(self.message_keys, name, count)

    def note(self, row: object, used: Tree) -> None:
        """Counts what a row holds beside the paths that are used."""
        if isinstance(row, Mapping):
            for name in dict.fromkeys(_beside(row, used)):  # items of a list have the same names
                _count(self.columns, name, 1)

    def note_keys(self, names: Iterable[str]) -> None:
        """Counts what a row's messages hold and nothing reads."""
        for name in names:
            _count(self.message_keys, name, 1)

    def sentences(self) -> Iterator[str]:
        """What is not read, for people."""
        for what, counts in (("columns", self.columns), ("message keys", self.message_keys)):
            listed = [f"{name} (in {n:,} rows)" for name, n in Counter(counts).most_common(SHOWN)]
            if len(counts) > SHOWN:
                listed.append(f"and {len(counts) - SHOWN} more")
            if listed:
                yield f"{what} that nothing reads: {', '.join(listed)}"


def _count(counts: dict[str, int], name: str, count: int) -> None:
    name = printable(name)
    name = name if name in counts or len(counts) < MOST_NAMES else OTHERS
    counts[name] = counts.get(name, 0) + count


def tree(paths: Iterable[str]) -> Tree:
    """The names that are used, and inside columns of which a part is, the parts."""
    used: Tree = {}
    for path in paths:
        here = used
        *outer, last = path.split(".")
        for step in outer:
            if here.get(step) == {}:
                break  # used as a whole
            here = here.setdefault(step, {})
        else:
            here[last] = {}
        used[path] = {}  # a column may have dots in its name
    return used


def _beside(row: Mapping[str, object], used: Tree, before: str = "") -> Iterator[str]:
    for name, value in row.items():
        inside = used.get(name)
        if inside == {} or not _is_value(value):
            continue
        if inside is None:
            yield f"{before}{name}"
        elif isinstance(value, Mapping):
            yield from _beside(value, inside, f"{before}{name}.")
        elif isinstance(value, list):
            for k, item in enumerate(value):
                step = EACH if EACH in inside else str(k)
                yield from _beside({step: item}, inside, f"{before}{name}.")


def _is_value(value: object) -> bool:
    return not_null(value) is not None and value != [] and value != {}


def columnar(part: Part, used: Tree, most_rows: int | None = None) -> Unread:
    """The whole columns of a columnar part that nothing reads; other parts' rows have them all.

    Args:
        part: what is read.
        used: what is used of it.
        most_rows: look at about so many rows where the footer does not say it; None: at all.

    Raises:
        SourceError: where storage refuses to be read.
    """
    if part.reader not in ("parquet", "saved"):
        return Unread()
    counts: Counter[str] = Counter()
    with access(part):
        try:
            look = _in_parquet if part.reader == "parquet" else _in_saved
            for found in look(part, used, most_rows):
                counts.update(found)
        except (OSError, pa.ArrowException, DataSetError) as error:
            if out_of_reach(error):
                raise
            why = redacted(str(error))
            logger.warning("prepare: %s: what nothing reads cannot be counted: %s", part, why)
    return Unread({name: count for name, count in counts.items() if count})


def _in_saved(part: Part, used: Tree, most_rows: int | None) -> Iterator[Mapping[str, int]]:
    from cwpo_dist.pairs import data_sets  # not above: it imports datasets

    seen = 0
    for table in data_sets.tables(part, None):
        yield _valid(table, used)
        seen += table.num_rows
        if most_rows is not None and seen >= most_rows:
            return


def _in_parquet(part: Part, used: Tree, most_rows: int | None) -> Iterator[Mapping[str, int]]:
    seen = 0
    with opened(part.uri) as file, pq.ParquetFile(file) as parquet:
        start, stop = part.span or (0, parquet.num_row_groups)
        for group in range(start, stop):
            told, untold = _by_footer(parquet, group, used)
            yield told
            for batch in parquet.iter_batches(row_groups=[group], columns=untold):
                if not untold or (most_rows is not None and seen >= most_rows):
                    break
                yield _valid(batch, used)
                seen += batch.num_rows


def _by_footer(parquet: pq.ParquetFile, group: int, used: Tree) -> tuple[dict[str, int], list[str]]:
    """Rows with a value by column, and the columns of which the footer does not say it."""
    told: dict[str, int] = {}
    untold: dict[str, None] = {}
    footer = parquet.metadata.row_group(group)
    leaves = (each.name for each in parquet.schema_arrow for _ in range(_leaves(each.type)))
    for k, name in enumerate(leaves):
        if name in used:
            continue
        leaf = footer.column(k)
        known = leaf.is_stats_set and leaf.statistics.has_null_count
        if parquet.schema.column(k).max_repetition_level or not known:
            untold[name] = None
        else:
            told[name] = max(told.get(name, 0), footer.num_rows - leaf.statistics.null_count)
    return {name: n for name, n in told.items() if name not in untold}, list(untold)


def _leaves(kind: pa.DataType) -> int:
    """How many of a file's columns a type takes."""
    if isinstance(kind, pa.BaseExtensionType):
        return _leaves(kind.storage_type)
    return sum(_leaves(kind.field(k).type) for k in range(kind.num_fields)) or 1


def _valid(rows: pa.Table | pa.RecordBatch, used: Tree) -> dict[str, int]:
    """Rows with a value, by column that nothing reads."""
    names = [(k, name) for k, name in enumerate(rows.schema.names) if name not in used]
    return {name: rows.num_rows - _nulls(rows.column(k)) for k, name in names}


def _nulls(column: pa.Array | pa.ChunkedArray) -> int:
    """Nulls of a column, and its empty lists, which say as little."""
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return int(column.null_count)
    return int(column.null_count) + (pc.sum(pc.equal(pc.list_value_length(column), 0)).as_py() or 0)
