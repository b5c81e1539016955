"""pairs, scores → preferences: who won, by what margin, how confidently, with what weight.

Each shard is a Ray task that decides alone. What a pair's weight needs to know of all others is
three numbers, found in passes of their own where they are asked for: the fitted temperature, the
last pair of the top share, and the mean weight.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cwpo_dist.evaluation.shares import Floats
from cwpo_dist.pairs.chosen import chosen_first
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.labels import Decision, LabelSource, Opinion, decide
from cwpo_dist.pairs.numbers import Own
from cwpo_dist.pairs.records import Kind, rows_of, table_of
from cwpo_dist.pairs.stored import Pair, Preference, preference_schema, preference_table
from cwpo_dist.runs.annotations import (
    Annotated,
    annotated,
    decided_pairs,
    gather,
    label_source,
    own_kind,
)
from cwpo_dist.runs.arms import ArmRun, Chooser, Weighting, weighting
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.node import BESIDE_KEY, Node, Nodes, Settings, scored
from cwpo_dist.runs.own_numbers import OwnNumbersError, void_fault
from cwpo_dist.runs.stage import Stage, Work
from cwpo_dist.scoring.pipeline import counted, part, read_counts
from cwpo_dist.storage import StorageError, Store
from cwpo_dist.weighting import Selection, confidence, last_of_top, margin_of, sigmoid, weights

CONFIDENCES = pa.schema([("pair_id", pa.string()), ("confidence", pa.float64())])
WEIGHTS = pa.schema([("shard", pa.int64()), ("weight", pa.float64()), ("pairs", pa.int64())])
WRITTEN = pa.schema([("shard", pa.int64()), ("refused", pa.string()), ("counts", pa.string())])

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeighSettings(Settings):
    """What `weigh` is told.

    Attributes:
        weighting: who chooses, and what becomes of margins.
        messages: whether text is written as the messages that the policy's template gets of it.
        most_void: the share of the data's own numbers that may be of no use
            (`prepare.max_reject_fraction`).
    """

    stage = "weigh"
    format = 5

    weighting: Weighting
    messages: bool
    most_void: float = field(metadata=BESIDE_KEY)


def chooser_of(node: Node) -> Chooser:
    """Who chose in an output of `weigh`."""
    assert isinstance(node.settings, WeighSettings), f"{node.path} is no output of `weigh`"
    return node.settings.weighting.chooser


def nodes(run: ArmRun, given: Nodes) -> Nodes:
    """The arm's preferences."""
    config = run.config
    # Text is prompt + answer under 'plain' alone; every other template gets it as messages.
    messages = config.policy is None or config.policy.chat_template != "plain"
    how, most = weighting(config, run.arm), config.prepare.max_reject_fraction
    read = {"prepare": given["prepare"]} | scored(given)
    return {"weigh": Node(WeighSettings(how, messages, most), read)}


def work(context: Context, node: Node[WeighSettings], counted: Census) -> Work:
    """All pairs whose better answer somebody knows."""
    chooser = node.settings.weighting.chooser
    text = f"{decided_pairs(chooser, counted):,} pairs"
    return Work(text, counted.pairs(*chooser.splits), "pairs")


def make(context: Context, node: Node[WeighSettings]) -> dict[str, Any]:
    """Writes `preferences/part-*.parquet` (TRL's names) and returns the counts.

    Raises:
        OwnNumbersError: where the data's own numbers are asked for and hardly any can be used.
    """
    how, chooser = node.settings.weighting, node.settings.weighting.chooser
    own = own_kind(context, node, chooser)
    if own is not None:
        _check_own(context, node, own)
    read = annotated(context, node, chooser)
    shards = Shards(
        annotated=read,
        output=context.place(node),
        labels=label_source(context, node, chooser),
        own=chooser.labels == "own",
        splits=chooser.splits,
        weight_function=how.weight_function,
        message_keys=tuple(context.counts(node.inputs["prepare"])["message_keys"]),
        messages=node.settings.messages,
    )
    selection = Selection(_last(shards, how.top_fraction), how.min_confidence)
    if how.divided_by_mean:
        shards = replace(shards, divisor=_mean_weight(shards, selection))
    return _summary(_write(shards, selection), shards)


