"""pairs → tokens, once: what `sft`, `reference`, `align` and `generate` read."""

from __future__ import annotations

from functools import partial
from typing import Any

from cwpo_dist.config import PoolConfig
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.graph import Node
from cwpo_dist.scoring.driver import run_here, run_shards
from cwpo_dist.scoring.pipeline import ShardJob
from cwpo_dist.scoring.scorers import TokenWorker
from cwpo_dist.scoring.set_aside import refuse_none, refuse_past

FEW_PAIRS = 2000  # a second or two; an actor takes longer to start


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `tokens/part-*.parquet` and returns the counts.

    Raises:
        RejectsError: when the policy cannot read more pairs than `prepare.max_reject_fraction`.
    """
    policy = context.config.policy
    assert policy is not None, "graph() makes no tokens node without a policy"
    job = ShardJob(
        name="tokens",
        output=context.place(node),
        shards=context.shards(node),
        make_worker=partial(TokenWorker, context.pairs(node), policy),
    )
    pairs = context.counts(node.inputs["prepare"])["pairs"]
    field, fraction = "prepare.max_reject_fraction", context.config.prepare.max_reject_fraction
    check = partial(refuse_past, "tokens", field, fraction, pairs, job.output)
    if pairs <= FEW_PAIRS:
        counts = run_here(job)
    else:
        # Tokenising needs no accelerator; as many actors as the reference pass has.
        pool = PoolConfig(num_actors=context.config.reference.most_actors)
        counts = run_shards(job, pool, check)
    check(counts)
    refuse_none("tokens", policy, counts)
    return counts
