"""Margins, log-probs or gold scores against held-out labels in, accuracies with intervals out.

Shapes: N = pairs, in any order that all arguments share.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from cwpo_dist.evaluation.calibration import Calibration, calibration, quarters
from cwpo_dist.evaluation.left_out import LeftOut
from cwpo_dist.evaluation.length import (
    Correlation,
    LengthGroup,
    correlation,
    margin_by_length,
)
from cwpo_dist.evaluation.shares import (
    Accuracy,
    AsDict,
    Estimate,
    Floats,
    Group,
    Groups,
    agreement,
    check_lengths,
    column,
    estimate,
    group_numbers,
    mean,
    wilson,
)
from cwpo_dist.pairs.chosen import Label, signs
from cwpo_dist.weighting import confidence


@dataclass(frozen=True)
class AnnotatorAccuracy(Calibration):
    """An annotator against held-out human labels; what `Calibration` has is of the raw margins.

    Attributes:
        agreement: the higher score wins.
        by_quarter: the decided pairs in four equal parts, least confident first.
        calibrated: calibration of margins divided by the fitted temperature; None without one.
        mean_confidence: mean C of all pairs, labelled or not.
        sure_half: accuracy of the more confident half of the decided pairs less that of the other.
        length_baseline: the longer answer wins.
        above_length: share right less that of `length_baseline`, pair by pair, a tie as a half.
        margin_length: score difference a − b with length difference a − b, all pairs.
        margin_by_length: the same as ten parts by length difference.
        confidence_length: confidence with |length difference|, all pairs.
    """

    agreement: Accuracy
    by_quarter: tuple[Group, ...]
    calibrated: Calibration | None
    mean_confidence: float | None
    sure_half: Estimate
    length_baseline: Accuracy
    above_length: Estimate
    margin_length: Correlation
    margin_by_length: tuple[LengthGroup, ...]
    confidence_length: Correlation


@dataclass(frozen=True)
class PolicyAccuracy(AsDict):
    """A policy's implicit reward, β·log(π/π_ref) or β·log π/|y|, against held-out human labels.

    Attributes:
        agreement: the answer with the higher implicit reward wins.
        mean_margin: mean implicit reward of the human's answer less that of the other, ties in.
        beta: the β of the reward.
    """

    agreement: Accuracy
    mean_margin: float | None
    beta: float


@dataclass(frozen=True)
class GoldAccuracy(AsDict):
    """Gold reward accuracy (GRA) of one policy against another, prompt by prompt.

    Attributes:
        n: prompts with a gold score of both answers.
        wins: prompts where the aligned answer's gold score is higher.
        ties: prompts where both are equal.
        losses: prompts where it is lower.
        accuracy: wins / n, the paper's GRA, which counts ties as losses.
        low: lower end of its 95 % interval.
        high: upper end.
        accuracy_ties_halved: (wins + ties / 2) / n.
        left_out: the prompts that it is not of.
    """

    n: int
    wins: int
    ties: int
    losses: int
    accuracy: float | None
    low: float | None
    high: float | None
    accuracy_ties_halved: float | None
    left_out: LeftOut = field(default_factory=LeftOut)


def annotator_accuracy(
    margin: ArrayLike,
    labels: Sequence[Label | None],
    length_a: ArrayLike,
    length_b: ArrayLike,
    prompts: Sequence[Hashable] | None = None,
    *,
    people: ArrayLike | None = None,
    temperature: float | None = None,
) -> AnnotatorAccuracy:
    """Measures an annotator on pairs that it was not trained on.

    Args:
        margin: [N], score differences a − b.
        labels: [N], the human's choice, `a` or `b`; None where there is none.
        length_a: [N], lengths of the first answers, in any one unit.
        length_b: [N], lengths of the second answers.
        prompts: [N], what tells prompts apart (id, hash or text); None when none repeats.
        people: [N], the share of people that chose a, where there are votes; None: by label.
        temperature: fitted elsewhere, never on these pairs; None: there is none.

    Raises:
        ValueError: for columns of unequal length, a number that is not finite, an unknown label.
    """
    margins = column("margin", margin)
    lengths_a, lengths_b = column("length_a", length_a), column("length_b", length_b)
    human = signs(labels)
    chosen = (human + 1) / 2 if people is None else column("people", people)
    groups = group_numbers(prompts, len(human))
    check_lengths(human, margin=margins, length_a=lengths_a, length_b=lengths_b, people=chosen)

    longer = lengths_a - lengths_b
    sure = confidence(np.abs(margins))
    known = (human != 0) & (margins != 0)
    decided, told, grouped = margins[known], chosen[known], groups[known]
    right = (np.sign(decided) == human[known]).astype(np.float64)
    return AnnotatorAccuracy(
        **vars(calibration(decided, told, grouped)),
        agreement=agreement(margins, human, groups),
        by_quarter=quarters(sure[known], right, grouped),
        calibrated=None
        if temperature is None
        else calibration(decided / temperature, told, grouped),
        mean_confidence=mean(sure),
        sure_half=_sure_half(sure[known], right, grouped),
        length_baseline=agreement(longer, human, groups),
        above_length=_above_length(margins, longer, human, groups),
        margin_length=correlation(margins, longer),
        margin_by_length=margin_by_length(margins, longer),
        confidence_length=correlation(sure, np.abs(longer)),
    )


def _above_length(margins: Floats, longer: Floats, human: Floats, groups: Groups) -> Estimate:
    """How much more often the margin is right than the longer answer, on the same pairs."""
    labelled = human != 0
    more = (np.sign(margins) - np.sign(longer)) * human / 2
    return estimate(more[labelled], groups[labelled], -1.0, 1.0)


def _sure_half(sure: Floats, right: Floats, groups: Groups) -> Estimate:
    """How much more often the margin is right in the more confident half of the decided pairs.

    A pair's value is the difference and the pair's own influence on it, so that their mean is the
    difference and their spread, by prompt, its error.
    """
    half = len(sure) // 2
    if not half:
        return Estimate(None, None, None)
    top = np.zeros(len(sure), dtype=bool)
    top[np.argsort(sure, kind="stable")[-half:]] = True
    means = right[top].mean(), right[~top].mean()
    alike = len(sure) / np.where(top, half, half - len(sure))  # a pair's part in its half's mean
    values = means[0] - means[1] + alike * (right - np.where(top, *means))
    return estimate(values, groups, -1.0, 1.0)


def policy_accuracy(
    logp_a: ArrayLike,
    logp_b: ArrayLike,
    ref_logp_a: ArrayLike,
    ref_logp_b: ArrayLike,
    labels: Sequence[Label | None],
    beta: float,
    prompts: Sequence[Hashable] | None = None,
) -> PolicyAccuracy:
    """Measures a policy's implicit reward on held-out human pairs.

    Args:
        logp_a: [N], log-probs of the first answers under the policy, in nats: summed, or a token's
            mean where the objective has no reference.
        logp_b: [N], of the second answers.
        ref_logp_a: [N], the same under the reference; 0 where there is none.
        ref_logp_b: [N], the same under the reference.
        labels: [N], the human's choice, `a` or `b`; None where there is none.
        beta: the β of the loss.
        prompts: [N], what tells prompts apart; None when none repeats.

    Raises:
        ValueError: for columns of unequal length, a log-prob that is not finite, a bad label.
    """
    policy_a, policy_b = column("logp_a", logp_a), column("logp_b", logp_b)
    reference_a, reference_b = column("ref_logp_a", ref_logp_a), column("ref_logp_b", ref_logp_b)
    human = signs(labels)
    check_lengths(
        human, logp_a=policy_a, logp_b=policy_b, ref_logp_a=reference_a, ref_logp_b=reference_b
    )
    margin = beta * ((policy_a - reference_a) - (policy_b - reference_b))
    labelled = human != 0
    return PolicyAccuracy(
        agreement=agreement(margin, human, group_numbers(prompts, len(human))),
        mean_margin=mean(margin[labelled] * human[labelled]),
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
    aligned = column("gold_aligned", gold_aligned)
    baseline = column("gold_baseline", gold_baseline)
    check_lengths(aligned, gold_baseline=baseline)
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
