"""answers, annotator → scores: a raw score for each, kept apart from any weighting."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from cwpo_dist.canonical import digest
from cwpo_dist.config import AnnotateConfig, ModelConfig, Split
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.splits import Fold
from cwpo_dist.runs.arms import ArmRun
from cwpo_dist.runs.context import Context, trained
from cwpo_dist.runs.given_model import GivenModel
from cwpo_dist.runs.joined import score_files
from cwpo_dist.runs.output_key import BESIDE_KEY, Node, Nodes, Settings, committed_retries
from cwpo_dist.runs.same_model import SameModel, precision
from cwpo_dist.runs.scored_by import Placed, Scorers
from cwpo_dist.runs.stage import Scoring, Stage
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.pipeline import (
    ShardJob,
    committed_counts,
    committed_rejects,
    part,
    total_counts,
)
from cwpo_dist.scoring.scorers import RewardWorker, reward_module
from cwpo_dist.scoring.set_aside import ALIKE, Limit, lasts, passing, refuse_none
from cwpo_dist.storage import Store

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 2**23


@dataclass(frozen=True)
class AnnotateSettings(Settings):
    """What `annotate` is told.

    Attributes:
        config: its section.
        splits: whose pairs' answers are scored.
        ready: the given reward model; None: the one that its input `fit` made.
        weak: what `fit` made that of.
        by: its section, and that of `fit`, whose workers may share the model.
        fold: the pairs that `fit` did not see, and has in its key: theirs alone are scored.
        heads: how many `fit` made, and has in its key; a ready model gives one score, the mean.
    """

    stage = "annotate"
    format = 5
    scores = True

    config: AnnotateConfig
    splits: tuple[Split, ...]
    ready: GivenModel | None
    weak: ModelConfig | None = field(metadata=BESIDE_KEY)
    by: Scorers = field(metadata=BESIDE_KEY)
    fold: Fold | None = field(default=None, metadata=BESIDE_KEY)
    heads: int = field(default=1, metadata=BESIDE_KEY)

    @property
    def place(self) -> Placed:
        """Its own section, or that of `fit` where the model is shared."""
        return self.by.place

    def identity(self) -> dict[str, object]:
        """What the key hashes; of an annotator that `fit` made its input tells the model."""
        told = self.config.identity() | {"splits": list(self.splits)}
        return told | (self.ready.identity() if self.ready is not None else {})


def nodes(run: ArmRun, given: Nodes) -> Nodes:
    """One for each annotator, numbered where there are several.

    Each has a key of its own, which knows nothing of the others: to add one scores no answer anew
    by those that are there.
    """
    if not run.annotates:
        return {}
    config, read = run.config, {"prepare": given["prepare"]}
    by = Scorers(config.annotate, config.fit)
    splits: tuple[Split, ...] = tuple(sorted(config.annotate.scored_splits()))
    told = AnnotateSettings(config.annotate, splits, None, config.weak, by, heads=config.fit.heads)
    made = [Node(replace(told, ready=model, heads=1), read) for model in run.ready] or [
        Node(_of_fold(told, node.settings.fold), read | {"fit": node})
        for node in given.values()
        if node.stage == "fit"
    ]
    return {
        f"annotate_{k}" if len(made) > 1 else "annotate": _retried(run.root, node)
        for k, node in enumerate(made)
    }


def _of_fold(told: AnnotateSettings, fold: Fold | None) -> AnnotateSettings:
    return told if fold is None else replace(told, splits=("labelled",), fold=fold)


def _retried(root: Store, node: Node[AnnotateSettings]) -> Node[AnnotateSettings]:
    """The node with the number of its committed retries, which stand in the run directory."""
    return replace(node, retries=committed_retries(root.child(*node.path.split("/"))))


def work(context: Context, node: Node[AnnotateSettings], counted: Census) -> Scoring:
    """A pass of the annotator over what it has not scored before."""
    told = node.settings
    model = "weak" if told.ready is None else told.ready.field
    answers, prompts = counted.answers_of(*told.splits), counted.prompts_of(*told.splits)
    alone, prompts_alone = counted.alone_of(*told.splits)
    parts = 1 if told.fold is None else told.fold.of
    answers, prompts = (answers + alone) // parts, (prompts + prompts_alone) // parts
    work = Scoring(
        f"{answers:,} answers to {prompts:,} prompts",
        answers,
        "scores",
        model,
        prompts,
        by=told.by,
        answers=answers,
        heads=told.heads,
    )
    return SAME.less_earlier(context, node, work, counted, told.fold)


def make(context: Context, node: Node[AnnotateSettings]) -> Mapping[str, object]:
    """Writes `scores/part-*.parquet` and returns the counts.

    Raises:
        RejectsError: when more answers than `annotate.max_reject_fraction` have no score, or more
            pairs two that are alike.
    """
    job, limit = shard_job(context, node), limit_of(context, node)
    new = SAME.only_new(context, node, job, _answers(context, node))
    counts = node.settings.by.run(new, annotator(context, node), reward_module, limit.check)
    counts = {"reused": 0} | _plus(counts, _retried_counts(context, node))
    limit.check(counts, whole=True)
    if counts["rows_in"] or node.settings.fold is None:  # of few prompts a fold may have none
        refuse_none("annotate", annotator(context, node), counts)
    logger.info(
        "annotate: %d answers of %s scored, %d of them before, %d set aside, %d too long, %d pairs "
        "of answers that are alike to it; %s/scores has a score for each answer_id, texts and "
        "pairs are in %s",
        *(counts["rows"], ", ".join(node.settings.splits), counts["reused"]),
        *(counts["rejects"], counts["over_length"], counts.get(ALIKE, 0)),
        *(job.output.uri, context.prepared(node).uri),
    )
    return counts | {"annotator": _name(context, node)}


def retry(context: Context, node: Node[AnnotateSettings]) -> Mapping[str, object] | None:
    """Scores again the answers that were set aside for other reasons than their tokens.

    What a retry scores goes into files of its own, `scores/part-00012.retry-1.parquet`, one a shard
    that has such answers; what was committed before stays as it is. Readers read the files of those
    retries that were committed (by `manifest.retry-N.json`, by the caller) when their stage's key
    was made. The key of `annotate` stays, as settings and inputs do; the keys of all that reads the
    scores change with each retry, so what was made of the earlier scores is made again beside it.

    Returns:
        The counts of all scores with those of this retry; None when there was nothing to retry.
    """
    first, by, model = shard_job(context, node), node.settings.by, annotator(context, node)
    if first.missing():
        SAME.say(context, node)
    by.run(first, model, reward_module)
    number = node.retries + 1
    failed = [index for index, counts in committed_counts(first).items() if counts["rejects"]]
    aside = [index for index in failed if _set_aside(first.output, node.retries, index)]
    if not aside:
        logger.info("annotate: nothing was set aside that could be scored again")
        return None
    SAME.say(context, node)
    again = by.run(shard_job(context, node, number, aside), model, reward_module)
    retried = _retried_counts(context, replace(node, retries=number))
    return _plus(total_counts(first), retried) | {"throughput": again.get("throughput")}


def shard_job(
    context: Context,
    node: Node[AnnotateSettings],
    retry: int = 0,
    selected: Sequence[int] | None = None,
) -> ShardJob:
    """The scoring of all answers, or of those that the retries before `retry` left aside."""
    output, config, answers = context.place(node), node.settings.config, _answers(context, node)
    if retry:
        answers = replace(answers, selected=partial(_set_aside, output, retry - 1))
    told = annotator(context, node), _name(context, node), config.max_tokens_per_batch
    worker = partial(RewardWorker, answers, *told, batch_invariant=config.batch_invariant)
    return ShardJob(
        name="scores",
        output=output,
        shards=context.shards(node),
        make_worker=worker,
        selected=selected,
        retry=retry,
    )


def _answers(context: Context, node: Node[AnnotateSettings]) -> AnswersIn:
    """What is scored: the answers of pairs, and those that stand in none; or those of a fold."""
    told = node.settings
    selected = None if told.fold is None else partial(_selected, told.fold)
    return replace(context.answers(node, told.splits), alone=True, selected=selected)


def _selected(fold: Fold, _shard: int) -> Fold:
    return fold


def limit_of(context: Context, node: Node[AnnotateSettings]) -> Limit:
    """How much may be set aside."""
    told, prepared = node.settings, context.counts(node.inputs["prepare"])
    answers, alone, pairs = (
        sum(prepared.get(of, {}).get(split, 0) for split in told.splits)
        for of in ("answers", "answers_alone", "splits")
    )
    most, field = told.config.max_reject_fraction, "annotate.max_reject_fraction"
    return Limit("annotate", field, most, answers + alone, pairs, context.place(node))


def _who(context: Context, node: Node[AnnotateSettings]) -> str:
    """One annotator, whatever answers it is given: its settings and its weights.

    An annotator of ours is known by its weights: fitted again on the same labelled pairs, it is
    the same one.
    """
    told = node.settings
    settings = {name: value for name, value in told.identity().items() if name != "splits"}
    trained_on = None
    if "fit" in node.inputs:
        fit = node.inputs["fit"]
        trained_on = [fit.settings.identity(), _weights(context.place(fit))]
    computes_in = precision(annotator(context, node), told.place)
    # Where it is fp32 nothing is added: outputs that were made before say the same.
    other = [] if computes_in == "float32" else [computes_in]
    return digest([told.format, settings, trained_on, *other])


def _weights(fit: Store) -> str:
    content = hashlib.sha256()
    for name in fit.names("model"):
        if name.endswith(".safetensors"):
            with fit.opened(name) as file:
                for block in iter(partial(file.read, _BLOCK_BYTES), b""):
                    content.update(block)
    return content.hexdigest()


SAME = SameModel("annotator.json", "scores", "scored", _who)


def _name(context: Context, node: Node[AnnotateSettings]) -> str:
    """What the column `annotator` holds."""
    if "fit" in node.inputs:
        return f"fit/{node.inputs['fit'].key}"
    return annotator(context, node).model_name_or_path.rstrip("/").rsplit("/", 1)[-1]


def _set_aside(output: Store, retries: int, index: int) -> frozenset[str]:
    """The ids of a shard's answers that have no score after so many retries, and might have."""
    last = score_files(output, index, retries)[-1]
    rejects = committed_rejects(output, last)
    return frozenset(each.row for each in rejects if not lasts(each.reason))


