"""Who decides which answer of a pair is the better one: the human label, or the higher score."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

LabelSource = Literal["human", "annotator"]


@dataclass(frozen=True)
class Decision:
    """The chosen answer of a pair.

    Attributes:
        label: `a` or `b`.
        margin: r⁺ − r⁻ ≥ 0 of the annotator; None where a human decided.
    """

    label: str
    margin: float | None


def decide(
    pairs: Iterable[Mapping[str, Any]],
    scores: Mapping[str, tuple[float, float]] | None,
    labels: LabelSource,
    splits: Collection[str],
) -> dict[str, Decision]:
    """The decisions for one shard, by pair id, in the order of the pairs.

    Args:
        pairs: records with `pair_id`, `label` and `split`.
        scores: (score_a, score_b) by pair id; None in a run without annotator. Where a run has
            one, pairs that it could not read are left out for human labels too, so that all arms
            train on the same pairs; labelled rows, which it trained on, need no score.
        labels: whose word counts. A human label is read for `human` alone.
        splits: the splits to train on.
    """
    decisions = {}
    for pair in pairs:
        if pair["split"] not in splits:
            continue
        score = None if scores is None else scores.get(pair["pair_id"])
        if scores is not None and score is None and pair["split"] != "labelled":
            continue
        decision = _human(pair["label"]) if labels == "human" else _annotator(score)
        if decision is not None:
            decisions[pair["pair_id"]] = decision
    return decisions


def _human(label: str | None) -> Decision | None:
    return None if label is None else Decision(label, None)


def _annotator(score: tuple[float, float] | None) -> Decision | None:
    """The higher score wins (eq. 6); a tie goes to `a`, whose place is random, with margin 0."""
    if score is None:
        return None
    score_a, score_b = score
    return Decision("a" if score_a >= score_b else "b", abs(score_a - score_b))
