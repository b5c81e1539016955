"""pairs, annotator → scores: a raw score for each answer, kept apart from any weighting."""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from typing import Any

from cwpo_dist.config import ConfigError, ModelConfig
from cwpo_dist.scoring.earlier import EarlierScores, NewPairsWorker, score_files
from cwpo_dist.scoring.pipeline import ShardJob, run_shards
from cwpo_dist.scoring.scorers import RewardWorker
from cwpo_dist.stages.context import Context, trained
from cwpo_dist.stages.graph import FORMAT, Node
from cwpo_dist.storage import Store, digest

logger = logging.getLogger(__name__)

ANNOTATOR = "annotator.json"  # who scores here: written before the first score
_BLOCK_BYTES = 2**23


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
    score = partial(RewardWorker, context.pairs(node), model, name, config.max_tokens_per_batch)
    earlier = EarlierScores(score_files(_same_annotator(context, node)))
    job = ShardJob(
        name="scores",
        output=context.place(node),
        shards=context.shards(node),
        make_worker=partial(NewPairsWorker, earlier, score) if earlier.files else score,
    )
    counts = {"reused": 0} | run_shards(job, config)
    allowed = config.max_reject_fraction * counts["rows_in"]
    if counts["rejects"] > allowed:
        raise RejectsError(
            f"annotate: {counts['rejects']} of {counts['rows_in']} pairs have no finite score, "
            f"more than annotate.max_reject_fraction {config.max_reject_fraction} allows; see "
            f"{job.output.uri}/rejects, mend the model or raise the fraction"
        )
    logger.info(
        "annotate: %d pairs scored, %d of them before, %d set aside, %d too long; %s/scores has "
        "score_a and score_b, to be joined by pair_id with response_a and response_b of %s/pairs",
        *(counts["rows"], counts["reused"], counts["rejects"]),
        *(counts["over_length"], job.output.uri, context.pairs(node).store.uri),
    )
    return counts | {"annotator": name}


def _same_annotator(context: Context, node: Node) -> list[Store]:
    """The other outputs in this run directory whose scores are this annotator's.

    They may be unfinished: a file of scores is final once it is there. The largest come first, as
    they are likely to hold most.
    """
    stage, who = context.root.child("annotate"), _who(context, node)
    context.place(node).create_json(ANNOTATOR, who)
    files: dict[str, int] = {}
    for name in stage.names():
        key = name.split("/")[0]
        files[key] = files.get(key, 0) + 1
    others = sorted(files.keys() - {node.key}, key=lambda key: (-files[key], key))
    stores = [stage.child(key) for key in others]
    return [store for store in stores if store.exists(ANNOTATOR) and _says(store, who)]


def _says(store: Store, who: str) -> bool:
    return bool(store.read_json(ANNOTATOR) == who)


def _who(context: Context, node: Node) -> str:
    """One annotator, whatever pairs it is given: its settings, its weights, and which answer is a.

    An annotator of ours is known by its weights: fitted again on the same labelled pairs, it is
    the same one.
    """
    settings = {name: value for name, value in node.settings.items() if name != "splits"}
    trained_on = None
    if "fit" in node.inputs:
        fit = node.inputs["fit"]
        trained_on = [fit.settings, _weights(context.place(fit))]
    return digest([FORMAT, settings, trained_on, context.config.seed])


def _weights(fit: Store) -> str:
    content = hashlib.sha256()
    for name in fit.names("model"):
        if name.endswith(".safetensors"):
            with fit.filesystem.open(fit.path(name), "rb") as file:
                for block in iter(partial(file.read, _BLOCK_BYTES), b""):
                    content.update(block)
    return content.hexdigest()


def annotator(context: Context, node: Node) -> ModelConfig:
    """The given reward model, or the one that `fit` made."""
    if context.config.annotate.model is not None:
        return context.config.annotate.model
    if context.config.weak is None:
        raise ConfigError("weak: missing; give weak.model_name_or_path or annotate.model")
    return trained(context.config.weak, context.place(node.inputs["fit"]))
