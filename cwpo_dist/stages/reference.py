"""tokens, frozen policy → the summed log-probability of each answer, once."""

from __future__ import annotations

from functools import partial
from typing import Any

from cwpo_dist.runs.context import Context, policy_of
from cwpo_dist.runs.graph import Node
from cwpo_dist.scoring.driver import run_shards
from cwpo_dist.scoring.pipeline import ShardJob, total_counts
from cwpo_dist.scoring.scorers import ReferenceWorker
from cwpo_dist.scoring.sharded import Together
from cwpo_dist.training.group import FrozenSpec, apply_frozen


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `reference/part-*.parquet` and returns the counts."""
    config, policy = context.config.reference, policy_of(context, node)
    make_worker = partial(
        ReferenceWorker,
        context.pairs(node),
        context.place(node.inputs["tokens"]),
        policy,
        config.max_tokens_per_batch,
    )
    job = ShardJob("reference", context.place(node), context.shards(node), make_worker)
    if not config.sharded:
        return run_shards(job, config)
    work = Together(job, make_worker)
    if job.missing():
        apply_frozen(FrozenSpec("reference", job.output, context.config.align, policy, work))
    return dict(total_counts(job))
