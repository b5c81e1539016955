"""Held-out human labels, log-probs and sampled answers → how good annotator and policy are."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cwpo_dist.config import AlignConfig, EvaluateConfig, ReferenceConfig, Split
from cwpo_dist.evaluation.accuracy import policy_accuracy
from cwpo_dist.evaluation.annotators import annotator_figures
from cwpo_dist.evaluation.gold_function import load_function
from cwpo_dist.evaluation.left_out import LeftOut, in_words
from cwpo_dist.pairs.chosen import signs
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.messages import plain_text
from cwpo_dist.pairs.records import (
    Prompt,
    content_hash,
    table_of,
)
from cwpo_dist.pairs.stored import Pair, read_pairs
from cwpo_dist.runs.agreed import AGREED, AGREED_SCHEMA, agreed, log_probs
from cwpo_dist.runs.annotations import held_out, names, raw
from cwpo_dist.runs.arms import ArmRun, Chooser, weighting
from cwpo_dist.runs.context import Context, read_sampled
from cwpo_dist.runs.divergence import Answered, kl_divergence
from cwpo_dist.runs.given_model import GivenModel
from cwpo_dist.runs.gold_scores import (
    GoldScores,
    gold_margins,
    scores_by_function,
    scores_by_model,
)
from cwpo_dist.runs.judged_answers import JUDGED_SCHEMA, judged_answers, judged_figures
from cwpo_dist.runs.output_key import BESIDE_KEY, Node, Nodes, Settings
from cwpo_dist.runs.scored_by import Placed, Scorers
from cwpo_dist.runs.stage import Stage, Work
from cwpo_dist.storage import Store

logger = logging.getLogger(__name__)

ITEMS, ANSWERS = "items.parquet", "answers.parquet"  # what intervals over several runs need
ITEM_SCHEMA = pa.schema(
    [
        *(("pair_id", pa.string()), ("prompt", pa.string()), ("margin", pa.float64())),
        ("longer_by", pa.int64()),
    ]
)


class MeasuredPair(NamedTuple):
    """What a policy's implicit reward says of one held-out pair.

    Attributes:
        pair_id: whose.
        prompt: the hash of its prompt.
        margin: the reward of the human's choice less that of the other.
        longer_by: characters of the human's choice less those of the other.
    """

    pair_id: str
    prompt: str
    margin: float
    longer_by: int


BASELINES = {"own_sft": "answers_sft", "common": "answers_base"}


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    """What `evaluate` is told.

    Attributes:
        config: its section.
        gold: the reward model that judges answers.
        gold_rule: the digest of the source of the function that judges them.
        calibration_split: where temperatures are fitted.
        policy: as it was given; the inputs trained it.
        align: of the implicit reward's beta, which its key has; its workers may share models.
        chooser: of the input `weigh`.
        reference: the section of passes for log-probs.
        rows_per_shard: of what is scored on the way.
    """

    stage = "evaluate"
    format = 8  # KL is of answers as long as they were sampled

    config: EvaluateConfig
    gold: GivenModel | None
    gold_rule: str | None
    calibration_split: Split
    policy: GivenModel = field(metadata=BESIDE_KEY)
    align: AlignConfig = field(metadata=BESIDE_KEY)
    chooser: Chooser = field(metadata=BESIDE_KEY)
    reference: ReferenceConfig = field(metadata=BESIDE_KEY)
    rows_per_shard: int = field(metadata=BESIDE_KEY)

    @property
    def judged_by(self) -> Scorers:
        """Who applies the gold model."""
        return Scorers(self.config, self.align)

    @property
    def place(self) -> Placed:
        """Its own section, or that of `align` where a gold model is shared."""
        return self.judged_by.place

    def identity(self) -> dict[str, object]:
        """The section, and what judges answers as it is now: its weights, or its rule's source."""
        told = self.config.identity() | {"calibration_split": self.calibration_split}
        if self.gold is not None:
            told["gold_model"] = self.gold.identity()
        elif self.gold_rule is not None:
            told["gold_function_now"] = self.gold_rule
        return told | {"items": 1}


