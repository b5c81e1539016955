"""People's judgements of some items and a model's of all in; one mean that uses both, out.

Prediction-powered inference with its power-tuned weight: PPI++ (Angelopoulos, Duchi and Zrnic 2023,
arXiv 2311.01453). The model may be as wrong as it likes: its mean over all items is corrected by
how far it is from people where both judged. It is only worth less then.

Shapes: N = items, of which people judged n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cwpo_dist.evaluation.shares import AsDict, Estimate, Floats, Groups, wilson
from cwpo_dist.evaluation.student import student

_NOTHING = 1e-20  # what is left by rounding where nothing varies


@dataclass(frozen=True)
class Powered(AsDict):
    """A mean of figures between 0 and 1, three times.

    Attributes:
        items: N.
        judged: n.
        people: by people's judgements alone.
        model: by the model's alone, whose interval says nothing of how wrong the model is.
        both: people's, made more exact by the model's.
        weight: λ, the model's part in it, from 0 (of no use) to 1.
        narrower: by which share of it the interval of `people` is wider; None without intervals.
    """

    items: int
    judged: int
    people: Estimate
    model: Estimate
    both: Estimate
    weight: float
    narrower: float | None


class _Sum(NamedTuple):
    """A mean, as far as chance is concerned a sum: [N] each item's deviation from what it expects.

    Attributes:
        value: the mean.
        deviations_N: whose sum over a prompt is one draw.
    """

    value: float
    deviations_N: Floats


def powered(people: Floats, model: Floats, groups: Groups) -> Powered:
    """The three means, each with its 95 % interval, clustered by prompt.

    θ(λ) = mean_n(y) + λ·(mean_{N−n}(f) − mean_n(f)), with the λ in [0, 1] whose variance is the
    smallest (the paper's section on power tuning; here over prompts). Intervals are Wilson's with
    Student's quantile, whose degrees of freedom are the prompts that people judged, less the
    parameters: the mean, or mean and λ. Of 50 items the normal's were right in 93 %.

    Args:
        people: [N] people's, 0 to 1; NaN where nobody judged. It was drawn by lot who judges what.
        model: [N] the model's, 0 to 1.
        groups: [N] a number for each prompt.
    """
    asked = ~np.isnan(people)
    alone, of_all = _mean(people, asked), _mean(model, np.ones_like(asked))
    here, elsewhere = _mean(model, asked), _mean(model, ~asked)
    known = asked.any() and not asked.all()
    gap = _Sum(elsewhere.value - here.value, elsewhere.deviations_N - here.deviations_N)
    weight, pull_G = _weight(alone, gap, groups) if known else (0.0, None)
    tuned = _Sum(alone.value + weight * gap.value, alone.deviations_N + weight * gap.deviations_N)
    of_people = _interval(alone, groups, asked)
    both = _interval(tuned, groups, asked, pull_G) if weight else of_people
    widths = [width for each in (both, of_people) if (width := _width(each)) is not None]
    return Powered(
        items=len(model),
        judged=int(asked.sum()),
        people=of_people,
        model=_interval(of_all, groups, np.ones_like(asked)),
        both=both,
        weight=weight,
        narrower=1 - widths[0] / widths[1] if len(widths) == 2 else None,
    )


def _mean(values_N: Floats, of_N: NDArray[np.bool_]) -> _Sum:
    """The mean of some items; zero of none."""
    if not of_N.any():
        return _Sum(0.0, np.zeros(len(values_N)))
    value = float(values_N[of_N].mean())
    return _Sum(value, np.where(of_N, values_N - value, 0.0) / of_N.sum())


def _weight(alone: _Sum, gap: _Sum, groups: Groups) -> tuple[float, Floats]:
    """λ = −Cov(θ(0), gap) / Var(gap), and each prompt's leverage on it; 0 where nothing is known.

    Without clusters λ is Cov(y, f) / ((1 + n/(N − n))·Var(f)).
    """
    ours_G, theirs_G = (np.bincount(groups, each.deviations_N) for each in (alone, gap))
    spread = float(theirs_G @ theirs_G)
    if spread < _NOTHING:
        return 0.0, np.zeros_like(theirs_G)
    return min(1.0, max(0.0, -float(ours_G @ theirs_G) / spread)), theirs_G**2 / spread


def _interval(
    found: _Sum, groups: Groups, judged: NDArray[np.bool_], pull_G: Floats | None = None
) -> Estimate:
    """The mean with Wilson's interval of the number of independent decisions that it is worth.

    That number is θ(1 − θ) over the variance; where nothing varies, a prompt is one decision. A
    prompt with a part in λ deviates less for it, as its own value was fitted: by 1 − its leverage
    (HC3, MacKinnon and White 1985).
    """
    prompts = len(np.unique(groups[judged]))
    freedom = prompts - (1 if pull_G is None else 2)
    value = min(1.0, max(0.0, found.value))
    if freedom < 1:
        return Estimate(value if prompts else None, None, None)
    kept_G = 1.0 if pull_G is None else np.maximum(0.01, 1 - pull_G)
    totals_G = np.bincount(groups, found.deviations_N) / kept_G
    variance, worth = prompts / (prompts - 1) * float(totals_G @ totals_G), float(prompts)
    if variance > _NOTHING and 0 < value < 1:
        worth = value * (1 - value) / variance
    return Estimate(value, *wilson(value * worth, worth, student(0.975, freedom)))


def _width(found: Estimate) -> float | None:
    return None if found.low is None or found.high is None else found.high - found.low
