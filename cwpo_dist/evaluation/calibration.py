"""Margins and what people chose in; how honest their probabilities are, and a temperature, out.

A margin claims that its answer is the better one with probability σ(|margin|). Where several
people voted on a pair, the claim is held against the share of them that agree, else against the
label. The temperature T that makes σ(margin / T) most likely (Guo et al. 2017) changes no order.

Shapes: N = pairs, in any order that all arguments share.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cwpo_dist.evaluation.shares import (
    AsDict,
    Estimate,
    Floats,
    Group,
    Groups,
    check_lengths,
    column,
    estimate,
    group_numbers,
    group_of,
    mean,
    quantile_by,
)
from cwpo_dist.pairs.chosen import chosen_first
from cwpo_dist.pairs.stored import Told
from cwpo_dist.weighting import Scale, join, sigmoid

RELIABILITY_BINS = 10
QUARTERS = 4
HALVINGS = 200  # of the bracket around the temperature: more than a double has bits


class CalibrationError(ValueError):
    """Labels to which no temperature can be fitted; the message says why and what to do."""


@dataclass(frozen=True)
class Temperature(AsDict):
    """A fitted temperature.

    Attributes:
        value: T; above 1 the raw margins claimed too much.
        low: lower end of its 95 % interval, which knows of shared prompts; None for one prompt.
        high: upper end.
        n: pairs that it was fitted to.
        nll_before: mean −log-likelihood of people's choices under σ(margin), in nats.
        nll_after: the same under σ(margin / T).
    """

    value: float
    low: float | None
    high: float | None
    n: int
    nll_before: float
    nll_after: float


@dataclass(frozen=True)
class FittedScale(AsDict):
    """The temperatures of K annotators.

    Attributes:
        annotators: K.
        members: one an annotator, fitted to its own margins; none where K is 1, or where members
            keep their raw margins.
        joint: that of the members' mean margin. A mean of calibrated members is not calibrated
            itself, most often too modest (Rahaman & Thiery 2021), so it has one of its own.
    """

    annotators: int
    members: tuple[Temperature, ...]
    joint: Temperature

    @property
    def scale(self) -> Scale:
        """What margins are divided by."""
        if not self.members:
            return Scale.raw(self.annotators, self.joint.value)
        return Scale(tuple(member.value for member in self.members), self.joint.value)


@dataclass(frozen=True)
class Calibration(AsDict):
    """What a set of margins claims, against what people chose.

    Attributes:
        reliability: ten bins of P = σ(|margin|), the probability of the predicted answer, which
            lies in [0.5, 1].
        expected_calibration_error: Σ_bins share · |mean P − share of people that agree|. Chance
            alone makes it too large, the more so the fewer the pairs.
        ece_interval: from … to …, at 95 %, by each pair's part in it; None where there is none.
        mean_probability: mean P; above the accuracy means overconfident.
        brier: mean squared distance of P from what each of the people said (1: they agree).
        nll: mean −log of the probability that was claimed for what each said, in nats.
    """

    reliability: tuple[Group, ...]
    expected_calibration_error: float | None
    ece_interval: tuple[float, float] | None
    mean_probability: float | None
    brier: Estimate
    nll: Estimate


def people_share(told: Told) -> float | None:
    """The share of people that chose answer a: of the votes, else of the one who labelled.

    Who voted for neither counts half for each.
    """
    a, b, tie = (votes or 0 for votes in (told.votes_a, told.votes_b, told.votes_tie))
    if a + b + tie:
        return (a + tie / 2) / (a + b + tie)
    return None if told.label is None else chosen_first(told.label, 1.0, 0.0)[0]


def fit_temperature(
    margin: ArrayLike, people: ArrayLike, prompts: Sequence[Hashable] | None = None
) -> Temperature:
    """The T > 0 under which σ(margin / T) makes people's choices most likely.

    In β = 1/T the −log-likelihood is convex, so halving the bracket of its slope's one zero finds
    it. The interval is Wald's on log T with the sandwich variance over prompts (White 1982; with
    the G/(G − 1) and Student's quantile of few prompts), since pairs of one prompt are not
    independent, and shares of votes are no coin throws.

    Args:
        margin: [N], score differences a − b; ties say nothing of T.
        people: [N], the share of people that chose a, in [0, 1]; each pair counts once.
        prompts: [N], what tells prompts apart; None when none repeats.

    Raises:
        CalibrationError: for no pairs, or where the likelihood has no maximum.
        ValueError: for columns of unequal length, or a number that is not finite.
    """
    margins, chosen = column("margin", margin), column("people", people)
    check_lengths(margins, people=chosen)
    groups = group_numbers(prompts, len(margins))
    if not len(margins):
        raise CalibrationError(
            "no pair of the split that a temperature is fitted on has both a human label and a "
            "score; give a source of labelled pairs with into: validation, or take "
            "weigh.temperature: null"
        )
    beta = _inverse_temperature(margins, chosen)
    error = _log_error(beta, margins, chosen, groups)
    half = None if error is None else quantile_by(groups) * error
    return Temperature(
        value=1 / beta,
        low=None if half is None else math.exp(-half) / beta,
        high=None if half is None else math.exp(half) / beta,
        n=len(margins),
        nll_before=_nll(1.0, margins, chosen),
        nll_after=_nll(beta, margins, chosen),
    )


def fit_scale(
    margins_NK: Floats,
    people: Floats,
    prompts: Sequence[Hashable],
    names: Sequence[str],
    *,
    by_member: bool = True,
) -> FittedScale:
    """Temperatures of several annotators, then of their mean margin.

    Args:
        margins_NK: score differences a − b, NaN where an annotator has no score.
        people: [N], the share of people that chose a.
        prompts: [N], what tells prompts apart.
        names: of the annotators, for the error.
        by_member: whether each of several annotators gets a temperature of its own.

    Raises:
        CalibrationError: where the labels allow none; says which annotator's.
    """
    annotators = len(names)
    each = range(annotators) if by_member and annotators > 1 else ()
    found = tuple(_fit_known(names[k], margins_NK[:, k], people, prompts) for k in each)
    scale = Scale(tuple(t.value for t in found)) if found else Scale.raw(annotators)
    joined = join(margins_NK, scale).margin
    return FittedScale(annotators, found, _fit_known(", ".join(names), joined, people, prompts))


def _fit_known(
    name: str, margin: Floats, people: Floats, prompts: Sequence[Hashable]
) -> Temperature:
    """A temperature of those pairs that have a margin."""
    known = np.flatnonzero(np.isfinite(margin)).tolist()
    try:
        return fit_temperature(margin[known], people[known], [prompts[i] for i in known])
    except CalibrationError as error:
        raise CalibrationError(f"{name}: {error}") from None


def _inverse_temperature(margin: Floats, people: Floats) -> float:
    """β = 1/T, where the slope of the −log-likelihood is zero."""
    if _slope(0.0, margin, people) >= 0:
        raise CalibrationError(
            f"on {len(margin)} pairs the annotator is no better than a coin: no temperature makes "
            "its margins probabilities; take weigh.temperature: null, or a better annotator"
        )
    low, high = 0.0, 1.0 / float(np.mean(np.abs(margin)))
    largest = 1e6 * high
    while _slope(high, margin, people) <= 0:
        low, high = high, 2 * high
        if high > largest:
            raise CalibrationError(
                f"the annotator agrees with people on all of {len(margin)} pairs: the likelihood "
                "grows without end; raise prepare.validation_fraction, or give a source of more "
                "labelled pairs with into: validation"
            )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _slope(middle, margin, people) <= 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _slope(beta: float, margin: Floats, people: Floats) -> float:
    """d/dβ of Σ −log-likelihood; it never falls as β grows."""
    return float(np.sum(margin * (sigmoid(beta * margin) - people)))


def _log_error(beta: float, margin: Floats, people: Floats, groups: Groups) -> float | None:
    """Standard error of log T = −log β: that of β over β."""
    prompts = int(groups.max()) + 1
    if prompts == 1:
        return None
    probability = sigmoid(beta * margin)
    curvature = float(np.sum(margin**2 * probability * (1 - probability)))
    by_prompt = np.bincount(groups, weights=margin * (probability - people))
    variance = prompts / (prompts - 1) * float(np.sum(by_prompt**2))
    return math.sqrt(variance) / curvature / beta


def _nll(beta: float, margin: Floats, people: Floats) -> float:
    """Mean −log-likelihood."""
    return float(np.mean(_surprise(beta * margin, people)))


def _surprise(x: Floats, people: Floats) -> Floats:
    """−log-likelihood of each pair under σ(x); log(1 + eˣ) without overflow."""
    return people * np.logaddexp(0, -x) + (1 - people) * np.logaddexp(0, x)


def calibration(margin: Floats, people: Floats, groups: Groups) -> Calibration:
    """Measures margins a − b of decided pairs (none is 0) against people's shares for a."""
    probability = sigmoid(np.abs(margin))
    right = np.where(margin > 0, people, 1 - people)
    edges = np.linspace(0.5, 1.0, RELIABILITY_BINS + 1)  # the last bin is closed on both sides
    number = np.clip(np.searchsorted(edges, probability, side="right") - 1, 0, RELIABILITY_BINS - 1)
    gaps = probability - right
    of_bins = np.bincount(number, weights=gaps, minlength=RELIABILITY_BINS)
    of_pairs = gaps * np.sign(of_bins)[number]  # Σ_bins |Σ gaps|, pair by pair
    error = estimate(of_pairs, groups, 0.0, 1.0)
    return Calibration(
        tuple(
            group_of(probability[inside], right[inside], groups[inside], edges[k], edges[k + 1])
            for k in range(RELIABILITY_BINS)
            for inside in [number == k]
        ),
        error.value,
        None if error.low is None or error.high is None else (error.low, error.high),
        mean(probability),
        estimate(right * (1 - probability) ** 2 + (1 - right) * probability**2, groups, 0.0, 1.0),
        estimate(_surprise(margin, people), groups),
    )


def quarters(confidence: Floats, right: Floats, groups: Groups) -> tuple[Group, ...]:
    """Four parts of (nearly) equal size by confidence; none where there are fewer pairs."""
    if len(confidence) < QUARTERS:
        return ()
    order = np.argsort(confidence, kind="stable")
    return tuple(
        group_of(confidence[part], right[part], groups[part], confidence[part].min(), part_max)
        for part in np.array_split(order, QUARTERS)
        for part_max in [confidence[part].max()]
    )
