"""A sharded piece of work: which input shards it has, which are done, and how one is committed.

Output shard k is a function of input shard k alone. Its last file is created put-if-absent and is
the commit: a shard that died half-way is done again, one that was done twice is kept once, and a
rerun of a killed driver submits only what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cwpo_dist.canonical import parquet_bytes
from cwpo_dist.pairs.records import REJECT_SCHEMA, Reject, read_rows
from cwpo_dist.scoring.retries import ShardOutput, ShardWorker
from cwpo_dist.storage import Store

# Parquet metadata of a commit file: what the shard read and wrote, and the file of its rejects.
COUNTS = b"cwpo.counts"
REJECTS = b"cwpo.rejects"
READERS = 16  # of footers at once: on object storage each takes a round trip or two


@dataclass(frozen=True)
class ShardJob:
    """A stage's sharded work.

    Attributes:
        name: the folder of its output files below `output` (`scores`, `tokens`, …).
        shards: how many input shards there are.
        make_worker: builds the worker inside an actor, or in each of the ranks that share its
            model, if it is given them; must be picklable.
        selected: the shards that it is about; None: all.
        retry: 0, or which retry of the rejects this is: its files stand beside the first ones.
        reads: the folder of its input files (`answers`, `prompts`), which rejects name.
    """

    name: str
    output: Store
    shards: int
    make_worker: Callable[..., ShardWorker[Any]]
    selected: Sequence[int] | None = None
    retry: int = 0
    reads: str = "answers"

    @property
    def indices(self) -> Sequence[int]:
        """The numbers of its shards."""
        return range(self.shards) if self.selected is None else self.selected

    def file(self, index: int) -> str:
        """The commit file of a shard."""
        return part(self.name, index, self.retry)

    def source(self, index: int) -> str:
        """The input file of a shard."""
        return part(self.reads, index)

    def missing(self) -> list[int]:
        """The shards that have no committed output yet."""
        done = set(self.output.names(self.name))
        return [index for index in self.indices if self.file(index) not in done]


def part(name: str, index: int, retry: int = 0) -> str:
    """`scores/part-00012.parquet`, or of a retry `scores/part-00012.retry-1.parquet`."""
    return f"{name}/part-{index:05d}{f'.retry-{retry}' if retry else ''}.parquet"


def commit(job: ShardJob, index: int, output: ShardOutput) -> bool:
    """Writes a shard's files, the rows last; True when this call was the first to commit.

    The file of rejects is named after its content, and the commit names it: an attempt that set
    aside other rows and died before its commit leaves a file that no commit names.

    Args:
        job: whose shard it is.
        index: of the shard.
        output: what its worker gave.

    Raises:
        StorageError: when storage refuses the write.
    """
    rows = counted(output.rows, output.counts)
    if output.rejects.num_rows:
        data = parquet_bytes(output.rejects)
        stem = job.file(index).split("/")[-1].removesuffix(".parquet")
        name = f"rejects/{stem}.{hashlib.sha256(data).hexdigest()[:8]}.parquet"
        job.output.create(name, data)
        rows = rows.replace_schema_metadata({**rows.schema.metadata, REJECTS: name.encode()})
    return job.output.create_table(job.file(index), rows)


def counted(rows: pa.Table, counts: Mapping[str, float]) -> pa.Table:
    """Rows that carry what was counted while they were made; `read_counts` finds it again."""
    return rows.replace_schema_metadata({COUNTS: json.dumps(dict(counts), sort_keys=True).encode()})


def total_counts(
    job: ShardJob, reported: Mapping[str, int] | None = None, of: Set[int] = frozenset()
) -> Counter[str]:
    """Sums the counts that committed shards carry in their Parquet footers.

    Args:
        job: whose shards are all committed.
        reported: the summed counts of some shards, where they are known already: to read a footer
            takes two round trips to object storage, so that those of a large fleet's shards would
            take longer than the shards.
        of: the shards whose counts `reported` holds.
    """
    rest = [index for index in job.indices if index not in of]
    totals = Counter(reported or {})
    for counts in _footers(job, rest):
        totals.update(counts)
    out = totals["rows"] + totals["rejects"] + totals["over_length"]
    assert totals["rows_in"] == out, (job.name, dict(totals))
    return totals


def committed_counts(job: ShardJob) -> dict[int, dict[str, int]]:
    """What each shard read and wrote; all shards must be committed."""
    return dict(zip(job.indices, _footers(job, job.indices), strict=True))


def _footers(job: ShardJob, indices: Sequence[int]) -> Iterator[dict[str, int]]:
    def read(index: int) -> dict[str, int]:
        counts: dict[str, int] = json.loads(_metadata(job.output, job.file(index))[COUNTS])
        return counts

    with ThreadPoolExecutor(READERS) as readers:
        yield from readers.map(read, indices)


def read_counts(store: Store, file: str) -> dict[str, float]:
    """What was counted while a committed file was made."""
    counts: dict[str, float] = json.loads(_metadata(store, file)[COUNTS])
    return counts


def committed_rejects(store: Store, file: str) -> list[Reject]:
    """The rows that a committed file of a shard set aside."""
    name = _metadata(store, file).get(REJECTS)
    return [] if name is None else read_rows(store, name.decode(), Reject, REJECT_SCHEMA)


def _metadata(store: Store, file: str) -> dict[bytes, bytes]:
    with store.parquet(file) as opened:
        return dict(opened.schema_arrow.metadata or {})
