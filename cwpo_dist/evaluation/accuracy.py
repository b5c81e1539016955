"""Scores or log-probs against held-out human labels in, accuracy and calibration figures out.

Ties are never folded into right or wrong: every figure counts them apart. A figure that has no
pairs behind it is None, never zero.

Intervals are Wilson's, at 95 %, with the number of *independent* decisions in place of the number
of pairs: pairs that share a prompt share its difficulty, so n is divided by the design effect of
the prompts (Dean & Pagano 2015). Where no prompt repeats this is Wilson's interval itself. It
needs no random numbers, and holds near 0 and 1, where a bootstrap collapses.

Shapes: N = pairs, in any order that all arguments share.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

Z95 = 1.959963984540054  # the normal's 97.5 % quantile
RELIABILITY_BINS = 10
QUARTERS = 4


class _AsDict:
    """Gives frozen records a plain form for JSON."""

    def as_dict(self) -> dict[str, Any]:
        """The record as plain dictionaries, lists and numbers."""
        assert not isinstance(self, type)
        # Only its subclasses are dataclasses, which the type of `asdict` cannot know.
        return asdict(self)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True)
class Accuracy(_AsDict):
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
class Group(_AsDict):
    """Accuracy of the decided pairs whose confidence, or probability, lies in one range.

    Attributes:
        lower: lower end of the range.
        upper: upper end of the range.
        n: decided pairs in it.
        mean: their mean confidence (quarters) or probability (reliability).
        accuracy: the share that agrees with the human label.
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
class Correlation(_AsDict):
    """Pearson's and Spearman's coefficients; None where one side does not vary."""

    n: int
    pearson: float | None
    spearman: float | None


@dataclass(frozen=True)
class AnnotatorAccuracy(_AsDict):
    """An annotator against held-out human labels.

    Attributes:
        agreement: the higher score wins.
        by_quarter: the decided pairs in four equal parts, least confident first.
        reliability: ten bins of P = σ(|margin|), the probability of the predicted answer, which
            lies in [0.5, 1].
        expected_calibration_error: Σ_bins share · |mean P − accuracy|.
        mean_probability: mean P of the decided pairs; above the accuracy means overconfident.
        mean_confidence: mean C of all pairs, labelled or not.
        length_baseline: the longer answer wins.
        margin_length: score difference a − b with length difference a − b, all pairs.
        confidence_length: confidence with |length difference|, all pairs.
    """

    agreement: Accuracy
    by_quarter: tuple[Group, ...]
    reliability: tuple[Group, ...]
    expected_calibration_error: float | None
    mean_probability: float | None
    mean_confidence: float | None
    length_baseline: Accuracy
    margin_length: Correlation
    confidence_length: Correlation


@dataclass(frozen=True)
class PolicyAccuracy(_AsDict):
    """A policy's implicit reward β·log(π/π_ref) against held-out human labels.

    Attributes:
        agreement: the answer with the higher implicit reward wins.
        mean_margin: mean implicit reward of the human's answer less that of the other, ties in.
        beta: the β of the reward.
    """

    agreement: Accuracy
    mean_margin: float | None
    beta: float


@dataclass(frozen=True)
class GoldAccuracy(_AsDict):
    """Gold reward accuracy (GRA) of one policy against another, prompt by prompt.

    Attributes:
        n: prompts.
        wins: prompts where the aligned answer's gold score is higher.
        ties: prompts where both are equal.
        losses: prompts where it is lower.
        accuracy: wins / n, the paper's GRA, which counts ties as losses.
        low: lower end of its 95 % interval.
        high: upper end.
        accuracy_ties_halved: (wins + ties / 2) / n.
    """

    n: int
    wins: int
    ties: int
    losses: int
    accuracy: float | None
    low: float | None
    high: float | None
    accuracy_ties_halved: float | None


