"""One shard's pairs and what annotators say of them in; its preferences and their counts out.

Each shard is a Ray task that decides alone; `stages/weigh.py` puts together what they say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cwpo_dist.config import WeighPairing
from cwpo_dist.evaluation.shares import Floats
from cwpo_dist.pairs.chosen import chosen_first
from cwpo_dist.pairs.labels import Decision, LabelSource, Opinion, decide
from cwpo_dist.pairs.preferences import Preference, preference_schema, product_table
from cwpo_dist.pairs.records import Kind, prompt_of, table_of
from cwpo_dist.pairs.stored import Pair
from cwpo_dist.runs.annotations import Annotated
from cwpo_dist.scoring.pipeline import counted, part, read_counts
from cwpo_dist.storage import StorageError, Store
from cwpo_dist.weighting import Selection, confidence, margin_of, sigmoid, weights

CONFIDENCES = pa.schema([("pair_id", pa.string()), ("confidence", pa.float64())])
WEIGHTS = pa.schema([("shard", pa.int64()), ("weight", pa.float64()), ("pairs", pa.int64())])
WRITTEN = pa.schema([("shard", pa.int64()), ("refused", pa.string()), ("counts", pa.string())])
ENDS = pa.schema([("negative_margin", pa.float64()), ("pair_id", pa.string())])

# (−margin, pair_id) of the pair of a prompt whose scores lie furthest apart: the least of them all,
# so that of several such it is that of the least id.
Furthest = tuple[float, str]


@dataclass(frozen=True)
class Weighing:
    """How one shard is weighed, and all that a task needs for it.

    Attributes:
        annotated: the pairs and what the annotators say of them.
        output: the folder of this stage.
        labels: whose choice counts; that of people is certain.
        own: whether the data's own numbers decide alone.
        splits: the splits to train on.
        weight_function: its name.
        divisor: the mean weight, where weights are divided by it.
        message_keys: what the run's messages have beside role and content, and `tools`.
        kind: what prompts and answers are, also those of a shard without pairs.
        messages: whether text is written as the messages that the policy's template gets of it.
        pairing: which pairs of a prompt are kept.
        elsewhere: prompt → the pair that is kept of it, where its pairs may lie in several shards.
    """

    annotated: Annotated
    output: Store
    labels: LabelSource
    own: bool
    splits: tuple[str, ...]
    weight_function: str
    kind: Kind
    divisor: float = 1.0
    message_keys: tuple[str, ...] = ()
    messages: bool = False
    pairing: WeighPairing = "given"
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def at_the_ends(self, index: int) -> pa.Table:
        """The furthest pair of a shard's first prompt and of its last, which others may have too.

        Pairs are sorted by ids that begin with their prompt's, so that no other prompt has any
        elsewhere.
        """
        found = list(self._furthest(self._decided(index)).values())
        ends = dict.fromkeys(found[:1] + found[-1:])
        return pa.table([*zip(*ends, strict=True)] or [[], []], schema=ENDS)

    def confidences(self, index: int) -> pa.Table:
        """Ids and confidences of one shard's pairs."""
        decisions = self._kept(self._decided(index))
        found = {"pair_id": list(decisions), "confidence": self._numbers(decisions).confidence}
        return pa.table(found, schema=CONFIDENCES)

    def weights(self, selection: Selection, index: int) -> pa.Table:
        """The sum of one shard's weights, and of how many pairs."""
        decisions = self._kept(self._decided(index))
        numbers = self._numbers(decisions)
        sure = zip(decisions, numbers.confidence.tolist(), strict=True)
        selected = numbers.weight[[selection.selects(value, pair_id) for pair_id, value in sure]]
        row = {"shard": [index], "weight": [math.fsum(selected)], "pairs": [len(selected)]}
        return pa.table(row, schema=WEIGHTS)

    def _decided(self, index: int) -> dict[str, Decision]:
        opinions, _ = self.annotated.opinions(index)
        return decide(self.annotated.judgements(index), opinions, self.labels, self.splits)

    def _furthest(self, decisions: dict[str, Decision]) -> dict[str, Furthest]:
        """Of each prompt of one shard, in the order of the shard."""
        found: dict[str, Furthest] = {}
        for pair_id, number in zip(decisions, self._numbers(decisions).rows(), strict=True):
            assert number.margin is not None, "plan refuses to pair by what has no margin"
            this, prompt = (-number.margin, pair_id), prompt_of(pair_id)
            found[prompt] = min(found.get(prompt, this), this)
        return found

    def _kept(self, decisions: dict[str, Decision]) -> dict[str, Decision]:
        """All of them, or one a prompt."""
        if self.pairing == "given":
            return decisions
        kept = {prompt: pair_id for prompt, (_, pair_id) in self._furthest(decisions).items()}
        kept |= {prompt: self.elsewhere[prompt] for prompt in kept.keys() & self.elsewhere.keys()}
        return {i: decision for i, decision in decisions.items() if kept[prompt_of(i)] == i}

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
        return table_of([Written(index, refused, json.dumps(counts))], WRITTEN)

    def _weighed(self, index: int, selection: Selection) -> tuple[pa.Table, dict[str, float]]:
        """The preferences of one shard, and numbers that add up over all of them."""
        pairs = self.annotated.read(index)
        opinions, alone = self.annotated.opinions(index)
        decisions = decide(pairs, opinions, self.labels, self.splits)
        numbers = dict(zip(decisions, self._numbers(decisions).rows(), strict=True))
        selected = list(self._preferences(pairs, self._kept(decisions), numbers, selection))
        of_splits = {pair.pair_id: pair for pair in pairs if pair.split in self.splits}
        counts = self._counts(decisions, opinions or {}, numbers)
        counts |= {
            "selected": len(selected),
            "weight": math.fsum(numbers[each.pair_id].weight for each in selected),
            "alone": len(of_splits.keys() & alone),
        }
        if self.own:
            counts |= _own_counts(of_splits, decisions)
        if self.labels in {"weighed", "cleaned"}:
            counts |= _judged_counts(of_splits, opinions or {}, decisions)
        return self._table(selected), counts

    def _table(self, selected: list[Preference]) -> pa.Table:
        """As text or, what was text too where it is asked for, as messages."""
        kind: Kind = "conversational" if self.messages else self.kind
        if kind != self.kind:
            selected = [each.as_messages() for each in selected]
        more = set(self.message_keys)
        schema = preference_schema(kind, keys=bool(more - {"tools"}), tools="tools" in more)
        return product_table(Preference, selected, schema)

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
        if self.labels in {"weight", "confidence"}:
            return self._as_given(np.array([d.given for d in decisions.values()], dtype=np.float64))
        # Where people decided there is none: of a label that is certain it would be infinite.
        known = (np.inf if d.margin is None else d.margin for d in decisions.values())
        margin = np.fromiter(known, np.float64, count)
        disagreement = np.array([d.disagreement or 0.0 for d in decisions.values()])
        weight = weights(self.weight_function, margin, disagreement)
        return _Numbers(margin, confidence(np.maximum(margin, 0.0)), weight)

    def _as_given(self, given: Floats) -> _Numbers:
        """By the weights or confidences that the data have."""
        count = len(given)
        if self.labels == "weight":
            plain = self.weight_function == "one"
            return _Numbers(None, np.ones(count), np.ones(count) if plain else given)
        margin = margin_of(given)
        # To the bit, which there and back again would not be.
        as_given = self.weight_function == "confidence"
        weight = given if as_given else weights(self.weight_function, margin, np.zeros(count))
        return _Numbers(margin, given, weight)

    def _counts(
        self,
        decisions: dict[str, Decision],
        opinions: dict[str, Opinion],
        numbers: dict[str, _Number],
    ) -> dict[str, float]:
        scored = {i: n for i, n in numbers.items() if n.margin is not None}
        known = [opinions[i] for i in scored.keys() & opinions.keys()]
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


