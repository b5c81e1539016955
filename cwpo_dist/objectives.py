"""Log-probs or scores of a pair's two answers in, one loss per pair out; pure and unweighted.

Equation numbers are those of Afzali, Jeon & Brbić (arXiv 2603.04968). The weight C stays outside:
the loop multiplies each pair's loss by it, so every loss here can be weighted alike.

Shapes: P = pairs; every tensor is [P], log-probs are summed over an answer's tokens, in nats.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PreferenceLoss(Protocol):
    """One signature for every `align.loss_type`, so that the loop needs no cases."""

    def __call__(
        self,
        chosen_P: Tensor,
        rejected_P: Tensor,
        ref_chosen_P: Tensor,
        ref_rejected_P: Tensor,
        beta: float,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Returns the loss of each pair, [P]."""


def log_ratio_difference(
    chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor
) -> Tensor:
    """The paper's h = log π(y⁺)/π_ref(y⁺) − log π(y⁻)/π_ref(y⁻), in nats, [P]."""
    return (chosen_P - ref_chosen_P) - (rejected_P - ref_rejected_P)


def dpo(
    chosen_P: Tensor,
    rejected_P: Tensor,
    ref_chosen_P: Tensor,
    ref_rejected_P: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO (eq. 9 without C), [P]; ln 2 where policy and reference are one.

    `label_smoothing` is not read, as in TRL's `sigmoid`: it is here for the common signature.
    """
    h_P = log_ratio_difference(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P)
    return -logsigmoid(beta * h_P)  # eq. 9


def ipo(
    chosen_P: Tensor,
    rejected_P: Tensor,
    ref_chosen_P: Tensor,
    ref_rejected_P: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """IPO (eq. 10 without C), [P], of log-probs summed over tokens, as the paper writes it.

    TRL's `ipo` divides each log-ratio by its answer's token count first: log-probs divided so
    before the call give TRL's value. `label_smoothing` is not read.
    """
    h_P = log_ratio_difference(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P)
    return torch.square(h_P - 1 / (2 * beta))  # eq. 10; the minus printed before it is a typo


def robust(
    chosen_P: Tensor,
    rejected_P: Tensor,
    ref_chosen_P: Tensor,
    ref_rejected_P: Tensor,
    beta: float,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Robust DPO (eq. 11 without C), [P]: unbiased when a share ε of the labels is flipped.

    Args:
        chosen_P: log π(y⁺).
        rejected_P: log π(y⁻).
        ref_chosen_P: log π_ref(y⁺).
        ref_rejected_P: log π_ref(y⁻).
        beta: the paper's β.
        label_smoothing: the paper's ε, in [0, 0.5); at 0 the loss is DPO. The loss falls below
            zero for large h: it is an estimate of the loss under clean labels, not a distance.

    Raises:
        ValueError: for an ε of a half or more, where no label tells anything.
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing: {label_smoothing} is not in [0, 0.5); give the share of flipped "
            "labels, 0.1 in the paper"
        )
    scaled_P = beta * log_ratio_difference(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P)
    kept = (1 - label_smoothing) / (1 - 2 * label_smoothing)
    flipped = label_smoothing / (1 - 2 * label_smoothing)
    return -kept * logsigmoid(scaled_P) + flipped * logsigmoid(-scaled_P)  # eq. 11


def bradley_terry(score_chosen_P: Tensor, score_rejected_P: Tensor) -> Tensor:
    """The annotator's loss (eq. 5), [P]: −log σ(r(x, y⁺) − r(x, y⁻))."""
    return -logsigmoid(score_chosen_P - score_rejected_P)  # eq. 5


# Keyed by `align.loss_type` (TRL's names).
LOSSES: dict[str, PreferenceLoss] = {"sigmoid": dpo, "ipo": ipo, "robust": robust}
