"""pairs, annotator → scores: a raw score for each answer, kept apart from any weighting."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from cwpo_dist.config import ModelConfig
from cwpo_dist.scoring.pipeline import ShardJob, run_shards
from cwpo_dist.scoring.scorers import RewardWorker
from cwpo_dist.stages.context import Context, trained
from cwpo_dist.stages.graph import Node, ready_model

logger = logging.getLogger(__name__)


class RejectsError(ValueError):
    """More rows were set aside than `max_reject_fraction` allows."""


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `scores/part-*.parquet` and returns the counts.

    Raises:
        RejectsError: when more rows than `annotate.max_reject_fraction` have no finite score.
    """
    config = context.config.annotate
    model = annotator(context, node)
    name = f"{model.model_name_or_path.rstrip('/').rsplit('/', 1)[-1]}"
    if "fit" in node.inputs:
        name = f"fit/{node.inputs['fit'].key}"
    job = ShardJob(
        name="scores",
        output=context.place(node),
        shards=context.shards(node),
        make_worker=partial(
            RewardWorker, context.pairs(node), model, name, config.max_tokens_per_batch
        ),
    )
    counts = dict(run_shards(job, config))
    allowed = config.max_reject_fraction * counts["rows_in"]
    if counts["rejects"] > allowed:
        raise RejectsError(
            f"annotate: {counts['rejects']} of {counts['rows_in']} pairs have no finite score, "
            f"more than annotate.max_reject_fraction {config.max_reject_fraction} allows; see "
            f"{job.output.uri}/rejects, mend the model or raise the fraction"
        )
    logger.info(
        "annotate: %d pairs scored, %d set aside, %d too long; %s/scores has score_a and score_b, "
        "to be joined by pair_id with response_a and response_b of %s/pairs",
        *(counts["rows"], counts["rejects"], counts["over_length"], job.output.uri),
        context.pairs(node).store.uri,
    )
    return counts | {"annotator": name}


def annotator(context: Context, node: Node) -> ModelConfig:
    """The given reward model that the node stands for, or the one that its `fit` made."""
    if "fit" not in node.inputs:
        return ready_model(context.config, node)[1]
    assert context.config.weak is not None, "graph() makes no fit node without a weak model"
    return trained(context.config.weak, context.place(node.inputs["fit"]))
