"""The annotators' margins in, which pairs people should label next out; pure numbers.

Shapes: N = pairs, K = annotators.
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
        worth: [N] of each candidate; the highest are asked for first.
        annotators: how many it needs.
    """

    worth: Callable[[Candidates], Floats]
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
}


def most_worth(worth: Floats, pair_ids: pa.ChunkedArray, budget: int) -> NDArray[np.intp]:
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
    chosen: NDArray[np.intp] = by_id[np.lexsort((-worth, rounds))[:budget]]
    return chosen
