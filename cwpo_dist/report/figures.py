"""Figures as a run's metrics hold them in; the same with names and types out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Where a figure lies with 95 % probability, or most of what it is of; None: not known."""

    low: float | None
    high: float | None

    @classmethod
    def of(cls, found: Mapping[str, Any] | None) -> Self | None:
        """What a run left; None where it left nothing. What it has beside these is not read."""
        if found is None:
            return None
        return cls(**{each.name: found[each.name] for each in fields(cls) if each.name in found})

    @classmethod
    def each(cls, found: Sequence[Mapping[str, Any]] | None) -> list[Self]:
        """All of a list; none where a run left no list."""
        return [figure for each in found or [] if (figure := cls.of(each)) is not None]


@dataclass(frozen=True, kw_only=True)
class Share(Interval):
    """How often something holds.

    Attributes:
        accuracy: the share; None: of nothing.
        accuracy_ties_halved: the same with ties as halves, where they count as losses.
    """

    accuracy: float | None = None
    accuracy_ties_halved: float | None = None


@dataclass(frozen=True, kw_only=True)
class Bin(Share):
    """Of the pairs whose confidence, or probability, lies in one range.

    Attributes:
        lower: lower end of the range.
        upper: upper end.
        n: how many pairs.
        mean: their mean confidence or probability.
    """

    lower: float
    upper: float
    n: int
    mean: float | None = None


@dataclass(frozen=True, kw_only=True)
class Stretch(Interval):
    """Margins of the pairs of about one difference in length: their median and 10–90 % range."""

    length: float
    median: float


@dataclass(frozen=True, kw_only=True)
class Estimate(Interval):
    """A number; None: of nothing."""

    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Temperature(Interval):
    """A fitted temperature, and of how many pairs."""

    value: float
    n: int = 0


@dataclass(frozen=True, kw_only=True)
class Mean(Interval):
    """A mean over seeds.

    Attributes:
        mean: it.
        values: of each seed.
        smallest: the true difference that would be found with 80 % probability.
        p: of a difference: how probable one so far from zero is by chance.
    """

    mean: float
    values: Sequence[float]
    smallest: float | None = None
    p: float | None = None

    @classmethod
    def of(cls, found: Mapping[str, Any] | None) -> Self | None:
        """None also where no seed had it."""
        return None if found is None or found["mean"] is None else super().of(found)

    def cut(self, least: float, most: float) -> Mean:
        """With an interval that ends at what the figure can be."""
        if self.low is None or self.high is None:
            return self
        low, high = max(least, self.low), min(most, self.high)
        return replace(self, low=min(low, self.mean), high=max(high, self.mean))

    @property
    def hundredfold(self) -> Mean:
        """In per cent."""
        low, high = (None if end is None else 100 * end for end in (self.low, self.high))
        return replace(self, mean=100 * self.mean, low=low, high=high)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval of a difference leaves zero out."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high
