"""Losses against noisy labels that TRL lacks: by hand, slopes, and what their papers promise."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cwpo_dist.config import AlignConfig
from cwpo_dist.objectives import LossSettings, PairLogps, objective, ropo

BETA = 0.5


def pairs(scaled: Tensor) -> PairLogps:
    """Of such βh at β = 0.5."""
    nothing = torch.zeros_like(scaled)
    ones = torch.ones_like(scaled)
    return PairLogps(scaled / BETA, nothing, ones, ones, nothing, nothing)


def slopes(loss: Tensor, scaled: Tensor) -> Tensor:
    """Of each pair's loss in its own βh."""
    return torch.autograd.grad(loss.sum(), scaled)[0]


def test_ropo_by_hand() -> None:
    """βh = ln 3: σ(βh) = 3/4; α = 2: 8/9 · (ln 4/3 + 2 · 1/4)."""
    losses = ropo(pairs(torch.tensor([math.log(3)])), LossSettings(BETA, ropo_alpha=2.0))
    assert losses.item() == pytest.approx(8 / 9 * (math.log(4 / 3) + 0.5), abs=1e-6)
    _, settings = objective(AlignConfig(loss_type="ropo"))
    assert settings.ropo_alpha == 14.0, "the paper's, unless told"
    _, settings = objective(AlignConfig(loss_type="ropo", ropo_alpha=6.0))
    assert settings.ropo_alpha == 6.0


@given(st.floats(1.0, 100.0))
def test_ropos_largest_slope_is_one_and_it_always_falls(alpha: float) -> None:
    """The slope s + α·s·(1−s) with s = σ(−βh) is (1+α)²/(4α) at most, at s = (1+α)/(2α)."""
    top = (1 + alpha) / (2 * alpha)
    at_top = 30.0 if top >= 1 else math.log((1 - top) / top)
    scaled = torch.cat([torch.linspace(-30, 30, 601), torch.tensor([at_top])]).double()
    scaled.requires_grad_()
    settings = LossSettings(BETA, ropo_alpha=alpha)
    found = slopes(ropo(pairs(scaled), settings), scaled)
    wrong = torch.sigmoid(-scaled.detach())
    expected = -4 * alpha / (1 + alpha) ** 2 * (wrong + alpha * wrong * (1 - wrong))
    torch.testing.assert_close(found, expected)
    assert (found < 0).all(), "a likelier chosen answer is always better"
    assert float(found.min()) >= -1 - 1e-12
    if top < 1:
        assert float(found[-1]) == pytest.approx(-1.0)


def test_ropo_trusts_a_contradicted_label_less_than_dpo_does() -> None:
    """Far on the wrong side DPO's slope is 1, ROPO's 4α/(1+α)²."""
    scaled = torch.tensor([-40.0], dtype=torch.float64, requires_grad=True)
    settings = LossSettings(BETA)
    expected = -4 * 14 / 15**2
    assert slopes(ropo(pairs(scaled), settings), scaled).item() == pytest.approx(expected)
    aggressive = replace(settings, ropo_alpha=1.0)  # the mildest: DPO's slope there
    assert slopes(ropo(pairs(scaled), aggressive), scaled).item() == pytest.approx(-1.0)
