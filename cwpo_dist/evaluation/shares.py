"""Decisions against human labels in, shares with intervals that know of shared prompts out.

Ties are never folded into right or wrong: every figure counts them apart. A figure that has no
pairs behind it is None, never zero.

Intervals are Wilson's, at 95 %, with the number of *independent* decisions in place of the number
of pairs: pairs that share a prompt share its difficulty, so n is divided by the design effect of
the prompts, and the quantile is Student's, as that effect is an estimate by few prompts (Dean &
Pagano 2015). Where no prompt repeats this is Wilson's interval itself. It needs no random numbers,
and holds near 0 and 1, where a bootstrap collapses.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cwpo_dist.evaluation.student import freedom_of, student

Floats = NDArray[np.float64]
Groups = NDArray[np.intp]

Z95 = 1.959963984540054  # the normal's 97.5 % quantile


class AsDict:
    """Gives frozen records a plain form for JSON."""

    def as_dict(self) -> dict[str, object]:
        """The record as plain dictionaries, lists and numbers."""
        assert not isinstance(self, type)
        # Only its subclasses are dataclasses, which the type of `asdict` cannot know.
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # as said


@dataclass(frozen=True)
class Accuracy(AsDict):
    """How often a rule and the human label agree.

    Attributes:
        n: pairs with a human label.
        correct: pairs where the rule chose the human's answer.
        wrong: pairs where it chose the other.
        ties: pairs where it chose neither.
        accuracy: correct / (correct + wrong); None where nothing was decided.
        low: lower end of its 95 % interval.
        high: upper end.
    """

    n: int
    correct: int
    wrong: int
    ties: int
    accuracy: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Group(AsDict):
    """Accuracy of the decided pairs whose confidence, or probability, lies in one range.

    Attributes:
        lower: lower end of the range.
        upper: upper end of the range.
        n: decided pairs in it.
        mean: their mean confidence (quarters) or probability (reliability).
        accuracy: the share that agrees with the human label (reliability: with the people asked,
            where there are votes).
        low: lower end of its 95 % interval.
        high: upper end.
    """

    lower: float
    upper: float
    n: int
    mean: float | None
    accuracy: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Estimate(AsDict):
    """A mean with its 95 % interval.

    Attributes:
        value: the mean; None where it is of nothing.
        low: lower end; None where nothing varies, or one prompt is all.
        high: upper end.
    """

    value: float | None
    low: float | None
    high: float | None


def wilson(successes: float, n: float, quantile: float = Z95) -> tuple[float | None, float | None]:
    """Wilson's 95 % interval of a share; (None, None) for n = 0.

    Args:
        successes: how many, at most n; need not be whole.
        n: how many independent decisions; need not be whole.
        quantile: the normal's, or Student's where n is an estimate.
    """
    if n <= 0:
        return None, None
    share, z2 = successes / n, quantile**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = quantile * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def independent_decisions(right: Floats, groups: Groups) -> float:
    """The number of independent decisions that pairs in groups (prompts) are worth, at most N.

    Shares of votes between 0 and 1 vary less than the Bernoulli draws they are taken for, so that
    their number is never too large.

    N over the design effect: the variance of the share between groups, over what N independent
    pairs would have. Where all are right, or all wrong, no variance is seen and each group is
    taken to be one decision (Kish's N² / Σ n_g²), the most careful view.
    """
    n = len(right)
    sizes = np.bincount(groups)[np.unique(groups)]
    if n == 0 or sizes.max() == 1:
        return float(n)
    share = float(np.mean(right))
    if share in (0.0, 1.0) or len(sizes) == 1:
        return float(n**2 / np.sum(sizes**2))
    totals = np.bincount(groups, weights=right - share)
    between = len(sizes) / (len(sizes) - 1) * float(np.sum(totals**2)) / n**2
    return n / max(1.0, between / (share * (1 - share) / n))


def agreement(preference: Floats, human: Floats, groups: Groups) -> Accuracy:
    """Accuracy of sign(preference), positive for answer a, against the human's sign."""
    labelled = human != 0
    decided = labelled & (preference != 0)
    right = (np.sign(preference[decided]) == human[decided]).astype(np.float64)
    share, low, high = share_of(right, groups[decided])
    n, correct, undecided = int(labelled.sum()), int(right.sum()), int((labelled & ~decided).sum())
    return Accuracy(
        n=n,
        correct=correct,
        wrong=n - undecided - correct,
        ties=undecided,
        accuracy=share,
        low=low,
        high=high,
    )


def share_of(right: Floats, groups: Groups) -> tuple[float | None, float | None, float | None]:
    """The mean of shares in [0, 1] (0 and 1 where one person decided) and its interval."""
    if len(right) == 0:
        return None, None, None
    share, n = float(np.mean(right)), independent_decisions(right, groups)
    repeat = len(np.unique(groups)) < len(right)
    quantile = quantile_by(groups) if repeat and 0 < share < 1 else Z95
    return share, *wilson(share * n, n, quantile)


def estimate(
    values: Floats, groups: Groups, least: float = 0.0, most: float = math.inf
) -> Estimate:
    """The mean of what lies between `least` and `most`, with Student's interval by prompt."""
    value = mean(values)
    error = 0.0 if value is None else clustered_error((values - value) / len(values), groups)
    if value is None or not error:
        return Estimate(value, None, None)
    half = quantile_by(groups) * error
    return Estimate(value, max(least, value - half), min(most, value + half))


def quantile_by(groups: Groups) -> float:
    """Student's 97.5 % quantile with one degree of freedom less than there are groups (prompts).

    One group alone has no spread to estimate: the normal's.
    """
    number = len(np.unique(groups))
    return student(0.975, freedom_of(number - 1)) if number > 1 else Z95


def clustered_error(deviations: Floats, groups: Groups) -> float:
    """The standard error of a sum, by its items' deviations from what is expected of each.

    Those of a group (a prompt) go together; 0 where one is all.
    """
    clusters = len(np.unique(groups))
    if clusters < 2:
        return 0.0
    totals = np.bincount(groups, weights=deviations)
    return math.sqrt(clusters / (clusters - 1) * float(np.sum(totals**2)))


def group_of(values: Floats, right: Floats, groups: Groups, lower: float, upper: float) -> Group:
    """The pairs of one range as one record."""
    share, low, high = share_of(right, groups)
    return Group(
        lower=float(lower),
        upper=float(upper),
        n=len(values),
        mean=mean(values),
        accuracy=share,
        low=low,
        high=high,
    )


def mean(values: Floats) -> float | None:
    """None where there is nothing to take a mean of."""
    return float(np.mean(values)) if len(values) else None


def group_numbers(prompts: Sequence[Hashable] | None, n: int) -> Groups:
    """A number for each distinct prompt; every pair its own where prompts is None."""
    if prompts is None:
        return np.arange(n)
    if len(prompts) != n:
        raise ValueError(f"prompts: {len(prompts)} values for {n} pairs; give one a pair")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], dtype=np.intp)


def column(name: str, values: ArrayLike) -> Floats:
    """One column of numbers.

    Raises:
        ValueError: for another shape, or a number that is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not np.all(np.isfinite(numbers)):
        raise ValueError(f"{name}: must be one column of finite numbers; reject the other rows")
    return numbers


def check_lengths(expected: Floats, **columns: Floats) -> None:
    """Raises ValueError for a column that is not as long as `expected`."""
    for name, numbers in columns.items():
        if len(numbers) != len(expected):
            raise ValueError(f"{name}: {len(numbers)} values for {len(expected)}; give one a pair")
