"""One figure of several trials, seed by seed and item by item, in; means and intervals out.

A seed draws split, initialisation and order anew. Two sources of chance are seen: between seeds,
and between the items of one seed. The interval is the wider of two, so that neither few seeds that
happen to agree nor few items make it too narrow: Student's over the seeds' means, and the normal's
over items, clustered by prompt, across all seeds.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cwpo_dist.evaluation.shares import Z95, AsDict, Floats, clustered_error, group_numbers

POWER = 0.8
_GRID = 20_001


@dataclass(frozen=True)
class Items:
    """One figure's items of one seed.

    Attributes:
        names: [N] of the items (pair ids).
        prompts: [N] what tells prompts apart.
        values: [N] 1, 0 or between (accuracy), or any number.
    """

    names: Sequence[str]
    prompts: Sequence[Hashable]
    values: Floats


@dataclass(frozen=True)
class Mean(AsDict):
    """A mean over seeds.

    Attributes:
        seeds: how many.
        items: over all seeds.
        mean: of the seeds' means; None without items.
        low: lower end of its 95 % interval; None where nothing varies or one item is all.
        high: upper end.
        smallest: the smallest true effect that such a run finds with 80 % probability at the 5 %
            level, (t_0.975 + t_0.8) standard errors.
        values: the mean of each seed.
    """

    seeds: int
    items: int
    mean: float | None
    low: float | None
    high: float | None
    smallest: float | None
    values: tuple[float, ...] = ()


def over_seeds(found: Sequence[Items]) -> Mean:
    """The mean of a figure."""
    filled = [items for items in found if len(items.values)]
    if not filled:
        return Mean(0, 0, None, None, None, None)
    means = np.array([items.values.mean() for items in filled])
    n, count = len(filled), sum(len(items.values) for items in filled)
    bounds = [_of_seeds(means), _of_items(filled)]
    half, smallest = max(bounds, key=lambda bound: bound[0])
    middle, values = float(means.mean()), tuple(means.tolist())
    if not half:
        return Mean(n, count, middle, None, None, None, values)
    return Mean(n, count, middle, middle - half, middle + half, smallest, values)


def paired(ours: Mapping[int, Items], theirs: Mapping[int, Items]) -> Mean:
    """The mean difference, ours − theirs, on the items and seeds that both have."""
    differences = []
    for seed in sorted(ours.keys() & theirs.keys()):
        other = dict(zip(theirs[seed].names, theirs[seed].values.tolist(), strict=True))
        places = [k for k, name in enumerate(ours[seed].names) if name in other]
        names = [ours[seed].names[k] for k in places]
        values = ours[seed].values[places] - np.array([other[name] for name in names])
        prompts = [ours[seed].prompts[k] for k in places]
        differences.append(Items(names, prompts, values))
    return over_seeds(differences)


def length_balanced(items: Items, longer_by: Floats) -> Items:
    """Items whose mean counts pairs whose longer and whose shorter answer is preferred alike.

    What follows length alone is right in one half of them then, however often people prefer the
    longer answer. An item's value is the balanced mean plus the item's own influence on it, so that
    means, differences and intervals over these items are those of the balanced figure.

    Args:
        items: N of them.
        longer_by: [N] by how much the preferred answer is longer; where 0, the item is left out.

    Returns:
        No items where one side has none.
    """
    selected = np.flatnonzero(longer_by)
    values, longer = items.values[selected], longer_by[selected] > 0
    if longer.all() or not longer.any():
        return Items([], [], np.array([]))
    means = values[longer].mean(), values[~longer].mean()
    alike = len(selected) / (2 * np.where(longer, longer.sum(), (~longer).sum()))
    influence = alike * (values - np.where(longer, *means))
    places = selected.tolist()
    names, prompts = [items.names[k] for k in places], [items.prompts[k] for k in places]
    return Items(names, prompts, sum(means) / 2 + influence)


def _of_seeds(means: Floats) -> tuple[float, float]:
    """Half width and smallest effect by the spread between seeds; zeros for one seed."""
    if len(means) < 2:
        return 0.0, 0.0
    error = float(means.std(ddof=1)) / math.sqrt(len(means))
    sure, power = student(0.975, len(means) - 1), student(POWER, len(means) - 1)
    return sure * error, (sure + power) * error


def _of_items(found: Sequence[Items]) -> tuple[float, float]:
    """The same by the spread between items; a prompt is one cluster over all seeds."""
    deviations = [
        (items.values - items.values.mean()) / (len(found) * len(items.values)) for items in found
    ]
    prompts = [prompt for items in found for prompt in items.prompts]
    groups = group_numbers(prompts, len(prompts))
    error = clustered_error(np.concatenate(deviations), groups)
    return Z95 * error, (Z95 + 0.8416212335729143) * error


def student(p: float, freedom: int) -> float:
    """Student's quantile, to 1e-4: t = √ν·tan θ has a density proportional to cos^(ν−1) θ."""
    theta = np.linspace(0, math.pi / 2, _GRID)
    density = np.cos(theta) ** (freedom - 1)
    half = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = float(np.interp(abs(p - 0.5), half / half[-1] / 2, theta))
    return math.copysign(math.sqrt(freedom) * math.tan(angle), p - 0.5)
