"""tokens, frozen policy → the summed log-probability of each answer, once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from cwpo_dist.canonical import digest
from cwpo_dist.config import Config, Split
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.runs.arms import ArmRun, held_out_split
from cwpo_dist.runs.context import Context, policy_of, prepared
from cwpo_dist.runs.given_model import GivenModel
from cwpo_dist.runs.named_loss import objective
from cwpo_dist.runs.output_key import BESIDE_KEY, Node, Nodes, Settings
from cwpo_dist.runs.same_model import SameModel, precision
from cwpo_dist.runs.scored_by import Placed, Scorers
from cwpo_dist.runs.stage import Scoring, Stage
from cwpo_dist.scoring.pipeline import ShardJob
from cwpo_dist.scoring.scorers import ReferenceWorker, policy_module
from cwpo_dist.scoring.set_aside import Limit
from cwpo_dist.storage import MANIFEST

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceSettings(Settings):
    """What `reference` is told.

    Attributes:
        model: the policy as it was given; an input may have trained it.
        splits: whose pairs' answers get log-probs.
        by: its section, and that of `align`, whose workers may share the policy.
        most: the share of answers that may be without a finite log-prob
            (`prepare.max_reject_fraction`).
    """

    stage = "reference"
    format = 4

    model: GivenModel
    splits: tuple[Split, ...]
    by: Scorers = field(metadata=BESIDE_KEY)
    most: float = field(metadata=BESIDE_KEY)

    @property
    def place(self) -> Placed:
        """Its own section, or that of `align` where the policy is shared."""
        return self.by.place


def nodes(run: ArmRun, given: Nodes) -> Nodes:
    """Of the policy where `align` starts, for losses that compare; of the aligned one, judged.

    Of a weak policy whose rewards are asked for: before its alignment, and after.
    """
    policy, config = run.policy, run.config
    if policy is None:
        return {}

    def log_probs(splits: Sequence[Split], trained: str) -> Node:
        by = Scorers(config.reference, config.align)
        most = config.prepare.max_reject_fraction
        told = ReferenceSettings(policy, tuple(sorted(set(splits))), by, most)
        model = {"model": given[trained]} if trained in given else {}
        return Node(told, {"tokens": given["tokens"]} | model)

    made: dict[str, Node] = {}
    compares, _ = objective(config.align, soft_labels=run.arm.soft_labels)
    if compares.reference:
        splits = [*run.arm.splits, *_measured(config), held_out_split(config)]
        made["reference"] = log_probs(splits, "sft")
    if "align" in given and run.rewarded:
        made |= {"before": log_probs(run.rewarded, "sft")}
        made |= {"after": log_probs(run.rewarded, "align")}
    elif "align" in given:
        made["aligned"] = log_probs([config.evaluate.split], "align")
    return made


def _measured(config: Config) -> list[Split]:
    """The splits that a policy is measured on: where rates are chosen on validation, that too."""
    chosen = config.compare is not None and len(config.compare.learning_rates) > 1
    return ["test", "validation"] if chosen else [config.evaluate.split]


def work(context: Context, node: Node[ReferenceSettings], counted: Census) -> Scoring:
    """A pass of the policy over the answers that it has not read before."""
    told = node.settings
    answers, prompts = counted.answers_of(*told.splits), counted.prompts_of(*told.splits)
    text, field = f"{answers:,} answers to {prompts:,} prompts", told.model.field
    work = Scoring(text, answers, "log_probs", field, prompts, by=told.by, answers=answers)
    return SAME.less_earlier(context, node, work, counted)


def make(context: Context, node: Node[ReferenceSettings]) -> Mapping[str, object]:
    """Writes `reference/part-*.parquet` and returns the counts.

    Raises:
        RejectsError: when more answers than `prepare.max_reject_fraction` have no log-prob.
    """
    told = node.settings
    policy = policy_of(context, node, told.model.config)
    answers = context.answers(node, told.splits)
    make_worker = partial(
        ReferenceWorker,
        answers,
        context.place(node.inputs["tokens"]),
        policy,
        told.by.section.max_tokens_per_batch,
    )
    job = ShardJob("reference", context.place(node), context.shards(node), make_worker)
    new = SAME.only_new(context, node, job, answers)
    limit = _limit(context, node)
    counts = {"reused": 0} | told.by.run(new, policy, policy_module, limit.check)
    limit.check(counts, whole=True)
    logger.info(
        "reference: log-probs of %d answers of %s, %d of them computed before, %d set aside, are "
        "in %s/reference",
        *(counts["rows"], ", ".join(told.splits), counts["reused"], counts["rejects"]),
        job.output.uri,
    )
    return counts


def _limit(context: Context, node: Node[ReferenceSettings]) -> Limit:
    """How many may have no log-prob; pairs that are alike `tokens` has counted, of all splits."""
    told, counts, output = node.settings, context.counts(prepared(node)), context.place(node)
    answers = sum(counts["answers"].get(split, 0) for split in told.splits)
    field = "prepare.max_reject_fraction"
    return Limit("reference", field, told.most, answers, counts["pairs"], output)


def _who(context: Context, node: Node[ReferenceSettings]) -> str:
    """One policy, whatever answers it is given: its settings, its training, and its tokens.

    A training is known by what it says of itself, its time too: one that was removed and made anew
    may have other weights, which need not be read for that.
    """
    told, tokens = node.settings, node.inputs["tokens"].settings
    settings = {name: value for name, value in told.identity().items() if name != "splits"}
    trained_by = None
    if "model" in node.inputs:
        trained_by = context.place(node.inputs["model"]).read_json(MANIFEST)
    computes_in = precision(told.model.config, told.place)
    read = [tokens.format, tokens.identity()]
    return digest([told.format, settings, computes_in, read, trained_by])


SAME = SameModel("policy.json", "reference", "computed", _who)
STAGE = Stage(ReferenceSettings, nodes, make, work, who=_who)
