"""Probabilities and degrees of freedom in; quantiles and tails of Student's distribution out."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_GRID = 20_001
_AS_NORMAL = 1_000  # from so many degrees of freedom Student's interval is the normal's, to 0.2 %


def freedom_of(number: float) -> float:
    """Whole degrees of freedom, at least one; infinite, the normal's, where they are very many."""
    return math.inf if number >= _AS_NORMAL else max(1.0, math.floor(round(number, 6)))


@lru_cache(maxsize=4096)
def student(p: float, freedom: float) -> float:
    """Student's quantile, to 1e-4; the normal's for infinite freedom."""
    if math.isinf(freedom):
        return NormalDist().inv_cdf(p)
    theta, beyond = _student_grid(freedom)
    angle = float(np.interp(abs(p - 0.5), 0.5 - beyond, theta))
    return math.copysign(math.sqrt(freedom) * math.tan(angle), p - 0.5)


def student_tails(t: float, freedom: float) -> float:
    """The probability of a value of Student's further from zero than t, on both sides."""
    if math.isinf(freedom):
        return math.erfc(abs(t) / math.sqrt(2))
    theta, beyond = _student_grid(freedom)
    return 2 * float(np.interp(math.atan(abs(t) / math.sqrt(freedom)), theta, beyond))


@lru_cache(maxsize=64)  # some 300 KiB each
def _student_grid(freedom: float) -> tuple[Floats, Floats]:
    """θ, where t = √ν·tan θ has a density proportional to cos^(ν−1) θ, and what lies beyond it."""
    theta = np.linspace(0, math.pi / 2, _GRID)
    density = np.cos(theta) ** (freedom - 1)
    beyond = np.concatenate([np.cumsum((density[:0:-1] + density[-2::-1]) / 2)[::-1], [0]])
    return theta, beyond / beyond[0] / 2