def nodes(run: ArmRun, given: Nodes) -> Nodes:
    """The figures of an arm; all before it is read, but who judges folds, and no held-out pair."""
    config, judge = run.config, run.config.evaluate
    if run.policy is None or "aligned" not in given:
        return {}
    rule = None
    if run.gold is None and judge.gold_function is not None:
        rule = load_function(judge.gold_function).source_digest()
    told = EvaluateSettings(
        judge,
        run.gold,
        rule,
        config.weigh.calibration_split,
        run.policy,
        config.align,
        weighting(config, run.arm).chooser,
        config.reference,
        config.prepare.rows_per_shard,
    )
    read = {role: node for role, node in given.items() if node.settings.fold is None}
    return {"evaluate": Node(told, read)}


def work(context: Context, node: Node[EvaluateSettings], counted: Census) -> Work:
    """What people said of the held-out pairs, and what models say."""
    split = node.settings.config.split
    return Work(f"{counted.labelled_pairs(split):,} {split} pairs with a label")


def make(context: Context, node: Node[EvaluateSettings]) -> Mapping[str, object]:
    """Writes `metrics.json`; what was not asked for, or cannot be had, is null there.

    Counts:
        held_out_pairs: pairs of the evaluated split with a label of people.
    """
    pairs = [_held_out(context, node, index) for index in range(context.shards(node))]
    metrics = {
        "annotator": _annotator(context, node),
        "policy": _policy(context, node, pairs),
        **_answered(context, node),
    }
    context.place(node).create_json("metrics.json", metrics)
    _compare_to_gold(context, node)
    return {"held_out_pairs": sum(map(len, pairs))}


def _held_out(context: Context, node: Node[EvaluateSettings], index: int) -> list[Pair]:
    """The pairs of one shard on the evaluated side that carry a human label."""
    pairs, split = context.prepared(node), node.settings.config.split
    return [
        pair for pair in read_pairs(pairs, index) if pair.split == split and pair.label is not None
    ]


def _annotator(context: Context, node: Node[EvaluateSettings]) -> Mapping[str, object] | None:
    told = node.settings
    given = raw(context, node, told.chooser, judged=True)
    if not given.scores:
        return None
    split, fitted_on = told.config.split, told.calibration_split
    figures = annotator_figures(
        held_out(given, split),
        None if fitted_on == split else held_out(given, fitted_on),
        names(context, node, given),
        by_member=told.chooser.temperature == "fitted",
    )
    return figures | {"temperature_split": fitted_on}


def _policy(
    context: Context, node: Node[EvaluateSettings], shards: list[list[Pair]]
) -> Mapping[str, object]:
    """Accuracy of the implicit reward that was trained; `items.parquet` has it pair by pair.

    Without a reference the reward is of a token's mean.
    """
    found = [
        (pair, *known[pair.pair_id])
        for index, pairs in enumerate(shards)
        for known in [log_probs(context, node, index)]
        for pair in pairs
        if pair.pair_id in known
    ]
    measured = [pair for pair, _, _ in found]
    beta = node.settings.align.beta
    after_NK = np.array([after for _, after, _ in found]).reshape(-1, 2)
    before_NK = np.array([before for *_, before in found]).reshape(-1, 2)
    rewards_NK = after_NK - before_NK
    margins = beta * (rewards_NK[:, 0] - rewards_NK[:, 1])
    labels = [pair.label for pair in measured]
    items = [
        MeasuredPair(pair.pair_id, content_hash(pair.prompt), margin, _longer_by(pair))
        for pair, margin in zip(measured, (signs(labels) * margins).tolist(), strict=True)
    ]
    context.place(node).create_table(ITEMS, table_of(items, ITEM_SCHEMA))
    return policy_accuracy(
        *(after_NK[:, 0], after_NK[:, 1], before_NK[:, 0], before_NK[:, 1]),
        labels,
        beta,
        [plain_text(pair.prompt) for pair in measured],
    ).as_dict()


