"""Margins, log-probs or gold scores against held-out labels in, accuracies with intervals out.

Shapes: N = pairs, in any order that all arguments share.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cwpo_dist.evaluation.calibration import Calibration, calibration, quarters
from cwpo_dist.evaluation.length import (
    Correlation,
    LengthGroup,
    correlation,
    margin_by_length,
)
from cwpo_dist.evaluation.shares import (
    Accuracy,
    AsDict,
    Group,
    agreement,
    check_lengths,
    column,
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
        length_baseline: the longer answer wins.
        margin_length: score difference a − b with length difference a − b, all pairs.
        margin_by_length: the same as ten parts by length difference.
        confidence_length: confidence with |length difference|, all pairs.
    """

    agreement: Accuracy
    by_quarter: tuple[Group, ...]
    calibrated: Calibration | None
    mean_confidence: float | None
    length_baseline: Accuracy
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
        length_baseline=agreement(longer, human, groups),
        margin_length=correlation(margins, longer),
        margin_by_length=margin_by_length(margins, longer),
        confidence_length=correlation(sure, np.abs(longer)),
    )


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
