"""Losses against TRL's own code (never a copy of it), against hand-worked numbers, and gradients.

The oracles are called unbound, their `self` a namespace with the trainer's settings:
`DPOTrainer._compute_loss`, its model a stub that hands over our per-token log-probs;
`CPOTrainer.cpo_loss` for conservative DPO and SimPO; ORPO's whole loss on random logits.
"""

from __future__ import annotations

import importlib
import math
from collections import defaultdict
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, sigmoid

from cwpo_dist.config import ARMS, AlignConfig, ConfigError
from cwpo_dist.lm.rows import Row
from cwpo_dist.objectives import (
    OBJECTIVES,
    LossSettings,
    Objective,
    PairLogps,
    bradley_terry,
    dpo,
    ipo,
    orpo,
    robust,
)
from cwpo_dist.runs.named_loss import objective
from cwpo_dist.training.tasks import Preference

PAIRS, LENGTH, BETA, EPSILON, GAMMA = 5, 9, 0.3, 0.1, 0.7
SETTINGS = LossSettings(BETA, EPSILON, GAMMA)


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
        self.squares = -2 * draw.sum(0) * answer  # log Σ_v p_v² of each token

    def ours(self) -> PairLogps:
        """What our losses are given."""
        chosen, rejected = self.policy.sum(1).chunk(2)
        ref_chosen, ref_rejected = self.reference.sum(1).chunk(2)
        squares = self.squares.sum(1).chunk(2)
        counts = self.n_tokens.chunk(2)
        return PairLogps(chosen, rejected, *counts, ref_chosen, ref_rejected, squares)

    def means(self) -> tuple[Tensor, Tensor]:
        """Log-probs a token, chosen first."""
        chosen, rejected = (self.policy.sum(1) / self.n_tokens).chunk(2)
        return chosen, rejected


def _same(ours: Tensor, theirs: Tensor, of: Tensor) -> None:
    """Values and gradients with respect to per-token log-probs or logits."""
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    our_gradient, their_gradient = (
        torch.autograd.grad(loss, of, retain_graph=True)[0] for loss in (ours, theirs)
    )
    assert their_gradient.abs().max() > 1e-3
    # fp32 inside TRL's ORPO
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-7)


def _trl_loss(batch: _Batch, loss_type: str, *, use_weighting: bool = False) -> Tensor:
    """The batch mean of TRL's loss."""
    trl = importlib.import_module("trl")
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
        use_weighting=use_weighting,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    zeros = torch.zeros_like(batch.policy)

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(
            log_probs=batch.policy,
            log_sum_sq_probs=batch.squares,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
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


# Ours → TRL's DPO of that name, with its numbers.
IN_DPO = {
    "sigmoid": ("sigmoid", LossSettings(BETA)),
    "sigmoid_norm": ("sigmoid_norm", LossSettings(BETA)),
    "ipo_norm": ("ipo", SETTINGS),
    "robust": ("robust", SETTINGS),
    "hinge": ("hinge", SETTINGS),
}


@pytest.mark.parametrize("loss_type", IN_DPO)
@pytest.mark.parametrize("seed", range(5))
def test_equals_trls_dpo(loss_type: str, seed: int) -> None:
    batch, (theirs, settings) = _Batch(seed), IN_DPO[loss_type]
    ours = OBJECTIVES[loss_type].loss(batch.ours(), settings).mean()
    _same(ours, _trl_loss(batch, theirs), batch.policy)


@pytest.mark.parametrize("seed", range(5))
def test_wpo_equals_trls_weighted_dpo(seed: int) -> None:
    batch = _Batch(seed)
    ours = OBJECTIVES["wpo"].loss(batch.ours(), LossSettings(BETA)).mean()
    _same(ours, _trl_loss(batch, "sigmoid", use_weighting=True), batch.policy)


@pytest.mark.parametrize("seed", range(5))
def test_conservative_dpo_equals_trls_cpo_on_log_ratios(seed: int) -> None:
    """Also with an ε of each pair's own: soft labels."""
    batch = _Batch(seed)
    for epsilon in (0.0, EPSILON, torch.rand(PAIRS, dtype=torch.float64) / 2):
        ours = dpo(batch.ours(), LossSettings(BETA, epsilon)).mean()
        theirs = _trl_cpo(*batch.ours().ratios, "sigmoid", epsilon).mean()
        _same(ours, theirs, batch.policy)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
def test_simpo_equals_trls_cpo(seed: int, epsilon: float) -> None:
    batch = _Batch(seed)
    ours = OBJECTIVES["simpo"].loss(batch.ours(), LossSettings(BETA, epsilon, GAMMA)).mean()
    _same(ours, _trl_cpo(*batch.means(), "simpo", epsilon).mean(), batch.policy)


def _trl_cpo(chosen: Tensor, rejected: Tensor, loss_type: str, epsilon: float | Tensor) -> Tensor:
    """The losses [P] of TRL's CPO."""
    cpo = importlib.import_module("trl.experimental.cpo")
    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
        loss_type=loss_type,
        beta=BETA,
        label_smoothing=epsilon,
        simpo_gamma=GAMMA,
    )
    losses: Tensor = cpo.CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]
    return losses