@dataclass(frozen=True)
class Shards:
    """What a task needs to weigh one shard.

    Attributes:
        annotated: the pairs and what the annotators say of them.
        output: the folder of this stage.
        labels: whose choice counts.
        own: whether the data's own numbers decide alone.
        splits: the splits to train on.
        weight_function: its name.
        divisor: the mean weight, where weights are divided by it.
        message_keys: what the run's messages have beside role and content, and `tools`.
        messages: whether text is written as the messages that the policy's template gets of it.
    """

    annotated: Annotated
    output: Store
    labels: LabelSource
    own: bool
    splits: tuple[str, ...]
    weight_function: str
    divisor: float = 1.0
    message_keys: tuple[str, ...] = ()
    messages: bool = False

    def confidences(self, index: int) -> pa.Table:
        """Ids and confidences of one shard's pairs."""
        decisions = self._decided(index)
        found = {"pair_id": list(decisions), "confidence": self._numbers(decisions).confidence}
        return pa.table(found, schema=CONFIDENCES)

    def weights(self, selection: Selection, index: int) -> pa.Table:
        """The sum of one shard's weights, and of how many pairs."""
        decisions = self._decided(index)
        numbers = self._numbers(decisions)
        sure = zip(decisions, numbers.confidence.tolist(), strict=True)
        selected = numbers.weight[[selection.selects(value, pair_id) for pair_id, value in sure]]
        row = {"shard": [index], "weight": [math.fsum(selected)], "pairs": [len(selected)]}
        return pa.table(row, schema=WEIGHTS)

    def _decided(self, index: int) -> dict[str, Decision]:
        opinions, _ = self.annotated.opinions(index)
        return decide(self.annotated.judgements(index), opinions, self.labels, self.splits)

    def write(self, selection: Selection, index: int) -> pa.Table:
        """Writes one shard's preferences; says what was counted, and what storage had against it.

        A shard that was committed before is not weighed again: its file carries its counts.
        """
        name, refused = part("preferences", index), ""
        if self.output.exists(name):
            counts = read_counts(self.output, name)
        else:
            table, counts = self._weighed(index, selection)
            try:
                self.output.create_table(name, counted(table, counts))
            except StorageError as error:  # handed on as a value: Ray would wrap it in its own
                refused = str(error)
        return table_of([_Written(index, refused, json.dumps(counts))], WRITTEN)

    def _weighed(self, index: int, selection: Selection) -> tuple[pa.Table, dict[str, float]]:
        """The preferences of one shard, and numbers that add up over all of them."""
        pairs = self.annotated.read(index)
        opinions, alone = self.annotated.opinions(index)
        decisions = decide(pairs, opinions, self.labels, self.splits)
        numbers = dict(zip(decisions, self._numbers(decisions).rows(), strict=True))
        selected = list(self._preferences(pairs, decisions, numbers, selection))
        of_splits = {pair.pair_id: pair for pair in pairs if pair.split in self.splits}
        counts = self._counts(decisions, opinions or {}, numbers)
        counts |= {
            "selected": len(selected),
            "weight": math.fsum(numbers[each.pair_id].weight for each in selected),
            "alone": len(of_splits.keys() & alone),
        }
        if self.own:
            labels = {i: of_splits[i].label for i, d in decisions.items() if d.margin}
            against = (label not in {None, decisions[i].label} for i, label in labels.items())
            counts |= {"without": len(of_splits) - len(decisions), "against": sum(against)}
        is_text = all(isinstance(pair.prompt, str) for pair in pairs)
        if is_text and self.messages:
            selected = [each.as_messages() for each in selected]
        kind: Kind = "text" if is_text and not self.messages else "conversational"
        return preference_table(selected, self._schema(kind)), counts

    def _schema(self, kind: Kind) -> pa.Schema:
        more = set(self.message_keys)
        return preference_schema(kind, keys=bool(more - {"tools"}), tools="tools" in more)

    def _preferences(
        self,
        pairs: list[Pair],
        decisions: dict[str, Decision],
        numbers: dict[str, _Number],
        selection: Selection,
    ) -> Iterator[Preference]:
        """The pairs that selection keeps, in the order of the shard."""
        for pair in pairs:
            if pair.pair_id not in decisions:
                continue
            decision, number = decisions[pair.pair_id], numbers[pair.pair_id]
            if not selection.selects(number.confidence, pair.pair_id):
                continue
            chosen, rejected = chosen_first(decision.label, *pair.answers)
            yield Preference(
                pair.pair_id,
                pair.prompt,
                chosen,
                rejected,
                pair.tools,
                decision.label,
                margin=number.margin,
                disagreement=decision.disagreement,
                probability=_probability(number.margin),
                confidence=None if number.margin is None else number.confidence,
                weight=number.weight / self.divisor,
            )

    def _numbers(self, decisions: dict[str, Decision]) -> _Numbers:
        """Of each decision; a human's choice counts as certain."""
        count = len(decisions)
        if self.labels == "human":
            return _Numbers(None, np.ones(count), np.ones(count))
        given = np.array([d.given for d in decisions.values()], dtype=np.float64)
        if self.labels == "weight":
            plain = self.weight_function == "one"
            return _Numbers(None, np.ones(count), np.ones(count) if plain else given)
        if self.labels == "confidence":
            margin, disagreement = margin_of(given), np.zeros(count)
            # To the bit, which there and back again would not be.
            as_given = self.weight_function == "confidence"
            weight = given if as_given else weights(self.weight_function, margin, disagreement)
            return _Numbers(margin, given, weight)
        margin = np.array([d.margin for d in decisions.values()], dtype=np.float64)
        disagreement = np.array([d.disagreement or 0.0 for d in decisions.values()])
        weight = weights(self.weight_function, margin, disagreement)
        return _Numbers(margin, confidence(margin), weight)

    def _counts(
        self,
        decisions: dict[str, Decision],
        opinions: dict[str, Opinion],
        numbers: dict[str, _Number],
    ) -> dict[str, float]:
        scored = {i: n for i, n in numbers.items() if n.margin is not None}
        known = [opinions[i] for i in scored if i in opinions]
        annotators = len(self.annotated.scores)
        return {
            "pairs": len(decisions),
            "scored": len(scored),
            "ties": sum(number.margin == 0.0 for number in scored.values()),
            "partial": sum(opinion.scored < annotators for opinion in known),
            "contested": sum(opinion.dissent > 0 for opinion in known),
            "confidence": sum(number.confidence for number in scored.values()),
            "disagreement": sum(decisions[i].disagreement or 0.0 for i in scored),
        }


