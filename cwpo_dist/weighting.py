"""The annotator's margin in, a pair's confidence, weight and selection out; pure numbers.

Margins are differences of two scores, r⁺ − r⁻ ≥ 0 once the higher score is called chosen. The
functions take any finite margin, since the odd and even ones are told apart by their sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

WeightFunction = Callable[[float], float]


def sigmoid(margin: float) -> float:
    """σ(m), the probability that the higher-scored answer is the better one; never overflows."""
    if margin >= 0:
        return 1 / (1 + math.exp(-margin))
    decayed = math.exp(margin)
    return decayed / (1 + decayed)


def confidence(margin: float) -> float:
    """C = 2·(σ(m) − ½) (eq. 8), as tanh(m/2), which keeps small margins exact; a tie has 0."""
    return math.tanh(margin / 2)


def clipped(margin: float) -> float:
    """min(m, 1), never below zero."""
    return min(max(margin, 0.0), 1.0)


def clipped_fifth(margin: float) -> float:
    """min(0.2·m, 1), never below zero."""
    return min(max(0.2 * margin, 0.0), 1.0)


def one(margin: float) -> float:
    """1 for every pair: the unweighted baseline on the same labels."""
    return 1.0


# Keyed by `weigh.weight_function`; the paper's comparison of weight functions.
WEIGHT_FUNCTIONS: dict[str, WeightFunction] = {
    "confidence": confidence,
    "sigmoid": sigmoid,
    "clipped": clipped,
    "clipped_fifth": clipped_fifth,
    "one": one,
}


def select(
    confidences: Sequence[float],
    pair_ids: Sequence[str],
    top_fraction: float | None = None,
    min_confidence: float | None = None,
) -> list[bool]:
    """Which pairs to keep: the most confident share, among those confident enough.

    The share is of all pairs given, ⌈top_fraction · n⌉ of them (so a small set never becomes
    empty), and ties in confidence go to the smaller `pair_id`: the choice is the same in
    whatever order the pairs stand. Both limits must hold for a pair to stay.

    Args:
        confidences: one a pair.
        pair_ids: one a pair, distinct.
        top_fraction: in [0, 1]; None keeps all.
        min_confidence: keep confidences at or above it; None keeps all.

    Returns:
        One flag a pair, in the order given.

    Raises:
        ValueError: for a confidence that is not finite, lengths that differ, or a repeated id.
    """
    _check_selection(confidences, pair_ids, top_fraction)
    kept = [min_confidence is None or value >= min_confidence for value in confidences]
    if top_fraction is None:
        return kept
    order = sorted(range(len(pair_ids)), key=lambda i: (-confidences[i], pair_ids[i]))
    top = set(order[: top_count(len(pair_ids), top_fraction)])
    return [keep and i in top for i, keep in enumerate(kept)]


def top_count(n: int, top_fraction: float) -> int:
    """⌈top_fraction · n⌉, with 0.3 · 10 taken as 3 and not as the float just above it."""
    return min(n, math.ceil(round(top_fraction * n, 9)))


def _check_selection(
    confidences: Sequence[float], pair_ids: Sequence[str], top_fraction: float | None
) -> None:
    if len(confidences) != len(pair_ids):
        raise ValueError(
            f"pair_ids: {len(pair_ids)} ids for {len(confidences)} confidences; give one a pair"
        )
    if len(set(pair_ids)) != len(pair_ids):
        raise ValueError("pair_ids: an id stands twice; merge duplicate pairs before selecting")
    if top_fraction is not None and not 0.0 <= top_fraction <= 1.0:
        raise ValueError(f"top_fraction: {top_fraction} is not in [0, 1]; 0.3 keeps 30 %")
    for pair, value in zip(pair_ids, confidences, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"confidence: {value} of pair {pair!r}; reject pairs without a score")
