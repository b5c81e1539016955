"""pairs, annotator → scores: a raw score for each answer, kept apart from any weighting."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from cwpo_dist.config import ConfigError, ModelConfig
from cwpo_dist.scoring.pipeline import ShardJob, committed_rejects, part, run_shards, total_counts
from cwpo_dist.scoring.scorers import OVER_LENGTH, RewardWorker
from cwpo_dist.stages.context import Context, score_files, trained
from cwpo_dist.stages.graph import Node
from cwpo_dist.storage import Store

logger = logging.getLogger(__name__)


class RejectsError(ValueError):
    """More rows were set aside than `max_reject_fraction` allows."""


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `scores/part-*.parquet` and returns the counts.

    Raises:
        RejectsError: when more rows than `annotate.max_reject_fraction` have no finite score.
    """
    config = context.config.annotate
    job = _job(context, node)
    counts = run_shards(job, config)
    counts.update(_retried_counts(context, node))
    allowed = config.max_reject_fraction * counts["rows_in"]
    if counts["rejects"] > allowed:
        raise RejectsError(
            f"annotate: {counts['rejects']} of {counts['rows_in']} pairs have no finite score, "
            f"more than annotate.max_reject_fraction {config.max_reject_fraction} allows; see "
            f"{job.output.uri}/rejects, mend the model and give --retry-rejects, or raise the "
            "fraction"
        )
    logger.info(
        "annotate: %d pairs scored, %d set aside, %d too long; %s/scores has score_a and score_b, "
        "to be joined by pair_id with response_a and response_b of %s/pairs",
        *(counts["rows"], counts["rejects"], counts["over_length"], job.output.uri),
        context.pairs(node).store.uri,
    )
    return dict(counts) | {"annotator": _name(context, node)}


def retry(context: Context, node: Node) -> dict[str, Any] | None:
    """Scores again the pairs that were set aside for another reason than their length.

    What a retry scores goes into files of its own, `scores/part-00012.retry-1.parquet`, one a shard
    that has such pairs; what was committed before stays as it is. Readers read the files of those
    retries that were committed (by `manifest.retry-N.json`, by the caller) when their stage's key
    was made. The key of `annotate` stays, as settings and inputs do; the keys of all that reads the
    scores change with each retry, so what was made of the earlier scores is made anew beside it.

    Returns:
        The counts of all scores with those of this retry; None when there was nothing to retry.
    """
    first = _job(context, node)
    if first.missing():
        logger.info("annotate: not all pairs were scored yet, so none is scored again")
        return None
    number = node.retries + 1
    aside = [i for i in range(first.shards) if _set_aside(first.output, node.retries, i)]
    if not aside:
        logger.info("annotate: nothing was set aside but for its length")
        return None
    run_shards(_job(context, node, number, aside), context.config.annotate)
    counts = total_counts(first)
    counts.update(_retried_counts(context, replace(node, retries=number)))
    return dict(counts)


def _job(
    context: Context, node: Node, retry: int = 0, only: Sequence[int] | None = None
) -> ShardJob:
    """The scoring of all pairs, or of those that the retries before `retry` left aside."""
    output, pairs = context.place(node), context.pairs(node)
    if retry:
        pairs = replace(pairs, only=partial(_set_aside, output, retry - 1))
    model, budget = annotator(context, node), context.config.annotate.max_tokens_per_batch
    return ShardJob(
        name="scores",
        output=output,
        shards=context.shards(node),
        make_worker=partial(RewardWorker, pairs, model, _name(context, node), budget),
        only=only,
        retry=retry,
    )


def _name(context: Context, node: Node) -> str:
    """What the column `annotator` holds."""
    if "fit" in node.inputs:
        return f"fit/{node.inputs['fit'].key}"
    return annotator(context, node).model_name_or_path.rstrip("/").rsplit("/", 1)[-1]


def _set_aside(output: Store, retries: int, index: int) -> frozenset[str]:
    """The ids of a shard's pairs that have no score after so many retries, but fit."""
    last = score_files(output, index, retries)[-1]
    rejects = committed_rejects(output, last)
    return frozenset(row["row"] for row in rejects if row["reason"] != OVER_LENGTH)


def _retried_counts(context: Context, node: Node) -> Counter[str]:
    """What the retries add to the counts: each row that they score was set aside before."""
    totals: Counter[str] = Counter()
    names = set(context.place(node).names("scores")) if node.retries else set()
    for number in range(1, node.retries + 1):
        shards = range(context.shards(node))
        only = [i for i in shards if part("scores", i, number) in names]
        totals.update(total_counts(_job(context, node, number, only)))
        totals["rejects"] -= totals.pop("rows_in")
    return totals


def annotator(context: Context, node: Node) -> ModelConfig:
    """The given reward model, or the one that `fit` made."""
    if context.config.annotate.model is not None:
        return context.config.annotate.model
    if context.config.weak is None:
        raise ConfigError("weak: missing; give weak.model_name_or_path or annotate.model")
    return trained(context.config.weak, context.place(node.inputs["fit"]))
