"""The annotators' margins in, which pairs people should label next out; pure numbers.

Shapes: N = pairs, K = annotators, H = numbers of a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cwpo_dist.pairs.records import prompts_of, unit_hash
from cwpo_dist.weighting import Floats, Joined, Scale, join, sigmoid

Places = NDArray[np.intp]
RIDGE = 0.3  # of `informative`, for differences whose mean square length is about 1
_BLOCK = 65_536  # pairs


@dataclass(frozen=True)
class Candidates:
    """Pairs that nobody has labelled.

    Attributes:
        pair_ids: [N].
        margins_NK: score differences a − b of each annotator, all finite; K = 0 without any.
        seed: of what is drawn.
    """

    pair_ids: list[str]
    margins_NK: Floats
    seed: int


@dataclass(frozen=True)
class Strategy:
    """What a label of a pair is taken to be worth.

    Attributes:
        worth: [N] of each candidate; the highest are asked for first. None: it hangs on what else
            is asked for, see `informative`.
        annotators: how many it needs.
    """

    worth: Callable[[Candidates], Floats] | None
    annotators: int


def _drawn(given: Candidates) -> Floats:
    """By lot, from seed and id: the baseline."""
    return np.array([unit_hash(given.seed, "ask", name) for name in given.pair_ids], np.float64)


def _uncertain(given: Candidates) -> Floats:
    """−|m̄|: uncertainty sampling, the pairs whose label the annotators know least."""
    return -np.abs(_joined(given).margin)


def _disagree(given: Candidates) -> Floats:
    """The standard deviation of σ(m_k) over the annotators: query by committee.

    Of probabilities and not of margins: two annotators that are sure of one answer, one of them
    twice as sure, do not differ about its label.
    """
    deviation: Floats = np.std(sigmoid(given.margins_NK), axis=1)
    return deviation


def _delta_ucb(given: Candidates) -> Floats:
    """|m̄| + s: the pairs whose answers may be furthest apart (ActiveUltraFeedback's DeltaUCB).

    arXiv 2603.09692 adds up the uncertainties of the two rewards. Bradley–Terry rewards have no
    zero point, so that annotators can be compared by their margins alone: s is the standard
    deviation of these. It is meant to find pairs that teach a policy; an annotator learns less from
    them than from any (BENCHMARKS.md).
    """
    joined = _joined(given)
    return np.abs(joined.margin) + joined.disagreement


def _joined(given: Candidates) -> Joined:
    return join(given.margins_NK, Scale.raw(given.margins_NK.shape[1]))


STRATEGIES: dict[str, Strategy] = {
    "random": Strategy(_drawn, 0),
    "uncertain": Strategy(_uncertain, 1),
    "disagree": Strategy(_disagree, 2),
    "delta_ucb": Strategy(_delta_ucb, 2),
    "information": Strategy(None, 1),
}


def informative(
    x_NH: NDArray[np.floating], chance_N: Floats, past_HH: Floats, prompts_N: Places, budget: int
) -> list[int]:
    """Greedy D-optimal design (arXiv 2502.04354): each pick adds most to log det M.

    M is the curvature of the Bradley–Terry loss at the present head: `past_HH`, and p(1 − p)·x·xᵀ
    of each pick, which adds log(1 + p(1 − p)·xᵀM⁻¹x). Pairs like those picked are worth less then.

    Args:
        x_NH: differences of the answers' last hidden states.
        chance_N: p(1 − p).
        past_HH: M before the first pick, ridge included.
        prompts_N: a second pair of a prompt comes behind the first pairs of all.
        budget: how many at most.

    Returns:
        The places of the picks, in their order.
    """
    inverse = np.linalg.inv(past_HH)
    spread_N = np.einsum("nh,nh->n", x_NH @ inverse.astype(x_NH.dtype), x_NH, dtype=np.float64)
    rounds = np.zeros(len(x_NH))
    picked: list[int] = []
    for _ in range(min(budget, len(x_NH))):
        best = int(np.where(rounds == rounds.min(), chance_N * spread_N, -1.0).argmax())
        picked.append(best)
        rounds[prompts_N == prompts_N[best]] += 1
        rounds[best] = np.inf
        direction = inverse @ x_NH[best]
        factor = chance_N[best] / (1 + chance_N[best] * spread_N[best])  # Sherman and Morrison's
        spread_N = spread_N - factor * (x_NH @ direction.astype(x_NH.dtype)) ** 2
        inverse -= factor * np.outer(direction, direction)
    return picked


def whitened(x_NH: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same in other coordinates, in which Σ x·xᵀ is N/H times the identity.

    A ridge then asks for no unit of states, of which few numbers are often far larger than others.
    """
    blocks = range(0, len(x_NH), _BLOCK)
    sums = (part.T @ part for k in blocks for part in [x_NH[k : k + _BLOCK].astype(np.float64)])
    values, vectors = np.linalg.eigh(sum(sums) / len(x_NH))
    kept = values > 1e-9 * values[-1]
    turn = vectors[:, kept] / np.sqrt(values[kept] * kept.sum())
    return np.concatenate([(x_NH[k : k + _BLOCK] @ turn).astype(np.float32) for k in blocks])


def most_worth(worth: Floats, pair_ids: pa.ChunkedArray, budget: int) -> Places:
    """The places of the pairs to ask for, the first one first.

    A second pair of a prompt comes behind the first pairs of all prompts, a third behind all second
    ones: labels of one prompt say much the same. Equal worth goes by the smaller id, so that the
    choice is the same in whatever order the pairs stand.

    Args:
        worth: [N].
        pair_ids: [N].
        budget: how many at most.
    """
    by_id = pc.sort_indices(pair_ids).to_numpy()  # which begins with the prompt's
    prompts, worth = prompts_of(pair_ids.take(by_id)).combine_chunks(), worth[by_id]
    first = np.ones(len(by_id), bool)
    first[1:] = pc.not_equal(prompts[1:], prompts[:-1]).to_numpy(zero_copy_only=False)
    order = np.lexsort((-worth, np.cumsum(first)))  # stable, as all sorting here
    starts = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    rounds = np.empty(len(order), np.intp)
    rounds[order] = np.arange(len(order)) - starts
    chosen: Places = by_id[np.lexsort((-worth, rounds))[:budget]]
    return chosen
