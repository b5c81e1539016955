"""Numbered shards in, one committed output file a shard out, over a pool of Ray Data actors.

Output shard k is a function of input shard k alone. Its last file is created put-if-absent and is
the commit: a shard that died half-way is done again, one that was done twice is kept once, and a
rerun of a killed driver submits only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy

from cwpo_dist.config import ConfigError, PoolConfig
from cwpo_dist.scoring.attempts import ShardOutput, ShardWorker, attempt
from cwpo_dist.storage import Store, parquet_bytes

logger = logging.getLogger(__name__)

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
        make_worker: builds the worker inside an actor; must be picklable.
        only: the shards that it is about; None: all.
        retry: 0, or which retry of the rejects this is: its files stand beside the first ones.
    """

    name: str
    output: Store
    shards: int
    make_worker: Callable[[], ShardWorker]
    only: Sequence[int] | None = None
    retry: int = 0

    @property
    def indices(self) -> Sequence[int]:
        """The numbers of its shards."""
        return range(self.shards) if self.only is None else self.only

    def file(self, index: int) -> str:
        """The commit file of a shard."""
        return part(self.name, index, self.retry)

    def missing(self) -> list[int]:
        """The shards that have no committed output yet."""
        done = set(self.output.names(self.name))
        return [index for index in self.indices if self.file(index) not in done]


def part(name: str, index: int, retry: int = 0) -> str:
    """`scores/part-00012.parquet`, or of a retry `scores/part-00012.retry-1.parquet`."""
    return f"{name}/part-{index:05d}{f'.retry-{retry}' if retry else ''}.parquet"


class _ShardActor:
    """Ray Data's view of a worker: a batch of shard numbers in, one line of progress out."""

    def __init__(self, job: ShardJob) -> None:
        self.job = job
        self.worker = job.make_worker()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        started = time.perf_counter()
        index = int(batch["shard"][0])
        if not self.job.output.exists(self.job.file(index)):
            commit(self.job, index, attempt(self.worker, index, part("pairs", index)))
        return {"shard": [index], "seconds": [time.perf_counter() - started]}


def commit(job: ShardJob, index: int, output: ShardOutput) -> bool:
    """Writes a shard's files, the rows last; True when this call was the first to commit.

    The file of rejects is named after its content, and the commit names it: an attempt that set
    aside other rows and died before its commit leaves a file that no commit names.
    """
    metadata = {COUNTS: json.dumps(dict(output.counts), sort_keys=True).encode()}
    if output.rejects.num_rows:
        data = parquet_bytes(output.rejects)
        stem = job.file(index).split("/")[-1].removesuffix(".parquet")
        name = f"rejects/{stem}.{hashlib.sha256(data).hexdigest()[:8]}.parquet"
        job.output.create(name, data)
        metadata[REJECTS] = name.encode()
    return job.output.create_table(job.file(index), output.rows.replace_schema_metadata(metadata))


def run_shards(job: ShardJob, pool: PoolConfig) -> Counter[str]:
    """Runs the missing shards and returns the counts summed over all shards.

    Raises:
        ConfigError: when an actor of the pool can never be placed on the cluster.
    """
    missing = job.missing()
    logger.info("%s: %d of %d shards to do", job.name, len(missing), len(job.indices))
    if missing:
        check_placement(pool, job.name)
        _run_missing(job, missing, pool)
    return total_counts(job)


def _run_missing(job: ShardJob, missing: list[int], pool: PoolConfig) -> None:
    actors = min(pool.num_actors, len(missing))
    shards = ray.data.from_items([{"shard": i} for i in missing], override_num_blocks=len(missing))
    results = shards.map_batches(
        _ShardActor,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ActorPoolStrategy(
            min_size=1,  # start with what fits; all of them where there is room
            max_size=actors,
            initial_size=actors,
            max_tasks_in_flight_per_actor=2,  # one at work, one waiting: no tail behind one actor
        ),
        num_cpus=pool.cpus_per_actor,
        num_gpus=pool.gpus_per_actor or None,
    )
    started = time.perf_counter()
    for done, row in enumerate(results.iter_rows(), start=1):
        rate = done / (time.perf_counter() - started)
        logger.info(
            "%s: shard %d done, %d/%d, about %.0f s left",
            *(job.name, row["shard"], done, len(missing), (len(missing) - done) / rate),
        )


def check_placement(pool: PoolConfig, name: str) -> None:
    """Refuses an actor that fits on no node: Ray would wait for it for ever, silently.

    Raises:
        ConfigError: naming what is asked for and what the largest node has.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for field, resource in (("cpus_per_actor", "CPU"), ("gpus_per_actor", "GPU")):
        wanted = getattr(pool, field)
        largest = max((float(node.get(resource, 0.0)) for node in nodes), default=0.0)
        if wanted > largest:
            raise ConfigError(
                f"{name}: {field} is {wanted:g}, but the largest node has {largest:g} {resource}: "
                "such an actor can never be placed; lower it or add a larger node"
            )


def total_counts(job: ShardJob) -> Counter[str]:
    """Sums the counts that committed shards carry in their Parquet footers."""
    totals: Counter[str] = Counter()
    for counts in committed_counts(job).values():
        totals.update(counts)
    out = totals["rows"] + totals["rejects"] + totals["over_length"]
    assert totals["rows_in"] == out, (job.name, dict(totals))
    return totals


def committed_counts(job: ShardJob) -> dict[int, dict[str, int]]:
    """What each shard read and wrote; all shards must be committed."""

    def read(index: int) -> dict[str, int]:
        counts: dict[str, int] = json.loads(_metadata(job.output, job.file(index))[COUNTS])
        return counts

    with ThreadPoolExecutor(READERS) as readers:
        return dict(zip(job.indices, readers.map(read, job.indices), strict=True))


def committed_rejects(store: Store, file: str) -> list[dict[str, Any]]:
    """The rows that a committed file of a shard set aside."""
    name = _metadata(store, file).get(REJECTS)
    rows: list[dict[str, Any]] = [] if name is None else store.read_table(name.decode()).to_pylist()
    return rows


def _metadata(store: Store, file: str) -> dict[bytes, bytes]:
    with store.filesystem.open(store.path(file), "rb") as opened:
        return dict(pq.ParquetFile(opened).schema_arrow.metadata or {})
