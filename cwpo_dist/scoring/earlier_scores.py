"""Scores that an annotator gave before in; a worker that leaves only the other pairs to it out.

A pair's id is its content, so what one annotator said of it in an earlier output of the same run
directory holds for a later one. Pair files are sorted by id: a shard asks only the score files
whose range of ids it overlaps, so nothing has to fit into memory but those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic

import pyarrow as pa
import pyarrow.compute as pc

from cwpo_dist.pairs.records import SCORE_SCHEMA
from cwpo_dist.scoring.retries import Input, ShardOutput, ShardWorker, T
from cwpo_dist.storage import Store

SCORES = "scores"
_FOOTERS_AT_ONCE = 32


@dataclass(frozen=True)
class ScoreFile:
    """A committed file of scores, and the first and last pair id in it."""

    store: Store
    name: str
    first: str
    last: str

    def rows(self, ids: pa.Array) -> pa.Table:
        """The scores of those of the pairs that it holds."""
        table = self.store.read_table(self.name, SCORE_SCHEMA.names)
        found = table.filter(pc.is_in(table["pair_id"], value_set=ids))
        return found.replace_schema_metadata(None)


def ranged_files(outputs: Iterable[Store]) -> tuple[ScoreFile, ...]:
    """The committed files of outputs of `annotate`, finished or not, with rows in them."""
    named = [(store, name) for store in outputs for name in store.names(SCORES)]
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as threads:  # each footer is a wait for storage
        found = threads.map(_ranged, named)
    return tuple(file for files in found for file in files)


def _ranged(named: tuple[Store, str]) -> list[ScoreFile]:
    store, name = named
    with store.parquet(name) as file:
        footer = file.metadata
    column = footer.schema.names.index("pair_id")
    groups = range(footer.num_row_groups if footer.num_rows else 0)
    ranges = [footer.row_group(group).column(column).statistics for group in groups]
    if not ranges:
        return []
    first, last = min(each.min for each in ranges), max(each.max for each in ranges)
    return [ScoreFile(store, name, first, last)]


@dataclass(frozen=True)
class EarlierScores:
    """Looks up scores by pair id.

    Attributes:
        files: where they lie; of two that hold a pair the earlier in this tuple counts.
    """

    files: Sequence[ScoreFile]

    def of(self, ids: Sequence[str]) -> pa.Table:
        """The rows of SCORE_SCHEMA that there are for these pairs, one a pair."""
        left = pa.array(ids, pa.string())
        tables = [SCORE_SCHEMA.empty_table()]
        for file in self._overlapping(ids):
            if not len(left):
                break
            tables.append(file.rows(left))
            known = tables[-1]["pair_id"].combine_chunks()
            left = left.filter(pc.invert(pc.is_in(left, value_set=known)))
        return pa.concat_tables(tables)

    def _overlapping(self, ids: Sequence[str]) -> Iterator[ScoreFile]:
        if not ids:
            return
        first, last = min(ids), max(ids)
        yield from (file for file in self.files if file.first <= last and first <= file.last)


class NewPairsWorker(Generic[T]):
    """Copies the scores that there are, and scores the other pairs of a shard."""

    def __init__(self, earlier: EarlierScores, make_worker: Callable[[], ShardWorker[T]]) -> None:
        self.earlier, self.worker = earlier, make_worker()

    def read(self, index: int) -> Sequence[Input[T]]:
        """All pairs of the shard."""
        return self.worker.read(index)

    def __call__(self, index: int, rows: Sequence[Input[T]]) -> ShardOutput:
        """The scores of all pairs, in the order of their ids; `reused` counts the copied ones."""
        copied = self.earlier.of([row.pair_id for row in rows])
        known = set(copied["pair_id"].to_pylist())
        output = self.worker(index, [row for row in rows if row.pair_id not in known])
        table = pa.concat_tables([copied, output.rows]).sort_by("pair_id")
        counts = Counter(output.counts)
        counts.update({"rows_in": len(known), "rows": len(known), "reused": len(known)})
        return ShardOutput(table, output.rejects, dict(counts))
