"""One figure of several trials, seed by seed and item by item, in; means and intervals out.

A seed draws split, initialisation and order anew. Two sources of chance are seen: between seeds,
and between the items of one seed. The interval is the widest of three, so that neither few seeds
that happen to agree nor few items make it too narrow. All are Student's: over seeds' means; over
items, clustered by prompt, across all seeds; and over both, where seeds have prompts in common.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cwpo_dist.evaluation.shares import AsDict, Floats, clustered_error, group_numbers
from cwpo_dist.evaluation.student import freedom_of, student, student_tails

POWER = 0.8


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
        p: of a difference: how probable one so far from zero is where there is none, two-sided;
            below 0.05 exactly where the interval leaves zero out.
    """

    seeds: int
    items: int
    mean: float | None
    low: float | None
    high: float | None
    smallest: float | None
    values: tuple[float, ...] = ()
    p: float | None = None


def over_seeds(found: Sequence[Items]) -> Mean:
    """The mean of a figure."""
    return _over_seeds(found)[0]


def paired(ours: Mapping[int, Items], theirs: Mapping[int, Items]) -> Mean:
    """The mean difference, ours − theirs, on the items and seeds that both have."""
    seeds = sorted(ours.keys() & theirs.keys())
    found, chances = _over_seeds([_differences(ours[seed], theirs[seed]) for seed in seeds])
    if found.mean is None or found.low is None:
        return found
    return replace(found, p=max(chance.p_of(found.mean) for chance in chances))


def _over_seeds(found: Sequence[Items]) -> tuple[Mean, list[_Chance]]:
    """The mean of a figure, and the sources of chance in it."""
    filled = [items for items in found if len(items.values)]
    if not filled:
        return Mean(0, 0, None, None, None, None), []
    means = np.array([items.values.mean() for items in filled])
    n, count = len(filled), sum(len(items.values) for items in filled)
    middle, values, chances = float(means.mean()), tuple(means.tolist()), _chances(filled)
    wider = max(chances, key=lambda chance: chance.half)
    if not wider.error:
        return Mean(n, count, middle, None, None, None, values), chances
    low, high = middle - wider.half, middle + wider.half
    return Mean(n, count, middle, low, high, wider.smallest, values), chances


def _differences(ours: Items, theirs: Items) -> Items:
    """Item by item, of those that both have."""
    other = dict(zip(theirs.names, theirs.values.tolist(), strict=True))
    places = [k for k, name in enumerate(ours.names) if name in other]
    names = [ours.names[k] for k in places]
    values = ours.values[places] - np.array([other[name] for name in names])
    return Items(names, [ours.prompts[k] for k in places], values)


def holm(ps: Sequence[float]) -> list[float]:
    """Corrects p values, in their order, for how many there are (Holm 1979).

    Of all true zeros among them, one or more comes out below 0.05 with a probability of at most
    5 %, whatever they have in common: p_(k) becomes max_{j ≤ k} min(1, (m − j + 1)·p_(j)).
    """
    corrected, worst = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = worst
    return corrected


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


class _Chance(NamedTuple):
    """A standard error, and its degrees of freedom: infinite for the normal's."""

    error: float
    freedom: float

    @property
    def half(self) -> float:
        """Half the 95 % interval."""
        return student(0.975, self.freedom) * self.error

    @property
    def smallest(self) -> float:
        """The effect that is found with a probability of `POWER`."""
        return (student(0.975, self.freedom) + student(POWER, self.freedom)) * self.error

    def p_of(self, mean: float) -> float:
        """How probable a mean so far from zero is by this chance alone, two-sided."""
        return 0.0 if not self.error else student_tails(mean / self.error, self.freedom)


def _chances(found: Sequence[Items]) -> list[_Chance]:
    """Between seeds, unless there is one; between items, where a prompt is one cluster; and both.

    Items have one degree of freedom less than clusters, as is usual for errors by cluster: of eight
    prompts the normal's interval would leave out the truth in 9 % of cases, and not in 5.

    Seeds whose items are of the same prompts do not see in their spread what these have in common,
    so that it comes on top: in variance that of prompts less that of prompts drawn anew with each
    seed (two-way clusters, Cameron, Gelbach and Miller 2011; degrees of freedom by Satterthwaite).
    """
    n = len(found)
    each = [(items.values - items.values.mean()) / (n * len(items.values)) for items in found]
    deviations = np.concatenate(each)
    seeds = [seed for seed, items in enumerate(found) for _ in items.prompts]
    prompts = [prompt for items in found for prompt in items.prompts]
    groups = group_numbers(prompts, len(prompts))
    anew = group_numbers(list(zip(seeds, prompts, strict=True)), len(prompts))
    of_items = _Chance(clustered_error(deviations, groups), freedom_of(len(np.unique(groups)) - 1))
    if n < 2:
        return [of_items]
    means = np.array([items.values.mean() for items in found])
    of_seeds = _Chance(float(means.std(ddof=1)) / math.sqrt(n), n - 1)
    shared = of_items.error**2 - clustered_error(deviations, anew) ** 2
    if shared <= 0 or not of_seeds.error:
        return [of_seeds, of_items]
    variance = of_seeds.error**2 + shared
    doubt = of_seeds.error**4 / of_seeds.freedom + shared**2 / of_items.freedom
    return [of_seeds, of_items, _Chance(math.sqrt(variance), freedom_of(variance**2 / doubt))]
