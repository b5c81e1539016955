"""pairs, annotator → scores: a raw score for each answer, kept apart from any weighting."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from cwpo_dist.config import ConfigError, ModelConfig
from cwpo_dist.pairs.rejects import RejectsError
from cwpo_dist.scoring.pipeline import (
    ShardJob,
    committed_counts,
    committed_rejects,
    part,
    total_counts,
)
from cwpo_dist.scoring.run import run_shards
from cwpo_dist.scoring.scorers import OVER_LENGTH, RewardWorker
from cwpo_dist.stages.context import Context, score_files, trained
from cwpo_dist.stages.graph import Node
from cwpo_dist.storage import Store

logger = logging.getLogger(__name__)


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `scores/part-*.parquet` and returns the counts.

    Raises:
        RejectsError: when more rows than `annotate.max_reject_fraction` have no finite score.
    """
    job = _job(context, node)
    check = partial(_refuse_past, context, node, _pairs(context, node))
    counts = run_shards(job, context.config.annotate, check)
    counts = _plus(counts, _retried_counts(context, node))
    _refuse_past(context, node, counts["rows_in"], counts["rejects"])
    logger.info(
        "annotate: %d pairs scored, %d set aside, %d too long; %s/scores has score_a and score_b, "
        "to be joined by pair_id with response_a and response_b of %s/pairs",
        *(counts["rows"], counts["rejects"], counts["over_length"], job.output.uri),
        context.pairs(node).store.uri,
    )
    return counts | {"annotator": _name(context, node)}


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
    first, config = _job(context, node), context.config.annotate
    run_shards(first, config)
    number = node.retries + 1
    failed = [index for index, counts in committed_counts(first).items() if counts["rejects"]]
    aside = [index for index in failed if _set_aside(first.output, node.retries, index)]
    if not aside:
        logger.info("annotate: nothing was set aside but for its length")
        return None
    throughput = run_shards(_job(context, node, number, aside), config).get("throughput")
    retried = _retried_counts(context, replace(node, retries=number))
    return _plus(total_counts(first), retried) | {"throughput": throughput}


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


def _pairs(context: Context, node: Node) -> int:
    """How many pairs there are to score."""
    splits = context.counts(node.inputs["prepare"])["splits"]
    return sum(splits[split] for split in node.settings["splits"])


def _refuse_past(context: Context, node: Node, pairs: int, rejects: int) -> None:
    fraction = context.config.annotate.max_reject_fraction
    if rejects > fraction * pairs:
        raise RejectsError(
            f"annotate: {rejects} of {pairs} pairs have no finite score, more than "
            f"annotate.max_reject_fraction {fraction} allows; see "
            f"{context.place(node).uri}/rejects, mend the model and give --retry-rejects, or raise "
            "the fraction"
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


def _plus(counts: Mapping[str, Any], more: Mapping[str, int]) -> dict[str, Any]:
    return {**counts, **{name: counts.get(name, 0) + more[name] for name in more}}


def annotator(context: Context, node: Node) -> ModelConfig:
    """The given reward model, or the one that `fit` made."""
    if context.config.annotate.model is not None:
        return context.config.annotate.model
    if context.config.weak is None:
        raise ConfigError("weak: missing; give weak.model_name_or_path or annotate.model")
    return trained(context.config.weak, context.place(node.inputs["fit"]))
