"""Log-probs and token counts, or scores, of a pair's two answers in, one loss per pair out; pure.

Equation numbers are those of Afzali, Jeon & Brbić (arXiv 2603.04968). The weight C stays outside:
the loop multiplies each pair's loss by it, so every loss here can be weighted alike.

Shapes: P = pairs; every tensor is [P], log-probs are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class PairLogps:
    """What a preference loss may read of P pairs, [P] each.

    Attributes:
        chosen: log π(y⁺), summed over the answer's tokens.
        rejected: log π(y⁻).
        n_chosen: tokens of y⁺, its EOS among them.
        n_rejected: tokens of y⁻.
        ref_chosen: log π_ref(y⁺); zeros for an objective without a reference.
        ref_rejected: log π_ref(y⁻).
        squares: Σ_t log Σ_v π(v)² over the tokens t of y⁺, and of y⁻, with v all of the vocabulary;
            of an objective that reads them.
    """

    chosen: Tensor
    rejected: Tensor
    n_chosen: Tensor
    n_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    squares: tuple[Tensor, Tensor] | None = None

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """Both answers' log π/π_ref, chosen first."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def h(self) -> Tensor:
        """The paper's h = log π(y⁺)/π_ref(y⁺) − log π(y⁻)/π_ref(y⁻)."""
        chosen, rejected = self.ratios
        return chosen - rejected

    @property
    def h_per_token(self) -> Tensor:
        """The same difference, of each log-ratio divided by its answer's tokens."""
        chosen, rejected = self.ratios
        return chosen / self.n_chosen - rejected / self.n_rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Both answers' log π(y)/|y|, chosen first."""
        return self.chosen / self.n_chosen, self.rejected / self.n_rejected


@dataclass(frozen=True)
class LossSettings:
    """Numbers of a loss.

    Attributes:
        beta: β; of ORPO the paper's λ; a tensor [P] gives each pair its own.
        label_smoothing: ε, the share of labels taken to be flipped; a tensor [P] gives each pair
            its own: 1 − the annotator's probability, for soft labels.
        simpo_gamma: γ, SimPO's target margin in units of reward.
        sft_coefficient: λ of the chosen answer's own likelihood, beside any loss.
        ropo_alpha: α, how much ROPO's noise-tolerant term counts beside DPO's.
        dr_dpo_beta: β' of Dr. DPO; the larger, the more alike pairs count.
        level: of Dr. DPO, see `level_of`.
    """

    beta: float | Tensor
    label_smoothing: float | Tensor = 0.0
    simpo_gamma: float = 0.5
    sft_coefficient: float = 0.0
    ropo_alpha: float = 14.0
    dr_dpo_beta: float = 1.0
    level: float = 0.0


PreferenceLoss = Callable[[PairLogps, LossSettings], Tensor]


def dpo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """DPO (eq. 9 without C), [P]; ln 2 where policy and reference are one.

    With label smoothing it is conservative DPO, the cross-entropy against the label's probability:
    −(1−ε)·log σ(βh) − ε·log σ(−βh). TRL's DPO has that no more, its CPO does.
    """
    return _cross_entropy(settings.beta * pairs.h, settings.label_smoothing)  # eq. 9 at ε = 0