def _retried_counts(context: Context, node: Node[AnnotateSettings]) -> Counter[str]:
    """What the retries add to the counts: each row that they score was set aside before."""
    totals: Counter[str] = Counter()
    names = set(context.place(node).names("scores")) if node.retries else set()
    for number in range(1, node.retries + 1):
        shards = range(context.shards(node))
        selected = [i for i in shards if part("scores", i, number) in names]
        # Who takes part in a retry took part in the one before, and has all that it left aside.
        for left in committed_counts(shard_job(context, node, number - 1, selected)).values():
            totals.subtract(passing(left))
        totals.update(total_counts(shard_job(context, node, number, selected)))
        totals["rejects"] -= totals.pop("rows_in")
    return totals


def _plus(counts: Mapping[str, Any], more: Mapping[str, int]) -> dict[str, object]:
    return {**counts, **{name: counts.get(name, 0) + more[name] for name in more}}


def annotator(context: Context, node: Node[AnnotateSettings]) -> ModelConfig:
    """The given reward model, or the one that its `fit` made."""
    told = node.settings
    if told.ready is not None:
        return told.ready.config
    assert told.weak is not None, "`fit` made it of something"
    return trained(told.weak, context.place(node.inputs["fit"]))


STAGE = Stage(AnnotateSettings, nodes, make, work, retry=retry, who=_who)