@pytest.mark.parametrize("seed", range(5))
def test_orpos_odds_ratio_equals_trls(seed: int) -> None:
    trainer = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    trl = importlib.import_module("trl.experimental.orpo").ORPOTrainer
    batch = _Batch(seed)
    chosen, rejected = batch.means()
    theirs = -trl.odds_ratio_loss(trainer, chosen, rejected)[0].mean()
    ours = (orpo(batch.ours(), SETTINGS) + chosen).mean()
    _same(ours, theirs, batch.policy)


@pytest.mark.parametrize("seed", range(5))
def test_orpo_equals_all_of_trls(seed: int) -> None:
    """One pair, a prompt of one token: there TRL's NLL, too, is of the answer's tokens alone."""
    trl = importlib.import_module("trl.experimental.orpo").ORPOTrainer
    generator = torch.Generator().manual_seed(seed)
    n_chosen, n_rejected = (int(n) for n in torch.randint(2, 9, (2,), generator=generator))
    longest, words = 1 + max(n_chosen, n_rejected), 11
    logits = torch.randn(2, longest, words, generator=generator).requires_grad_()
    tokens = torch.randint(0, words, (2, longest), generator=generator)
    inputs: dict[str, Tensor] = {}
    for name, ids, n in zip(("chosen", "rejected"), tokens, (n_chosen, n_rejected), strict=True):
        ids = ids[None, : 1 + n]
        inputs[f"{name}_input_ids"], inputs[f"{name}_attention_mask"] = ids, torch.ones_like(ids)
        inputs[f"{name}_labels"] = ids.masked_fill(torch.arange(1 + n) == 0, -100)
    trainer = SimpleNamespace(
        beta=BETA,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda t: t),
        is_encoder_decoder=False,
        padding_value=0,
        aux_loss_enabled=False,
        concatenated_inputs=trl.concatenated_inputs,
        get_batch_logps=trl.get_batch_logps,
    )
    trainer.concatenated_forward = partial(trl.concatenated_forward, trainer)
    trainer.odds_ratio_loss = partial(trl.odds_ratio_loss, trainer)
    theirs, _ = trl.get_batch_loss_metrics(
        trainer, lambda *_, **__: SimpleNamespace(logits=logits), inputs
    )
    each = logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
    counts = torch.tensor([[n_chosen], [n_rejected]])
    chosen, rejected = (each * (torch.arange(longest - 1) < counts)).sum(1, keepdim=True)
    nothing = torch.zeros(1)
    pair = PairLogps(chosen, rejected, *counts.float(), nothing, nothing)
    _same(orpo(pair, SETTINGS).mean(), theirs, logits)


def test_summed_ipo_differs_from_trl() -> None:
    """The paper sums, TRL averages over tokens: nobody should take the one for the other."""
    batch = _Batch(0)
    summed = ipo(batch.ours(), SETTINGS).mean().item()
    assert summed != pytest.approx(_trl_loss(batch, "ipo").item(), abs=1e-3)


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_the_sft_term_is_the_mean_of_the_chosen_answers_tokens(loss_type: str) -> None:
    batch, found = _Batch(3), OBJECTIVES[loss_type]
    plain = found.losses(batch.ours(), SETTINGS)
    torch.testing.assert_close(plain, found.loss(batch.ours(), SETTINGS), rtol=0, atol=0)
    ours = found.losses(batch.ours(), replace(SETTINGS, sft_coefficient=0.3))
    chosen, mask = batch.policy[:PAIRS], batch.completion_mask[:PAIRS, 1:].bool()
    of_tokens = [tokens[kept] for tokens, kept in zip(chosen, mask, strict=True)]
    assert len({len(each) for each in of_tokens}) > 1, "a mean over all tokens would be another"
    expected = plain + torch.stack([-0.3 * each.mean() for each in of_tokens])
    torch.testing.assert_close(ours, expected)
    up = torch.autograd.grad(ours.sum() - plain.sum(), batch.policy)[0]
    assert (up[:PAIRS].sum(1) < 0).all(), "a step makes chosen answers likelier"
    assert not up[PAIRS:].any(), "and leaves the rejected ones alone"