def _longer_by(pair: Pair) -> int:
    """Characters of the human's choice less those of the other."""
    return len(plain_text(pair.chosen)) - len(plain_text(pair.rejected))


def _answered(context: Context, node: Node[EvaluateSettings]) -> Mapping[str, object]:
    """GRA and answer figures against the arm's own SFT model and the policy as it was given.

    `answers.parquet` has them prompt by prompt; the KL divergence is from the SFT model.
    """
    told = node.settings
    if "answers_aligned" not in node.inputs:
        return {"gra": None, "answers": None, "kl": None}
    aligned = read_sampled(context, node.inputs["answers_aligned"])
    prompts = _prompts(context, node, aligned)
    judged, figures, tables = {}, {}, []
    scored: dict[str, GoldScores | None] = {}  # by the baseline: without SFT both are one model
    for name, role in BASELINES.items():
        baseline = read_sampled(context, node.inputs[role])
        rows = [Answered(i, prompts[i], baseline[i], aligned[i]) for i in aligned if i in baseline]
        path = node.inputs[role].path
        if path not in scored:
            scored[path] = _gold(told, context.place(node).child(name), rows)
        gold = scored[path]
        answers = judged_answers(name, rows, gold)
        accuracy, lengths = judged_figures(answers, gold)
        judged[name], figures[name] = accuracy and accuracy.as_dict(), lengths.as_dict()
        if gold is not None:
            bound = "evaluate.gold_model.max_length"
            _tell(f"GRA against {name}", gold.left_out, len(rows), bound)
        tables.append(table_of(answers, JUDGED_SCHEMA))
    context.place(node).create_table(ANSWERS, pa.concat_tables(tables))
    kl = None
    if told.config.kl:
        policy, by = told.policy.config, Scorers(told.reference, told.align)
        sizes = told.config.max_new_tokens, told.rows_per_shard
        found = kl_divergence(context, node, prompts, policy, by, *sizes)
        bound = "policy.max_length (and, where prompts are not cut, evaluate.max_new_tokens)"
        _tell("KL", found.left_out, len(aligned), bound)
        kl = found.as_dict()
    return {"gra": None if gold is None else judged, "answers": figures, "kl": kl}


def _gold(told: EvaluateSettings, store: Store, rows: Sequence[Answered]) -> GoldScores | None:
    """Gold scores; None without a gold model or function."""
    if told.gold is not None:
        return scores_by_model(told.gold.config, told.judged_by, store, rows, told.rows_per_shard)
    if told.config.gold_function is not None:
        return scores_by_function(told.config.gold_function, rows)
    return None


def _tell(figure: str, left_out: LeftOut, prompts: int, bound: str) -> None:
    """Warns of a figure that is not of all prompts."""
    if left_out.prompts:
        logger.warning(
            "evaluate: %s leaves out %d of %d prompts (%s); an answer that is longer than "
            "%s with its prompt is over_length, so that arms with longer answers lose more of them",
            *(figure, left_out.prompts, prompts, in_words(left_out), bound),
        )


def _compare_to_gold(context: Context, node: Node[EvaluateSettings]) -> None:
    """Writes `agreed.parquet`, where there is a gold reward and people left pairs to it."""
    told, split = node.settings, node.settings.config.split
    rule = told.config.gold_function
    if told.gold is None and rule is None:
        return
    by_gold = partial(gold_margins, context, node, split, told.gold, rule, told.judged_by)
    if rows := agreed(context, node, told.chooser, split, by_gold):
        context.place(node).create_table(AGREED, table_of(rows, AGREED_SCHEMA))


def _prompts(context: Context, node: Node, answered: Container[str]) -> dict[str, Prompt]:
    """Of the pairs whose prompts were answered."""
    store = context.prepared(node)
    return {
        pair.pair_id: Prompt(pair.prompt, pair.tools)
        for index in range(context.shards(node))
        for pair in read_pairs(store, index)
        if pair.pair_id in answered
    }


STAGE = Stage(EvaluateSettings, nodes, make, work)
