"""Losses against TRL's own code (never a copy of it), against hand-worked numbers, and gradients.

The oracle is `trl.DPOTrainer._compute_loss`, called unbound: its `self` is a namespace with the
trainer's settings and its model a stub that hands over our per-token log-probs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cwpo_dist.objectives import LOSSES, bradley_terry, dpo, ipo, robust

PAIRS, LENGTH, BETA, EPSILON = 5, 9, 0.3, 0.1


class _Batch:
    """Per-token log-probs [2P, L−1] of policy and reference, TRL's layout: chosen, rejected."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, LENGTH - 1, (2 * PAIRS,), generator=generator)
        # The prompt is the first token(s); a completion takes `lengths` tokens at the end.
        positions = torch.arange(LENGTH)
        self.completion_mask = (positions[None] >= LENGTH - lengths[:, None]).long()
        answer = self.completion_mask[:, 1:]
        self.n_tokens = answer.sum(1)
        draw = torch.rand(2, 2 * PAIRS, LENGTH - 1, generator=generator, dtype=torch.float64)
        self.policy = (-3 * draw[0] * answer).requires_grad_()
        self.reference = -3 * draw[1] * answer

    def ours(self, normalise: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """chosen, rejected, ref_chosen, ref_rejected; normalised: a token's mean, as TRL's IPO."""
        divisor = self.n_tokens if normalise else torch.ones_like(self.n_tokens)
        chosen, rejected = (self.policy.sum(1) / divisor).chunk(2)
        ref_chosen, ref_rejected = (self.reference.sum(1) / divisor).chunk(2)
        return chosen, rejected, ref_chosen, ref_rejected


def _trl_loss(batch: _Batch, loss_type: str) -> Tensor:
    """The batch mean of TRL's loss."""
    trl = pytest.importorskip("trl")
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=EPSILON,
        use_weighting=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    zeros = torch.zeros_like(batch.policy)

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(
            log_probs=batch.policy, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    ref_chosen, ref_rejected = batch.reference.sum(1).chunk(2)
    inputs = {
        "input_ids": torch.zeros(2 * PAIRS, LENGTH, dtype=torch.long),
        "attention_mask": torch.ones(2 * PAIRS, LENGTH, dtype=torch.long),
        "completion_mask": batch.completion_mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    loss: Tensor = trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
    return loss


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "robust"])
@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradient_equal_trl(loss_type: str, seed: int) -> None:
    batch = _Batch(seed)
    ours = LOSSES[loss_type](*batch.ours(normalise=loss_type == "ipo"), BETA, EPSILON).mean()
    theirs = _trl_loss(batch, loss_type)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    our_gradient, their_gradient = (
        torch.autograd.grad(loss, batch.policy)[0] for loss in (ours, theirs)
    )
    assert their_gradient.abs().max() > 1e-3
    torch.testing.assert_close(our_gradient, their_gradient, rtol=0, atol=1e-9)


def test_summed_ipo_differs_from_trl() -> None:
    """The paper sums, TRL averages over tokens: nobody should take the one for the other."""
    batch = _Batch(0)
    summed = ipo(*batch.ours(), BETA).mean().item()
    assert summed != pytest.approx(_trl_loss(batch, "ipo").item(), abs=1e-3)


def test_by_hand() -> None:
    # h = (−10 − −12) − (−11 − −10) = 2 − (−1) = 3
    numbers = [torch.tensor([value]) for value in (-10.0, -11.0, -12.0, -10.0)]
    log_sigmoid = -math.log(1 + math.exp(-1.5))  # β h = 1.5
    log_sigmoid_flipped = -math.log(1 + math.exp(1.5))
    assert dpo(*numbers, 0.5).item() == pytest.approx(-log_sigmoid, abs=1e-6)
    assert ipo(*numbers, 0.5).item() == pytest.approx((3 - 1) ** 2, abs=1e-6)
    eleven = -0.9 / 0.8 * log_sigmoid + 0.1 / 0.8 * log_sigmoid_flipped
    assert robust(*numbers, 0.5, 0.1).item() == pytest.approx(eleven, abs=1e-6)
    assert robust(*numbers, 0.5).item() == pytest.approx(eleven, abs=1e-6), "the paper's ε"


@pytest.mark.parametrize(
    ("loss_type", "value"), [("sigmoid", math.log(2)), ("robust", math.log(2)), ("ipo", 1.0)]
)
def test_step_zero(loss_type: str, value: float) -> None:
    """Policy = reference: ln 2, and (1/(2β))² = 1 at β = 0.5 for IPO."""
    chosen, rejected = torch.tensor([-3.0, -70.0]), torch.tensor([-5.0, -1.0])
    losses = LOSSES[loss_type](chosen, rejected, chosen, rejected, 0.5, EPSILON)
    assert losses.tolist() == pytest.approx([value, value], abs=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "robust"])
def test_weight_one_is_unweighted_and_weights_scale_each_pair_alone(loss_type: str) -> None:
    batch = _Batch(1)
    losses = LOSSES[loss_type](*batch.ours(), BETA, EPSILON)
    assert losses.shape == (PAIRS,)
    plain = torch.autograd.grad(losses.sum(), batch.policy, retain_graph=True)[0]
    ones = torch.autograd.grad((torch.ones(PAIRS) * losses).sum(), batch.policy, retain_graph=True)[
        0
    ]
    assert torch.equal(plain, ones)
    weights = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    weighted = torch.autograd.grad((weights * losses).sum(), batch.policy)[0]
    torch.testing.assert_close(weighted, plain * weights.repeat(2)[:, None])


def test_robust_without_noise_is_dpo() -> None:
    numbers = _Batch(2).ours()
    torch.testing.assert_close(robust(*numbers, BETA, 0.0), dpo(*numbers, BETA))


def test_robust_is_unbiased_under_flipped_labels() -> None:
    """Its mean over kept and flipped labels is DPO on clean labels: what ε is for."""
    chosen, rejected, ref_chosen, ref_rejected = _Batch(3).ours()
    kept = robust(chosen, rejected, ref_chosen, ref_rejected, BETA, EPSILON)
    flipped = robust(rejected, chosen, ref_rejected, ref_chosen, BETA, EPSILON)
    clean = dpo(chosen, rejected, ref_chosen, ref_rejected, BETA)
    torch.testing.assert_close((1 - EPSILON) * kept + EPSILON * flipped, clean)


def test_robust_refuses_labels_that_tell_nothing() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing: 0\.5"):
        robust(*_Batch(0).ours(), BETA, 0.5)


def test_bradley_terry() -> None:
    losses = bradley_terry(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 5.0]))
    by_hand = [math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.exp(5))]
    assert losses.tolist() == pytest.approx(by_hand, abs=1e-6)


@given(st.floats(-1e4, 1e4, width=32))
def test_huge_margins_stay_finite(margin: float) -> None:
    zero, score = torch.zeros(1), torch.tensor([margin], requires_grad=True)
    losses = bradley_terry(score, zero) + dpo(score, zero, zero, zero, 0.5)
    losses = losses + robust(score, zero, zero, zero, 0.5)
    (gradient,) = torch.autograd.grad(losses.sum(), score)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()
