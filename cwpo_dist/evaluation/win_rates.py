"""A policy's answers beside a baseline's in; win rates that know of length, and lengths, out.

Shapes: N = prompts, in one order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from cwpo_dist.evaluation.shares import AsDict, Floats, check_lengths, column, mean
from cwpo_dist.weighting import sigmoid

NEWTON_STEPS = 50
# A normal prior of this precision on both coefficients: separable wins keep a finite answer.
PRECISION = 1e-2


@dataclass(frozen=True)
class Answers(AsDict):
    """How long answers are, and what is left of the wins at equal length.

    Attributes:
        n: prompts, all that were answered.
        length: mean characters of the policy's answers to them.
        baseline_length: of the baseline's.
        length_controlled: win rate, ties halved, at equal length, of the prompts that GRA is of;
            None without gold scores.
    """

    n: int
    length: float | None
    baseline_length: float | None
    length_controlled: float | None


def answer_figures(
    length: ArrayLike,
    baseline_length: ArrayLike,
    gold: ArrayLike | None = None,
    baseline_gold: ArrayLike | None = None,
) -> Answers:
    """Lengths and, with gold scores, the length-controlled win rate.

    Args:
        length: [N] characters of the policy's answers.
        baseline_length: [N] of the baseline's.
        gold: [N] gold scores of the policy's answers.
        baseline_gold: [N] of the baseline's.

    Raises:
        ValueError: for columns of unequal length or a number that is not finite.
    """
    ours, theirs = column("length", length), column("baseline_length", baseline_length)
    check_lengths(ours, baseline_length=theirs)
    controlled = None
    if gold is not None and baseline_gold is not None:
        scores, others = column("gold", gold), column("baseline_gold", baseline_gold)
        check_lengths(ours, gold=scores, baseline_gold=others)
        controlled = length_controlled(won(scores, others), ours - theirs)
    return Answers(len(ours), mean(ours), mean(theirs), controlled)


def won(gold: Floats, baseline: Floats) -> Floats:
    """1 for a win, ½ for a tie, 0 for a loss."""
    return (1 + np.sign(gold - baseline)) / 2


def length_controlled(wins: Floats, longer: Floats) -> float | None:
    """The win rate that a logistic regression predicts for answers of equal length.

    P(win) = σ(θ + φ·tanh(Δ / sd(Δ))), the length term of AlpacaEval 2 (Dubois et al. 2024); the
    figure is σ(θ). Where no length differs it is the win rate, up to the weak prior.
    """
    if len(wins) == 0:
        return None
    spread = float(np.std(longer))
    term = np.tanh(longer / spread) if spread else np.zeros_like(longer)
    design = np.stack([np.ones_like(term), term], axis=1)
    theta = np.zeros(2)
    for _ in range(NEWTON_STEPS):
        chance = sigmoid(design @ theta)
        slope = design.T @ (wins - chance) - PRECISION * theta
        curvature = (design.T * (chance * (1 - chance))) @ design + PRECISION * np.eye(2)
        step = np.linalg.solve(curvature, slope)
        theta = theta + step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    return float(sigmoid(theta[:1])[0])
