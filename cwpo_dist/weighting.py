"""The annotators' margins in, a pair's confidence, weight and selection out; pure numbers.

Margins are differences of two scores, r⁺ − r⁻ ≥ 0 once the higher score is called chosen. The
functions take any finite margin, since the odd and even ones are told apart by their sign, and
numbers or arrays alike.

Shapes: N = pairs, K = annotators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Floats = NDArray[np.float64]
WeightFunction = Callable[[Floats], Floats]


def sigmoid(margin: Floats) -> Floats:
    """σ(m), the probability that the higher-scored answer is the better one; never overflows."""
    probability: Floats = (1 + np.tanh(margin / 2)) / 2
    return probability


def confidence(margin: Floats) -> Floats:
    """C = 2·(σ(m) − ½) (eq. 8), as tanh(m/2), which keeps small margins exact; a tie has 0."""
    value: Floats = np.tanh(margin / 2)
    return value


def margin_of(confidence: Floats) -> Floats:
    """The margin m ≥ 0 of a confidence in [0, 1]: eq. 8 turned round; for 1 the largest finite."""
    value: Floats = 2 * np.arctanh(np.minimum(confidence, np.nextafter(1.0, 0.0)))
    return value


def clipped(margin: Floats) -> Floats:
    """min(m, 1), never below zero."""
    return np.clip(margin, 0.0, 1.0)


def clipped_fifth(margin: Floats) -> Floats:
    """min(0.2·m, 1), never below zero."""
    return np.clip(0.2 * margin, 0.0, 1.0)


def one(margin: Floats) -> Floats:
    """1 for every pair: the unweighted baseline on the same labels."""
    return np.ones_like(margin)


def madpo(margin: Floats) -> Floats:
    """MADPO (arXiv 2510.05342): σ(c·m) / σ(m), and 1 where m ≤ −τ; never overflows.

    c = ½ + 3/2 · σ(τ − |m| − ln 2) falls from nearly 2 for small |m| through 1 at |m| = τ to ½. So
    a pair that the annotator is unsure of counts up to 1.21, a surer one than τ a little below 1,
    and one whose label it denies next to nothing, unless it is surer than τ of that. Formula and
    numbers are those of the author's code: c_max = 2, c_min = ½, λ = 1 and τ = ln 999, the margin
    of a probability of 99.9 %.
    """
    tau = math.log(999)
    kept = np.maximum(margin, -tau)  # where the formula is 1, too
    c = 0.5 + 1.5 * sigmoid(tau - np.abs(kept) - math.log(2))
    weight: Floats = np.exp(np.logaddexp(0.0, -kept) - np.logaddexp(0.0, -c * kept))
    return weight


def lower_confidence(margin: Floats, disagreement: Floats) -> Floats:
    """C(max(0, m̄ − s)): the confidence that is left one standard deviation below the mean.

    Reward ensembles are used at a lower bound, because where members differ the mean rewards
    errors (Coste et al. 2024, whose uncertainty-weighted form takes off the members' variance;
    the standard deviation has the margin's own unit). One annotator, or several that agree, give C.
    """
    return confidence(np.maximum(0.0, margin - disagreement))


# Keyed by `weigh.weight_function`; the paper's comparison of weight functions, and another's.
WEIGHT_FUNCTIONS: dict[str, WeightFunction] = {
    "confidence": confidence,
    "sigmoid": sigmoid,
    "clipped": clipped,
    "clipped_fifth": clipped_fifth,
    "one": one,
    "madpo": madpo,
}
# Those that also read what an ensemble's members differ by.
ENSEMBLE_FUNCTIONS: dict[str, Callable[[Floats, Floats], Floats]] = {
    "lower_confidence": lower_confidence,
}


def weights(name: str, margin: Floats, disagreement: Floats) -> Floats:
    """The weight of each pair by the function of that name.

    Args:
        name: a key of `WEIGHT_FUNCTIONS` or `ENSEMBLE_FUNCTIONS`.
        margin: [N], over its temperature.
        disagreement: [N], in the margin's unit; 0 for one annotator.
    """
    if name in ENSEMBLE_FUNCTIONS:
        return ENSEMBLE_FUNCTIONS[name](margin, disagreement)
    return WEIGHT_FUNCTIONS[name](margin)


@dataclass(frozen=True)
class Scale:
    """What margins are divided by before they are confidences.

    Raw margins of annotators trained with the Bradley–Terry loss are log-odds, all on one scale
    in name; fitted temperatures make them so in fact.

    Attributes:
        members: one temperature an annotator, which makes their margins comparable.
        joint: the temperature of their mean.
    """

    members: tuple[float, ...]
    joint: float = 1.0

    @classmethod
    def raw(cls, annotators: int, joint: float = 1.0) -> Scale:
        """Margins as they are, their mean divided by `joint`."""
        return cls((1.0,) * annotators, joint)


@dataclass(frozen=True)
class Joined:
    """What K annotators say of N pairs together.

    Attributes:
        margin: [N] m̄ = mean_k m_k / T_k, a − b, over T; NaN where too few annotators scored.
        disagreement: [N] s, the standard deviation of the same margins over the annotators.
        dissent: [N] the share of annotators that vote against the majority; at most ½.
        lead: [N] how many more of them vote for a than for b.
        scored: [N] how many annotators scored the pair.
    """

    margin: Floats
    disagreement: Floats
    dissent: Floats
    lead: NDArray[np.intp]
    scored: NDArray[np.intp]


def needed(annotators: int) -> int:
    """How many annotators must have scored a pair for it to be used: two of an ensemble.

    Of one score alone no disagreement is known, and to count it as none would trust those pairs
    most of which least is known.
    """
    return min(2, annotators)


def join(margins_NK: Floats, scale: Scale) -> Joined:
    """Mean margin and disagreement of several annotators.

    The result is the same, to the bit, in whatever order the annotators stand; of identical ones
    it is their margin and 0.

    Args:
        margins_NK: score differences a − b, NaN where an annotator has no score.
        scale: the temperatures.
    """
    scaled_NK = np.sort(margins_NK / (np.array(scale.members) * scale.joint), axis=1)  # NaN last
    known_NK = np.isfinite(scaled_NK)
    scored = known_NK.sum(axis=1)
    counts = np.maximum(scored, 1)
    lowest_N = np.where(scored > 0, scaled_NK[:, 0], 0.0)
    # Differences to the lowest: equal margins leave exact zeros, which means of sums would not.
    above_NK = np.where(known_NK, scaled_NK - lowest_N[:, None], 0.0)
    mean_N = above_NK.sum(axis=1) / counts
    spread_NK = np.where(known_NK, above_NK - mean_N[:, None], 0.0)
    votes_a, votes_b = (scaled_NK > 0).sum(axis=1), (scaled_NK < 0).sum(axis=1)
    enough = scored >= needed(margins_NK.shape[1])
    return Joined(
        margin=np.where(enough, lowest_N + mean_N, np.nan),
        disagreement=np.sqrt((spread_NK**2).sum(axis=1) / counts),
        dissent=np.minimum(votes_a, votes_b) / counts,
        lead=votes_a - votes_b,
        scored=scored,
    )


@dataclass(frozen=True)
class Selection:
    """Which pairs are selected: each is decided alone, so shards need not know each other.

    Attributes:
        last: confidence and id of the last pair of the top share; None selects all.
        min_confidence: select confidences at or above it; None selects all.
    """

    last: tuple[float, str] | None = None
    min_confidence: float | None = None

    def selects(self, confidence: float, pair_id: str) -> bool:
        """Whether both limits hold."""
        if self.min_confidence is not None and confidence < self.min_confidence:
            return False
        return self.last is None or (-confidence, pair_id) <= (-self.last[0], self.last[1])


NOTHING = (math.inf, "")  # no pair is so confident: the last of an empty share


def last_of_top(
    confidences: Floats, pair_ids: pa.ChunkedArray, top_fraction: float
) -> tuple[float, str]:
    """Confidence and id of the last pair of the most confident share.

    The share is ⌈top_fraction · N⌉ of all pairs given (so a small set never becomes empty), and
    ties in confidence go to the smaller `pair_id`: the choice is the same in whatever order the
    pairs stand.

    Args:
        confidences: [N], from 0 to 1.
        pair_ids: [N].
        top_fraction: from 0 to 1.
    """
    count = top_count(len(confidences), top_fraction)
    if count == 0:
        return NOTHING
    last = float(np.partition(-confidences, count - 1)[count - 1])
    above = int(np.sum(-confidences < last))
    tied = sorted(pair_ids.filter(pa.array(-confidences == last)).to_pylist())
    return -last, tied[count - 1 - above]


def top_count(n: int, top_fraction: float) -> int:
    """⌈top_fraction · n⌉, with 0.3 · 10 taken as 3 and not as the float just above it."""
    return min(n, math.ceil(round(top_fraction * n, 9)))