def dpo_per_token(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """DPO of each log-ratio divided by its answer's tokens, [P]: so that length counts for nothing.

    Length-normalized DPO of Tülu 3 (arXiv 2411.15124) and OLMo 2; TRL calls it `sigmoid_norm`.
    """
    return _cross_entropy(settings.beta * pairs.h_per_token, settings.label_smoothing)


def ipo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """IPO (eq. 10 without C), [P], of log-probs summed over tokens, as the paper writes it."""
    return torch.square(pairs.h - 1 / (2 * settings.beta))  # eq. 10; its printed minus is a typo


def ipo_per_token(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """IPO of each log-ratio divided by its answer's tokens, [P]: what TRL calls `ipo`."""
    return torch.square(pairs.h_per_token - 1 / (2 * settings.beta))


def robust(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """Robust DPO (eq. 11 without C), [P]: unbiased when a share ε < ½ of the labels is flipped.

    At ε = 0 it is DPO. It falls below zero for large h: it is an estimate of the loss under clean
    labels, not a distance.
    """
    scaled_P, epsilon = settings.beta * pairs.h, settings.label_smoothing
    kept, flipped = (1 - epsilon) / (1 - 2 * epsilon), epsilon / (1 - 2 * epsilon)
    return -kept * logsigmoid(scaled_P) + flipped * logsigmoid(-scaled_P)  # eq. 11


def ropo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """ROPO (arXiv 2404.04102), [P]: 4α/(1+α)² · (−log σ(βh) + α·σ(−βh)).

    DPO pulls hardest where the policy contradicts the label, as it does where labels are wrong;
    here a pair that it is unsure of does. For α ≥ 1 the factor makes the largest slope in βh 1, as
    DPO's is. The equation is as two public implementations of the paper have it.
    """
    scaled_P, alpha = settings.beta * pairs.h, settings.ropo_alpha
    tolerant_P = torch.sigmoid(-scaled_P)
    return 4 * alpha / (1 + alpha) ** 2 * (-logsigmoid(scaled_P) + alpha * tolerant_P)


def re_dpo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """RE-PO on DPO (arXiv 2509.24159, eq. 5), [P]: −w·log σ(βh) − (1−w)·log σ(−βh).

    1 − w is `flipped`, held fixed: an M-step of EM. Its gradient is that of the paper's eq. 3,
    −log((1−ε)·σ(βh) + ε·σ(−βh)).
    """
    return _cross_entropy(settings.beta * pairs.h, flipped(pairs, settings).detach())


def flipped(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """1 − w of RE-PO (eq. 4), [P]: the probability that a label is wrong, given the policy.

    A share ε of all labels is; w = (1−ε)·σ(βh) / ((1−ε)·σ(βh) + ε·σ(−βh)) = σ(βh − logit ε).
    """
    scaled_P = settings.beta * pairs.h
    epsilon = torch.as_tensor(settings.label_smoothing, dtype=scaled_P.dtype)
    return torch.sigmoid(epsilon.logit() - scaled_P)


def flipped_share(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """The next ε of RE-PO (eq. 7): a tenth of the way to the batch's mean, as in the paper."""
    return 0.9 * settings.label_smoothing + 0.1 * flipped(pairs, settings).mean()


def dr_dpo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """Dr. DPO (arXiv 2407.07880), [P]: −β'·log(mean exp(−ℓ/β')) of DPO's ℓ, pair by pair.

    −β'·(Z + exp(−ℓ/β' − Z) − 1) with the batch's `level_of` Z, a constant: its mean over the batch
    is −β'·Z, which is that, and so is its gradient: a pair counts by exp(−ℓ/β') over their mean.
    """
    beta, level = settings.dr_dpo_beta, settings.level
    return -beta * (level + torch.exp(-dpo(pairs, settings) / beta - level) - 1)


def level_of(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """Z = log(mean exp(−ℓ/β')) of all pairs of a global batch."""
    tempered_P = -dpo(pairs, settings) / settings.dr_dpo_beta
    return torch.logsumexp(tempered_P, 0) - math.log(len(tempered_P))


def wpo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """WPO (arXiv 2406.11827, eq. 2, with its sampled alignment), [P]: w(y⁺)·w(y⁻)·ℓ of DPO's ℓ.

    w(y) = exp(1/|y| · Σ_t log(π(y_t) / Σ_v π(v)²)), held fixed: a pair counts by how likely the
    policy is to write its answers, by the measure of what it writes: tokens drawn from it have an
    expected probability of Σ_v π(v)². As in TRL; the authors' code caps a pair's w(y⁺)·w(y⁻) at 1.
    """
    assert pairs.squares is not None, "of an objective that reads squares"
    (chosen, rejected), (squares_chosen, squares_rejected) = pairs.means, pairs.squares
    expected_P = squares_chosen / pairs.n_chosen + squares_rejected / pairs.n_rejected
    return torch.exp(chosen + rejected - expected_P).detach() * dpo(pairs, settings)


def hinge(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """max(0, 1 − βh), [P] (SLiC, arXiv 2305.10425, on log-ratios)."""
    return torch.relu(1 - settings.beta * pairs.h)


def simpo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6), [P]: −log σ(β·log π(y⁺)/|y⁺| − β·log π(y⁻)/|y⁻| − γ)."""
    chosen, rejected = pairs.means
    margin_P = settings.beta * (chosen - rejected) - settings.simpo_gamma
    return _cross_entropy(margin_P, settings.label_smoothing)


def orpo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """ORPO (arXiv 2403.07691, eq. 6 and 7), [P]: −log P(y⁺) − λ·log σ(log odds(y⁺)/odds(y⁻)).

    P(y) is the geometric mean of the answer's token probabilities, odds = P/(1 − P), λ is `beta`.
    The first term is the paper's, the chosen answer's own tokens, pair by pair; TRL's also counts
    the prompt's, and divides by the tokens of the whole batch.
    """
    chosen, rejected = pairs.means
    log_odds_P = (chosen - _log_of_rest(chosen)) - (rejected - _log_of_rest(rejected))
    return -chosen - settings.beta * logsigmoid(log_odds_P)


def bradley_terry(
    score_chosen_P: Tensor, score_rejected_P: Tensor, shares_P: Tensor | None = None
) -> Tensor:
    """The annotator's loss (eq. 5), [P]: −log σ(d) of d = r(x, y⁺) − r(x, y⁻).

    With the share p of people that prefer y⁺ it is the cross-entropy against it,
    −p·log σ(d) − (1−p)·log σ(−d): least where σ(d) = p, so that a tie is taught as a tie.
    """
    epsilon = 0.0 if shares_P is None else 1 - shares_P
    return _cross_entropy(score_chosen_P - score_rejected_P, epsilon)  # eq. 5 where p is 1


def _cross_entropy(logits_P: Tensor, epsilon: float | Tensor) -> Tensor:
    """−(1−ε)·log σ(z) − ε·log σ(−z), [P]: the label is right with probability 1 − ε."""
    if isinstance(epsilon, float) and epsilon == 0.0:  # finite for an infinite margin, too
        return -logsigmoid(logits_P)
    return -(1 - epsilon) * logsigmoid(logits_P) - epsilon * logsigmoid(-logits_P)


def _log_of_rest(log_probability_P: Tensor) -> Tensor:
    """log(1 − P) from log P, [P]; finite also where P rounds to 1."""
    below_zero = log_probability_P.clamp(max=-torch.finfo(log_probability_P.dtype).eps)
    return torch.log(-torch.expm1(below_zero))


@dataclass(frozen=True)
class Objective:
    """A loss and what has to be known to use it.

    Attributes:
        loss: one number a pair.
        reference: it compares with a frozen reference. Without one the stage `reference` falls
            away, and an answer's implicit reward is β·log π(y)/|y| instead of β·log π/π_ref.
        label_smoothing: the ε that it takes unless told; None: it reads none.
        soft_labels: ε may differ from pair to pair.
        own: the setting that it alone reads.
        learns: from all pairs of a global batch a number of the loss: ε, for the next step.
        looks_ahead: it is `level`, for this very step, which computes its outputs twice.
        squares: it reads `PairLogps.squares`.
    """

    loss: PreferenceLoss
    reference: bool = True
    label_smoothing: float | None = None
    soft_labels: bool = False
    own: str | None = None
    learns: PreferenceLoss | None = None
    looks_ahead: bool = False
    squares: bool = False

    def losses(self, pairs: PairLogps, settings: LossSettings) -> Tensor:
        """The loss of each pair, [P]: ℓ − λ·log π(y⁺)/|y⁺| with λ = `sft_coefficient`.

        That keeps the chosen answer likely where ℓ could make both less so (arXiv 2404.19733,
        eq. 1, up to a factor).
        """
        loss_P = self.loss(pairs, settings)
        if not settings.sft_coefficient:  # as most: not even a rounding apart
            return loss_P
        return loss_P - settings.sft_coefficient * pairs.means[0]

    def rewards(self, pairs: PairLogps, beta: float | Tensor) -> tuple[Tensor, Tensor]:
        """The implicit rewards of both answers, [P] each, chosen first."""
        chosen, rejected = pairs.ratios if self.reference else pairs.means
        return beta * chosen, beta * rejected


# Keyed by `align.loss_type`: TRL's names, but for IPO, whose two forms TRL does not tell apart.
OBJECTIVES: dict[str, Objective] = {
    "sigmoid": Objective(dpo, label_smoothing=0.0, soft_labels=True),
    "sigmoid_norm": Objective(dpo_per_token, label_smoothing=0.0, soft_labels=True),
    "ipo": Objective(ipo),
    "ipo_norm": Objective(ipo_per_token),
    "robust": Objective(robust, label_smoothing=0.1),
    "ropo": Objective(ropo, own="ropo_alpha"),
    "re_dpo": Objective(re_dpo, label_smoothing=0.1, learns=flipped_share),
    "dr_dpo": Objective(dr_dpo, own="dr_dpo_beta", learns=level_of, looks_ahead=True),
    "wpo": Objective(wpo, label_smoothing=0.0, soft_labels=True, squares=True),
    "hinge": Objective(hinge),
    "simpo": Objective(
        simpo, reference=False, label_smoothing=0.0, soft_labels=True, own="simpo_gamma"
    ),
    "orpo": Objective(orpo, reference=False),
}
