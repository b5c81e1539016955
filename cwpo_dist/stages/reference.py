"""tokens, frozen policy → the summed log-probability of each answer, once."""

from __future__ import annotations

from functools import partial
from typing import Any

from cwpo_dist.scoring.pipeline import ShardJob
from cwpo_dist.scoring.run import run_shards
from cwpo_dist.scoring.scorers import ReferenceWorker
from cwpo_dist.stages.context import Context, policy_of
from cwpo_dist.stages.graph import Node


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `reference/part-*.parquet` and returns the counts."""
    config = context.config.reference
    job = ShardJob(
        name="reference",
        output=context.place(node),
        shards=context.shards(node),
        make_worker=partial(
            ReferenceWorker,
            context.pairs(node),
            context.place(node.inputs["tokens"]),
            policy_of(context, node),
            config.max_tokens_per_batch,
        ),
    )
    return run_shards(job, config)
