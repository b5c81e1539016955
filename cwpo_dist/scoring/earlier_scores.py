"""Scores that a model gave before in; a worker that leaves only the other answers to it out.

What an annotator or a policy says of an answer is a score here: a reward, or a log-probability. An
answer's id is its content, so what one model gave it in an earlier output of the same run directory
holds for a later one: new pairs of old answers cost nothing. Files are sorted by id: a shard asks
only the files whose range of ids it overlaps, so nothing has to fit into memory but those.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cwpo_dist.pairs.records import HEADS_SCHEMA, LOG_PROB_SCHEMA, SCORE_SCHEMA, read_records
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.forward import Ranks
from cwpo_dist.scoring.retries import Input, ShardOutput, ShardWorker
from cwpo_dist.scoring.set_aside import ALIKE, ALIKE_WHEN_CUT, SetAside, without_pairs
from cwpo_dist.storage import StorageError, Store

logger = logging.getLogger(__name__)

_FOOTERS_AT_ONCE = 32


@dataclass(frozen=True)
class ScoreFile:
    """A committed file of scores, its columns, and the first and last answer id in it."""

    store: Store
    name: str
    schema: pa.Schema
    first: str
    last: str

    def rows(self, ids: pa.Array) -> pa.Table:
        """The scores of those of the answers that it holds."""
        table = read_records(self.store, self.name, self.schema)
        found = table.filter(pc.is_in(table["answer_id"], value_set=ids))
        return found.replace_schema_metadata(None)


def ranged_files(outputs: Iterable[Store], folder: str) -> tuple[ScoreFile, ...]:
    """The committed files in a folder of outputs, finished or not, with rows in them."""
    named = [(store, name) for store in outputs for name in store.names(folder)]
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as threads:  # each footer is a wait for storage
        found = threads.map(_ranged, named)
    return tuple(file for files in found for file in files)


def _ranged(named: tuple[Store, str]) -> list[ScoreFile]:
    store, name = named
    try:
        with store.parquet(name) as file:
            footer = file.metadata
    except StorageError as error:  # what is copied saves time, no more: it is computed
        logger.warning("%s: nothing is copied from it: %s", store.uri, error)
        return []
    column = footer.schema.names.index("answer_id")
    groups = range(footer.num_row_groups if footer.num_rows else 0)
    ranges = [footer.row_group(group).column(column).statistics for group in groups]
    if not ranges:
        return []
    first, last = min(each.min for each in ranges), max(each.max for each in ranges)
    return [ScoreFile(store, name, _schema(footer.schema.to_arrow_schema().names), first, last)]


def _schema(columns: Sequence[str]) -> pa.Schema:
    if "logp" in columns:
        return LOG_PROB_SCHEMA
    return HEADS_SCHEMA if "heads" in columns else SCORE_SCHEMA


@dataclass(frozen=True)
class EarlierScores:
    """Looks up scores by answer id.

    Attributes:
        files: where they lie; of two that hold an answer the earlier in this tuple counts.
    """

    files: Sequence[ScoreFile]

    def of(self, ids: Sequence[str]) -> pa.Table:
        """The rows that there are for these answers, one each; one model's have one schema."""
        left = pa.array(ids, pa.string())
        schema = self.files[0].schema if self.files else SCORE_SCHEMA
        tables = [schema.empty_table()]
        for file in self._overlapping(ids):
            if not len(left):
                break
            tables.append(file.rows(left))
            known = tables[-1]["answer_id"].combine_chunks()
            left = left.filter(pc.invert(pc.is_in(left, value_set=known)))
        return pa.concat_tables(tables)

    def _overlapping(self, ids: Sequence[str]) -> Iterator[ScoreFile]:
        if not ids:
            return
        first, last = min(ids), max(ids)
        yield from (file for file in self.files if file.first <= last and first <= file.last)


class NewAnswersWorker:
    """Copies the scores that there are, and scores the other answers of a shard."""

    def __init__(
        self,
        earlier: EarlierScores,
        answers: AnswersIn,
        make_worker: Callable[..., ShardWorker[Any]],
        *ranks: Ranks,
    ) -> None:
        """Makes the worker, around ranks where it is given them; it reads the same answers."""
        self.earlier, self.answers, self.worker = earlier, answers, make_worker(*ranks)

    def read(self, index: int) -> Sequence[Input[Any]]:
        """All answers of the shard that the model can read."""
        return self.worker.read(index)

    def __call__(self, index: int, rows: Sequence[Input[Any]]) -> ShardOutput:
        """The scores of all answers, in the order of their ids; `reused` counts the copied ones.

        Which pairs are alike is found of all of them, as if they had been scored together.
        """
        copied = self.earlier.of([row.name for row in rows])
        known = set(copied["answer_id"].to_pylist())
        output = self.worker(index, [row for row in rows if row.name not in known])
        table = pa.concat_tables([copied, output.rows]).sort_by("answer_id")
        counts = Counter(output.counts)
        counts.update({"rows_in": len(known), "rows": len(known), "reused": len(known)})
        alike = SetAside(index)
        columns = (table[name].to_pylist() for name in ("answer_id", "tokens_hash"))
        hashes = dict(zip(*columns, strict=True))
        self.answers.set_alike_aside(index, hashes, alike)
        rejects = pa.concat_tables([without_pairs(output.rejects), alike.table()])
        pairs = {name: alike.counts()[name] for name in (ALIKE, ALIKE_WHEN_CUT)}
        return ShardOutput(table, rejects, counts | pairs)