def test_a_new_objective_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRIBUTING.md's example, TRL's `apo_zero`, all the way to a weighted task's losses."""

    def apo_zero(pairs: PairLogps, settings: LossSettings) -> Tensor:
        chosen, rejected = pairs.ratios
        return 1 - sigmoid(settings.beta * chosen) + sigmoid(settings.beta * rejected)

    monkeypatch.setitem(OBJECTIVES, "apo_zero", Objective(apo_zero))
    batch = _Batch(4)
    pairs, weights = batch.ours(), [0.1, 0.5, 1.0, 0.0, 0.7]
    found, settings = objective(AlignConfig(loss_type="apo_zero", beta=BETA))
    _same(found.loss(pairs, settings).mean(), _trl_loss(batch, "apo_zero"), batch.policy)
    rows = [
        Row([1], ([0] * int(a), [0] * int(b)))
        for a, b in zip(pairs.n_chosen, pairs.n_rejected, strict=True)
    ]
    references = torch.stack([pairs.ref_chosen, pairs.ref_rejected], dim=1)
    task = Preference(rows, list("abcde"), weights, references.tolist(), "apo_zero", settings.beta)
    outputs = torch.stack([pairs.chosen, pairs.rejected], dim=1)
    expected = found.loss(pairs, settings) * torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(task.losses(outputs, range(PAIRS)), expected)
    beside = replace(task, sft_coefficient=0.5).losses(outputs, range(PAIRS)) - expected
    nll = -pairs.chosen / pairs.n_chosen * torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(beside, 0.5 * nll)


def test_soft_labels_are_each_pairs_own_smoothing() -> None:
    rows, outputs = [Row([1], ([2], [3, 4]))] * 2, torch.tensor([[-1.0, -2.0], [-3.0, -5.0]])
    given = (rows, ["a", "b"], [1.0, 0.5], [(-1.5, -1.0), (-2.0, -2.5)], "sigmoid", BETA)
    soft = Preference(*given, probabilities=[0.9, 0.6])
    alone = [
        Preference(*given, label_smoothing=epsilon).losses(outputs, [0, 1])
        for epsilon in (0.1, 0.4)
    ]
    expected = torch.stack([alone[0][0], alone[1][1]])
    torch.testing.assert_close(soft.losses(outputs, [0, 1]), expected)