class Written(NamedTuple):
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
        margins = [None if m == np.inf else m for m in margins]
        columns = (margins, self.confidence.tolist(), self.weight.tolist())
        return (_Number(*row) for row in zip(*columns, strict=True))


def _own_counts(pairs: dict[str, Pair], decisions: dict[str, Decision]) -> dict[str, float]:
    """Of the data's own numbers: pairs without them, and those whose scores deny their label."""
    labels = {i: pairs[i].label for i, decision in decisions.items() if decision.margin}
    against = (label not in {None, decisions[i].label} for i, label in labels.items())
    return {"without": len(pairs) - len(decisions), "against": sum(against)}


def _judged_counts(
    pairs: dict[str, Pair], opinions: dict[str, Opinion], decisions: dict[str, Decision]
) -> dict[str, float]:
    """Of people's labels: those that nobody judged, those that most deny, those dropped for it."""
    labels = {i: pair.label for i, pair in pairs.items() if pair.label is not None}
    denied = {i for i in labels.keys() & opinions.keys() if opinions[i].denies(labels[i])}
    dropped = len(denied - decisions.keys())
    return {
        "unjudged": len(labels.keys() - opinions.keys()),
        "denied": len(denied),
        "dropped": dropped,
    }


def _probability(margin: float | None) -> float | None:
    """The annotator's probability that the chosen answer is better, σ(m); None for a human's."""
    return None if margin is None else sigmoid(np.array([margin])).item()
