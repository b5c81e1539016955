"""Margins and answer lengths in; how far a score is a matter of length, out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cwpo_dist.evaluation.shares import AsDict, Floats, check_lengths, column

LENGTH_PARTS = 10


@dataclass(frozen=True)
class Correlation(AsDict):
    """Pearson's and Spearman's coefficients; None where one side does not vary."""

    n: int
    pearson: float | None
    spearman: float | None


@dataclass(frozen=True)
class LengthGroup(AsDict):
    """Margins of the pairs whose length difference lies in one range.

    Attributes:
        length: mean length difference a − b.
        n: pairs in it.
        median: median margin a − b.
        low: its 10 % quantile.
        high: its 90 % quantile.
    """

    length: float
    n: int
    median: float
    low: float
    high: float


def margin_by_length(margin: Floats, longer: Floats) -> tuple[LengthGroup, ...]:
    """Ten parts of (nearly) equal size by length difference; none where there are fewer pairs."""
    if len(margin) < LENGTH_PARTS:
        return ()
    order = np.argsort(longer, kind="stable")
    return tuple(
        LengthGroup(
            length=float(longer[part].mean()),
            n=len(part),
            median=float(np.median(margin[part])),
            low=float(np.quantile(margin[part], 0.1)),
            high=float(np.quantile(margin[part], 0.9)),
        )
        for part in np.array_split(order, LENGTH_PARTS)
    )


def correlation(x: ArrayLike, y: ArrayLike) -> Correlation:
    """Pearson's and Spearman's (Pearson's of average ranks) coefficients of two columns."""
    first, second = column("x", x), column("y", y)
    check_lengths(first, y=second)
    return Correlation(
        n=len(first),
        pearson=_pearson(first, second),
        spearman=_pearson(_average_ranks(first), _average_ranks(second)),
    )


def _pearson(x: Floats, y: Floats) -> float | None:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    dx, dy = x - x.mean(), y - y.mean()
    return float(np.sum(dx * dy) / math.sqrt(float(np.sum(dx**2)) * float(np.sum(dy**2))))


def _average_ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values share the mean of the ranks that they take up."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[place]
    return ranks