@pytest.mark.parametrize(
    ("align", "soft", "parts"),
    [
        ({"loss_type": "dpo"}, False, ["align.loss_type: 'dpo' is unknown", "DPO is sigmoid"]),
        (
            {"loss_type": "hinge", "label_smoothing": 0.2},
            False,
            [
                "align.label_smoothing: 0.2 is not read by loss_type 'hinge'",
                "sigmoid or sigmoid_norm or robust or re_dpo or wpo or simpo",
            ],
        ),
        ({"simpo_gamma": 1.0}, False, ["align.simpo_gamma: 1.0", "'sigmoid'", "take simpo"]),
        (
            {"loss_type": "simpo", "ropo_alpha": 6.0},
            False,
            ["align.ropo_alpha: 6.0 is not read by loss_type 'simpo'", "take ropo"],
        ),
        (
            {"loss_type": "robust"},
            True,
            ["'robust' takes no soft labels", "sigmoid or sigmoid_norm or wpo or simpo"],
        ),
        ({"label_smoothing": 0.1}, True, ["align.label_smoothing: 0.1 beside arm 'soft'"]),
    ],
)
def test_what_a_loss_would_ignore_is_refused(
    align: dict[str, Any], soft: bool, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        objective(AlignConfig(**align), soft_labels=soft)
    for part in parts:
        assert part in str(refused.value)


def test_unless_told_epsilon_is_the_papers_and_gamma_is_trls() -> None:
    for name, expected in {"robust": 0.1, "sigmoid": 0.0, "simpo": 0.0, "orpo": 0.0}.items():
        _, settings = objective(AlignConfig(loss_type=name))
        assert (settings.label_smoothing, settings.simpo_gamma) == (expected, 0.5)
    assert [name for name, arm in ARMS.items() if arm.soft_labels] == ["soft"]


def _pairs(chosen: Any, rejected: Any, ref_chosen: Any, ref_rejected: Any) -> PairLogps:
    """Of answers of two and of three tokens."""
    numbers = [torch.as_tensor(n).reshape(-1) for n in (chosen, rejected, ref_chosen, ref_rejected)]
    ones, nothing = torch.ones_like(numbers[0]), torch.zeros_like(numbers[0])
    return PairLogps(*numbers[:2], 2 * ones, 3 * ones, *numbers[2:], (nothing, nothing))


def test_by_hand() -> None:
    # h = (−10 − −12) − (−11 − −10) = 2 − (−1) = 3
    pair, half = _pairs(-10.0, -11.0, -12.0, -10.0), LossSettings(0.5, 0.1)
    log_sigmoid = -math.log(1 + math.exp(-1.5))  # β h = 1.5
    log_sigmoid_flipped = -math.log(1 + math.exp(1.5))
    assert dpo(pair, LossSettings(0.5)).item() == pytest.approx(-log_sigmoid, abs=1e-6)
    conservative = -0.9 * log_sigmoid - 0.1 * log_sigmoid_flipped
    assert dpo(pair, half).item() == pytest.approx(conservative, abs=1e-6)
    assert ipo(pair, half).item() == pytest.approx((3 - 1) ** 2, abs=1e-6)
    eleven = -0.9 / 0.8 * log_sigmoid + 0.1 / 0.8 * log_sigmoid_flipped
    assert robust(pair, half).item() == pytest.approx(eleven, abs=1e-6)
    # P(y⁺) = e⁻¹ of two tokens, P(y⁻) = e⁻² of three
    odds_ratio = (math.exp(-1) / (1 - math.exp(-1))) / (math.exp(-2) / (1 - math.exp(-2)))
    expected = 1 + 0.5 * math.log(1 + 1 / odds_ratio)
    assert orpo(_pairs(-2.0, -6.0, 0.0, 0.0), half).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "value"),
    [("sigmoid", math.log(2)), ("robust", math.log(2)), ("ipo", 1.0), ("hinge", 1.0)],
)
def test_step_zero(loss_type: str, value: float) -> None:
    """Policy = reference: ln 2, and (1/(2β))² = 1 at β = 0.5 for IPO."""
    chosen, rejected = [-3.0, -70.0], [-5.0, -1.0]
    pairs = _pairs(chosen, rejected, chosen, rejected)
    losses = OBJECTIVES[loss_type].loss(pairs, LossSettings(0.5, EPSILON))
    assert losses.tolist() == pytest.approx([value, value], abs=1e-6)


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_weight_one_is_unweighted_and_weights_scale_each_pair_alone(loss_type: str) -> None:
    batch = _Batch(1)
    losses = OBJECTIVES[loss_type].loss(batch.ours(), SETTINGS)
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
    pairs, settings = _Batch(2).ours(), LossSettings(BETA)
    torch.testing.assert_close(robust(pairs, settings), dpo(pairs, settings))


def test_robust_is_unbiased_under_flipped_labels() -> None:
    """Its mean over kept and flipped labels is DPO on clean labels: what ε is for."""
    pairs = _Batch(3).ours()
    kept = robust(pairs, SETTINGS)
    swapped = replace(
        pairs,
        chosen=pairs.rejected,
        rejected=pairs.chosen,
        ref_chosen=pairs.ref_rejected,
        ref_rejected=pairs.ref_chosen,
    )
    flipped, clean = robust(swapped, SETTINGS), dpo(pairs, LossSettings(BETA))
    torch.testing.assert_close((1 - EPSILON) * kept + EPSILON * flipped, clean)


def test_rewards_are_log_ratios_or_means() -> None:
    pair = _pairs(-10.0, -12.0, -12.0, -9.0)
    assert [r.item() for r in OBJECTIVES["sigmoid"].rewards(pair, 0.5)] == [1.0, -1.5]
    assert [r.item() for r in OBJECTIVES["simpo"].rewards(pair, 0.5)] == [-2.5, -2.0]


def test_bradley_terry() -> None:
    losses = bradley_terry(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 5.0]))
    by_hand = [math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.exp(5))]
    assert losses.tolist() == pytest.approx(by_hand, abs=1e-6)


@given(st.floats(-1e4, 0, width=32))
def test_huge_margins_stay_finite(margin: float) -> None:
    """Also ORPO where an answer is certain, whose odds are infinite."""
    zero, score = torch.zeros(1), torch.tensor([margin], requires_grad=True)
    losses = bradley_terry(score, zero)
    for pair in (_pairs(score, zero, zero, zero), _pairs(zero, score, zero, zero)):
        for found in OBJECTIVES.values():
            losses = losses + found.loss(pair, LossSettings(0.5, 0.1))
    (gradient,) = torch.autograd.grad(losses.sum(), score)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()