def annotator_accuracy(
    score_a: ArrayLike,
    score_b: ArrayLike,
    labels: Sequence[str | None],
    length_a: ArrayLike,
    length_b: ArrayLike,
    prompts: Sequence[Hashable] | None = None,
) -> AnnotatorAccuracy:
    """Measures an annotator on pairs that it was not trained on.

    Args:
        score_a: [N], raw scores of the first answers.
        score_b: [N], raw scores of the second answers.
        labels: [N], the human's choice, `a` or `b`; None where there is none.
        length_a: [N], lengths of the first answers, in any one unit.
        length_b: [N], lengths of the second answers.
        prompts: [N], what tells prompts apart (id, hash or text); None when none repeats.

    Raises:
        ValueError: for columns of unequal length, a score that is not finite, an unknown label.
    """
    scores_a, scores_b = _column("score_a", score_a), _column("score_b", score_b)
    lengths_a, lengths_b = _column("length_a", length_a), _column("length_b", length_b)
    human = _human_sign(labels)
    groups = _group_numbers(prompts, len(human))
    _check_lengths(
        human, score_a=scores_a, score_b=scores_b, length_a=lengths_a, length_b=lengths_b
    )

    margin, longer = scores_a - scores_b, lengths_a - lengths_b
    confidence = np.tanh(np.abs(margin) / 2)
    decided = (human != 0) & (margin != 0)
    right = np.sign(margin[decided]) == human[decided]
    probability = (1 + confidence[decided]) / 2  # σ(|m|) = (1 + tanh(|m|/2)) / 2
    bins = _reliability(probability, right, groups[decided])
    return AnnotatorAccuracy(
        agreement=_agreement(margin, human, groups),
        by_quarter=_quarters(confidence[decided], right, groups[decided]),
        reliability=bins,
        expected_calibration_error=_calibration_error(bins),
        mean_probability=_mean(probability),
        mean_confidence=_mean(confidence),
        length_baseline=_agreement(longer, human, groups),
        margin_length=correlation(margin, longer),
        confidence_length=correlation(confidence, np.abs(longer)),
    )


def policy_accuracy(
    logp_a: ArrayLike,
    logp_b: ArrayLike,
    ref_logp_a: ArrayLike,
    ref_logp_b: ArrayLike,
    labels: Sequence[str | None],
    beta: float,
    prompts: Sequence[Hashable] | None = None,
) -> PolicyAccuracy:
    """Measures a policy's implicit reward on held-out human pairs.

    Args:
        logp_a: [N], summed log-probs of the first answers under the policy, in nats.
        logp_b: [N], of the second answers.
        ref_logp_a: [N], the same under the reference.
        ref_logp_b: [N], the same under the reference.
        labels: [N], the human's choice, `a` or `b`; None where there is none.
        beta: the β of the loss.
        prompts: [N], what tells prompts apart; None when none repeats.

    Raises:
        ValueError: for columns of unequal length, a log-prob that is not finite, a bad label.
    """
    policy_a, policy_b = _column("logp_a", logp_a), _column("logp_b", logp_b)
    reference_a, reference_b = _column("ref_logp_a", ref_logp_a), _column("ref_logp_b", ref_logp_b)
    human = _human_sign(labels)
    _check_lengths(
        human, logp_a=policy_a, logp_b=policy_b, ref_logp_a=reference_a, ref_logp_b=reference_b
    )
    margin = beta * ((policy_a - reference_a) - (policy_b - reference_b))
    labelled = human != 0
    return PolicyAccuracy(
        agreement=_agreement(margin, human, _group_numbers(prompts, len(human))),
        mean_margin=_mean(margin[labelled] * human[labelled]),
        beta=beta,
    )


def gra(gold_aligned: ArrayLike, gold_baseline: ArrayLike) -> GoldAccuracy:
    """Gold reward accuracy: how often the aligned answer scores above the baseline's.

    Args:
        gold_aligned: [N], gold scores of the aligned model's answers, one a prompt.
        gold_baseline: [N], gold scores of the baseline's answers to the same prompts.

    Raises:
        ValueError: for columns of unequal length or a score that is not finite.
    """
    aligned = _column("gold_aligned", gold_aligned)
    baseline = _column("gold_baseline", gold_baseline)
    _check_lengths(aligned, gold_baseline=baseline)
    n = len(aligned)
    wins, ties = int(np.sum(aligned > baseline)), int(np.sum(aligned == baseline))
    low, high = wilson(wins, n)
    return GoldAccuracy(
        n=n,
        wins=wins,
        ties=ties,
        losses=n - wins - ties,
        accuracy=wins / n if n else None,
        low=low,
        high=high,
        accuracy_ties_halved=(wins + ties / 2) / n if n else None,
    )