class _Written(NamedTuple):
    """Of one shard: its number, what storage had against its file ("": nothing), its counts."""

    shard: int
    refused: str
    counts: str


class _Number(NamedTuple):
    """Of one pair: its margin (None where there is none), confidence, and weight."""

    margin: float | None
    confidence: float
    weight: float


@dataclass(frozen=True)
class _Numbers:
    """Of N pairs: margins, or None where there are none; confidences; weights as functions say."""

    margin: Floats | None
    confidence: Floats
    weight: Floats

    def rows(self) -> Iterator[_Number]:
        """Pair by pair."""
        margins = [None] * len(self.weight) if self.margin is None else self.margin.tolist()
        columns = (margins, self.confidence.tolist(), self.weight.tolist())
        return (_Number(*row) for row in zip(*columns, strict=True))


def _probability(margin: float | None) -> float | None:
    """The annotator's probability that the chosen answer is better, σ(m); None for a human's."""
    return None if margin is None else sigmoid(np.array([margin])).item()


def _check_own(context: Context, node: Node[WeighSettings], own: Own) -> None:
    """Refuses what `plan` refuses, by what `prepare` counted.

    Raises:
        OwnNumbersError: where too many of them cannot be used.
    """
    counts, most = context.counts(node.inputs["prepare"]), node.settings.most_void
    fault = void_fault(own, counts["void_numbers"], counts["rows_in"], most)
    if fault is not None:
        raise OwnNumbersError(fault)


