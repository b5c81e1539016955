"""Who decides which answer of a pair is the better one: the data's label, or the higher score."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from cwpo_dist.pairs.chosen import Label, chosen_first
from cwpo_dist.pairs.stored import Judgement, Pair

# The data's own scores are an annotator's; a weight or confidence of theirs is about their label.
# Mixed: people's of the labelled part, the annotators' elsewhere. Weighed, or cleaned: people's,
# which annotators judge.
LabelSource = Literal["human", "annotator", "mixed", "weighed", "cleaned", "weight", "confidence"]


@dataclass(frozen=True)
class Opinion:
    """What the annotators say of a pair.

    Attributes:
        margin: score difference a − b, of several annotators the mean.
        disagreement: standard deviation of several annotators' margins; None for one annotator.
        dissent: share of them that vote against the majority; 0 for one.
        scored: how many of them scored the pair.
        lead: how many more of them prefer a to b than b to a.
    """

    margin: float
    disagreement: float | None = None
    dissent: float = 0.0
    scored: int = 1
    lead: int = 0

    def denies(self, label: Label) -> bool:
        """Whether more of them prefer the other answer; a tie of votes, or margins of 0, do not."""
        return chosen_first(label, self.lead, -self.lead)[0] < 0


@dataclass(frozen=True)
class Decision:
    """The chosen answer of a pair.

    Attributes:
        label: which one it is.
        margin: r⁺ − r⁻ of the annotator, below 0 where it denies a label that it judges; None where
            the label decided alone.
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
    if who == "weighed" or who == "cleaned":
        return _judged(pair, opinion, drops=who == "cleaned")
    return _annotator(opinion) if who == "annotator" else _labelled(pair, who)


def _labelled(pair: Judgement | Pair, labels: LabelSource) -> Decision | None:
    """By the label; with a number of the data's own where that is what counts."""
    if pair.label is None:
        return None
    if labels == "human":
        return Decision(pair.label, None)
    number = pair.weight if labels == "weight" else pair.confidence
    return None if number is None else Decision(pair.label, None, given=number)


def _judged(pair: Judgement | Pair, opinion: Opinion | None, *, drops: bool) -> Decision | None:
    """By the label, with the margin for it; none without either, or if most deny it and that drops.

    What annotators could not score they did not judge: no weight of it is known.
    """
    if pair.label is None or opinion is None or (drops and opinion.denies(pair.label)):
        return None
    margin, _ = chosen_first(pair.label, opinion.margin, -opinion.margin)
    return Decision(pair.label, margin, opinion.disagreement)


def _annotator(opinion: Opinion | None) -> Decision | None:
    """The higher score wins (eq. 6); a tie goes to `a`, whose place is random, with margin 0."""
    if opinion is None:
        return None
    label: Label = "a" if opinion.margin >= 0 else "b"
    return Decision(label, abs(opinion.margin), opinion.disagreement)
