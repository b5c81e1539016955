"""Who decides which answer of a pair is the better one: the data's label, or the higher score."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from cwpo_dist.pairs.chosen import Label
from cwpo_dist.pairs.stored import Judgement, Pair

# The data's own scores are an annotator's; a weight or confidence of theirs is about their label.
# Mixed: people's of the labelled part, the annotators' elsewhere.
LabelSource = Literal["human", "annotator", "mixed", "weight", "confidence"]


@dataclass(frozen=True)
class Opinion:
    """What the annotators say of a pair.

    Attributes:
        margin: score difference a − b, of several annotators the mean.
        disagreement: standard deviation of several annotators' margins; None for one annotator.
        dissent: share of them that vote against the majority; 0 for one.
        scored: how many of them scored the pair.
    """

    margin: float
    disagreement: float | None = None
    dissent: float = 0.0
    scored: int = 1


@dataclass(frozen=True)
class Decision:
    """The chosen answer of a pair.

    Attributes:
        label: which one it is.
        margin: r⁺ − r⁻ ≥ 0 of the annotator; None where the label decided.
        disagreement: of several annotators; None for one, and where the label decided.
        given: the data's own weight or confidence, where that counts.
    """

    label: Label
    margin: float | None
    disagreement: float | None = None
    given: float | None = None


def decide(
    pairs: Iterable[Judgement | Pair],
    opinions: Mapping[str, Opinion] | None,
    labels: LabelSource,
    splits: Collection[str],
) -> dict[str, Decision]:
    """The decisions for one shard, by pair id, in the order of the pairs.

    Args:
        pairs: of the shard, with or without their texts.
        opinions: by pair id; None in a run without annotator. Where a run has one, pairs that it
            could not read are left out for human labels too, so that all arms train on the same
            pairs; labelled rows, which it trained on, need no score.
        labels: whose word counts. A human label is read for `human`, and for the data's own weight
            or confidence, without which a pair is left out.
        splits: the splits to train on.
    """
    decisions = {}
    for pair in pairs:
        if pair.split not in splits:
            continue
        opinion = None if opinions is None else opinions.get(pair.pair_id)
        if opinions is not None and opinion is None and pair.split != "labelled":
            continue
        decision = _decision(pair, opinion, labels)
        if decision is not None:
            decisions[pair.pair_id] = decision
    return decisions


def _decision(
    pair: Judgement | Pair, opinion: Opinion | None, labels: LabelSource
) -> Decision | None:
    """By whose word counts for this pair."""
    who = labels
    if labels == "mixed":
        who = "human" if pair.split == "labelled" else "annotator"
    return _annotator(opinion) if who == "annotator" else _labelled(pair, who)


def _labelled(pair: Judgement | Pair, labels: LabelSource) -> Decision | None:
    """By the label; with a number of the data's own where that is what counts."""
    if pair.label is None:
        return None
    if labels == "human":
        return Decision(pair.label, None)
    number = pair.weight if labels == "weight" else pair.confidence
    return None if number is None else Decision(pair.label, None, given=number)


def _annotator(opinion: Opinion | None) -> Decision | None:
    """The higher score wins (eq. 6); a tie goes to `a`, whose place is random, with margin 0."""
    if opinion is None:
        return None
    label: Label = "a" if opinion.margin >= 0 else "b"
    return Decision(label, abs(opinion.margin), opinion.disagreement)