def _mean_weight(shards: Shards, selection: Selection) -> float:
    """Of all preferences; 1 where there is no weight at all, which training refuses."""
    found = gather(partial(shards.weights, selection), shards.annotated.shards, WEIGHTS)
    found = found.sort_by("shard")  # so that the sum repeats to the bit
    pairs = sum(found["pairs"].to_pylist())
    return math.fsum(found["weight"].to_pylist()) / max(1, pairs) or 1.0


def _last(shards: Shards, top_fraction: float | None) -> tuple[float, str] | None:
    """The last pair of the top share.

    The driver holds 8 bytes of confidence and 36 of id a pair, and the confidences twice more
    while it looks for the last: 60 MB a million pairs. Measured at 1,000,448 pairs of two
    annotators, temperatures fitted: it grew by 98 MiB, Ray's own buffers among them.
    """
    if top_fraction is None:
        return None
    found = gather(shards.confidences, shards.annotated.shards, CONFIDENCES)
    confidences = found["confidence"].to_numpy()
    return last_of_top(confidences, found["pair_id"], top_fraction)


def _write(shards: Shards, selection: Selection) -> Counter[str]:
    """Writes every shard's preferences and returns the sums of their counts.

    Raises:
        StorageError: when storage refuses a write.
    """
    found = gather(partial(shards.write, selection), shards.annotated.shards, WRITTEN)
    totals: Counter[str] = Counter()
    for written in sorted(rows_of(_Written, found)):  # by shard, so that sums repeat to the bit
        if written.refused:
            raise StorageError(written.refused)
        totals.update(json.loads(written.counts))
    return totals


def _summary(totals: Counter[str], shards: Shards) -> dict[str, Any]:
    """The counts of the manifest; what only few arms have is there for them alone."""
    scored, selected, read = totals["scored"], totals["selected"], shards.annotated
    counts: dict[str, Any] = {
        "pairs": totals["pairs"],
        "selected": selected,
        "ties": totals["ties"],
        "mean_confidence": totals["confidence"] / scored if scored else None,
        "mean_weight": totals["weight"] / selected if selected else None,
    }
    if shards.divisor != 1.0:
        counts["weights_divided_by"] = shards.divisor
    if shards.own:
        counts |= {"without_numbers": totals["without"], "against_labels": totals["against"]}
        _tell_own(counts, shards.labels)
    if not scored or not read.scores:
        return counts
    counts["temperatures"] = [temperature * read.scale.joint for temperature in read.scale.members]
    if len(read.scores) > 1:
        counts["ensemble"] = {
            "annotators": len(read.scores),
            "partial": totals["partial"],
            "alone": totals["alone"],
            "contested": totals["contested"],
            "mean_disagreement": totals["disagreement"] / scored,
        }
    return counts


def _tell_own(counts: dict[str, Any], labels: LabelSource) -> None:
    """What of the data's own numbers a reader should look at.

    Raises:
        OwnNumbersError: where no pair can be weighed by them.
    """
    without, pairs, against = (counts[k] for k in ("without_numbers", "pairs", "against_labels"))
    if not pairs:
        what = "scores" if labels == "annotator" else f"a {labels} with a label that it is about"
        raise OwnNumbersError(
            f"weigh: none of {without} training pairs has {what}; see `cwpo plan`"
        )
    if without:
        logger.warning(
            "weigh: %d of %d training pairs have no number of their own that can be used, and are "
            "left out",
            *(without, without + pairs),
        )
    if against:
        logger.warning(
            "weigh: of %d of %d pairs the data's own scores prefer another answer than the label; "
            "the scores count",
            *(against, pairs),
        )


STAGE = Stage(WeighSettings, nodes, make, work)