def wilson(successes: float, n: float) -> tuple[float | None, float | None]:
    """Wilson's 95 % interval of a share; (None, None) for n = 0.

    Args:
        successes: how many, at most n; need not be whole.
        n: how many independent decisions; need not be whole.
    """
    if n <= 0:
        return None, None
    share, z2 = successes / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def independent_decisions(right: Flags, groups: NDArray[np.intp]) -> float:
    """The number of independent decisions that pairs in groups (prompts) are worth, at most N.

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


def correlation(x: ArrayLike, y: ArrayLike) -> Correlation:
    """Pearson's and Spearman's (Pearson's of average ranks) coefficients of two columns."""
    first, second = _column("x", x), _column("y", y)
    _check_lengths(first, y=second)
    return Correlation(
        n=len(first),
        pearson=_pearson(first, second),
        spearman=_pearson(_average_ranks(first), _average_ranks(second)),
    )


def _agreement(preference: Floats, human: Floats, groups: NDArray[np.intp]) -> Accuracy:
    """Accuracy of sign(preference), positive for answer a, against the human's sign."""
    labelled = human != 0
    decided = labelled & (preference != 0)
    right = np.sign(preference[decided]) == human[decided]
    share, low, high = _share(right, groups[decided])
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


def _share(
    right: Flags, groups: NDArray[np.intp]
) -> tuple[float | None, float | None, float | None]:
    """The share of right decisions and its interval."""
    if len(right) == 0:
        return None, None, None
    share, n = float(np.mean(right)), independent_decisions(right, groups)
    return share, *wilson(share * n, n)


def _quarters(confidence: Floats, right: Flags, groups: NDArray[np.intp]) -> tuple[Group, ...]:
    """Four parts of (nearly) equal size by confidence; none where there are fewer pairs."""
    if len(confidence) < QUARTERS:
        return ()
    order = np.argsort(confidence, kind="stable")
    return tuple(
        _group(confidence[part], right[part], groups[part], confidence[part].min(), part_max)
        for part in np.array_split(order, QUARTERS)
        for part_max in [confidence[part].max()]
    )


def _reliability(probability: Floats, right: Flags, groups: NDArray[np.intp]) -> tuple[Group, ...]:
    """Ten bins of equal width over [0.5, 1]; the last is closed on both sides."""
    edges = np.linspace(0.5, 1.0, RELIABILITY_BINS + 1)
    number = np.clip(np.searchsorted(edges, probability, side="right") - 1, 0, RELIABILITY_BINS - 1)
    return tuple(
        _group(probability[inside], right[inside], groups[inside], edges[k], edges[k + 1])
        for k in range(RELIABILITY_BINS)
        for inside in [number == k]
    )


def _group(
    values: Floats, right: Flags, groups: NDArray[np.intp], lower: float, upper: float
) -> Group:
    share, low, high = _share(right, groups)
    return Group(
        lower=float(lower),
        upper=float(upper),
        n=len(values),
        mean=_mean(values),
        accuracy=share,
        low=low,
        high=high,
    )


def _calibration_error(bins: Sequence[Group]) -> float | None:
    total = sum(group.n for group in bins)
    if not total:
        return None
    gaps = (
        group.n * abs(group.mean - group.accuracy)
        for group in bins
        if group.mean is not None and group.accuracy is not None
    )
    return float(sum(gaps) / total)


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


def _mean(values: Floats) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _human_sign(labels: Sequence[str | None]) -> Floats:
    """1 for label a, −1 for b, 0 for none."""
    signs = {"a": 1.0, "b": -1.0, None: 0.0}
    for label in labels:
        if label not in signs:
            raise ValueError(f"label: {label!r} is unknown; use 'a', 'b' or null")
    return np.array([signs[label] for label in labels], dtype=np.float64)


def _group_numbers(prompts: Sequence[Hashable] | None, n: int) -> NDArray[np.intp]:
    """A number for each distinct prompt; every pair its own where prompts is None."""
    if prompts is None:
        return np.arange(n)
    if len(prompts) != n:
        raise ValueError(f"prompts: {len(prompts)} values for {n} pairs; give one a pair")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], dtype=np.intp)


def _column(name: str, values: ArrayLike) -> Floats:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or not np.all(np.isfinite(column)):
        raise ValueError(f"{name}: must be one column of finite numbers; reject the other rows")
    return column


def _check_lengths(expected: Floats, **columns: Floats) -> None:
    for name, column in columns.items():
        if len(column) != len(expected):
            raise ValueError(f"{name}: {len(column)} values for {len(expected)}; give one a pair")
