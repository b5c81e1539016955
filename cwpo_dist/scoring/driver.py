"""A sharded job, and a stage's pools, in; every shard committed; counts and throughput out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from cwpo_dist.config import ConfigError, PoolConfig
from cwpo_dist.placement import alive_machines, pool_faults
from cwpo_dist.scoring.device_time import Held
from cwpo_dist.scoring.pipeline import ShardJob, commit, total_counts
from cwpo_dist.scoring.pool import run_pools
from cwpo_dist.scoring.progress import Progress
from cwpo_dist.scoring.retries import attempt
from cwpo_dist.scoring.tickets import Broken

logger = logging.getLogger(__name__)


def run_shards(
    job: ShardJob,
    config: PoolConfig,
    check: Callable[[Mapping[str, int]], None] | None = None,
) -> dict[str, Any]:
    """Runs the missing shards.

    Args:
        job: what is to be done.
        config: by which pools.
        check: gets what this run has counted so far; what it raises ends it.

    Returns:
        The counts summed over all shards, and under `throughput` what this run did in what time.

    Counts:
        rows_in: answers (of `generate` prompts) that were read; rows_in = rows + rejects +
            over_length.
        rows: those with a number, tokens or an answer.
        rejects: those that were set aside; `rejects: …` of one reason.
        over_length: those longer than `max_length`, left out.
        alike, alike_when_cut: pairs whose answers are the same tokens, as they are or once cut.
        reused: of `annotate` and `reference`, numbers that were copied from other outputs.
        tokens: that were read, prompts that were repeated among them.
        padded_tokens: the same with padding.
        flops: useful floating-point operations, which count a prompt once.
        annotator: of `annotate`, what its column of that name holds.
        throughput: what the last command did, below.

    Raises:
        ConfigError: when a pool can never be placed on the cluster.
        ShardError: when a shard cannot be done.
    """
    missing = job.missing()
    done = len(job.indices) - len(missing)
    logger.info("%s: %d of %d shards to do", job.name, len(missing), len(job.indices))
    throughput = {}
    counts: Counter[str] = Counter()
    counted: set[int] = set()
    held, broken = Held(job.output, job.name), Broken()
    if missing:
        faults = [f"{job.name}: {fault}" for fault in pool_faults("", config, alive_machines())]
        if faults:
            raise ConfigError("\n".join(faults))
        with Progress(job.name, len(job.indices), done, config.actor_pools()) as progress:
            try:
                while missing:
                    for report in run_pools(job, missing, config.actor_pools(), broken):
                        progress.add(report)
                        held.note(progress)
                        if report.counts:  # else another had committed the shard
                            counts.update(report.counts)
                            counted.add(report.shard)
                        if check is not None:
                            check(progress.counts)
                    missing = job.missing()
            finally:
                held.note(progress, now=True)
        logger.info("%s: %s", job.name, progress.summary())
        throughput = {"throughput": progress.throughput()}
    return dict(total_counts(job, counts, counted)) | throughput


def run_here(job: ShardJob) -> dict[str, int]:
    """Runs the missing shards in this process, for work that takes less than an actor's start.

    Returns:
        The counts summed over all shards.

    Raises:
        ShardError: when a shard cannot be done.
    """
    missing = job.missing()
    logger.info("%s: %d of %d shards to do, here", job.name, len(missing), len(job.indices))
    if missing:
        worker = job.make_worker()
        for index in missing:
            commit(job, index, attempt(worker, index, job.source(index)))
    return dict(total_counts(job))
