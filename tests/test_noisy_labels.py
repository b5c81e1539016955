"""Losses against noisy labels that TRL lacks: by hand, slopes, and what their papers promise."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_loop import ROWS, Record, make_config, make_engine, make_run, make_task
from torch import Tensor

from cwpo_dist.config import AlignConfig
from cwpo_dist.lm.rows import Row, collate
from cwpo_dist.objectives import (
    LossSettings,
    PairLogps,
    dpo,
    dr_dpo,
    flipped,
    level_of,
    re_dpo,
    ropo,
)
from cwpo_dist.runs.named_loss import objective
from cwpo_dist.stop_signals import Preempted
from cwpo_dist.training import held_out
from cwpo_dist.training.loop import gradients, train
from cwpo_dist.training.tasks import Preference
from cwpo_dist.training.torch_engine import TorchEngine

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


def test_re_dpo_by_hand() -> None:
    """βh = ln 3, ε = 0.1: w = 0.9·¾ / (0.9·¾ + 0.1·¼) = 27/28."""
    pair, settings = pairs(torch.tensor([math.log(3)])), LossSettings(BETA, 0.1)
    assert flipped(pair, settings).item() == pytest.approx(1 / 28, abs=1e-6)
    expected = 27 / 28 * math.log(4 / 3) + 1 / 28 * math.log(4)
    assert re_dpo(pair, settings).item() == pytest.approx(expected, abs=1e-6)
    trusting = replace(settings, label_smoothing=0.0)
    torch.testing.assert_close(re_dpo(pair, trusting), dpo(pair, trusting))


@given(st.floats(0.001, 0.499))
def test_re_dpo_has_the_gradient_of_the_mixture(epsilon: float) -> None:
    """Of −log((1−ε)·σ(βh) + ε·σ(−βh)): always downwards, and away from what is surely wrong."""
    scaled = torch.linspace(-30, 30, 61, dtype=torch.float64, requires_grad=True)
    found = slopes(re_dpo(pairs(scaled), LossSettings(BETA, epsilon)), scaled)
    right = torch.sigmoid(scaled)
    mixture = -torch.log((1 - epsilon) * right + epsilon * (1 - right))
    torch.testing.assert_close(found, slopes(mixture, scaled), rtol=1e-6, atol=1e-12)
    assert (found < 0).all(), "a likelier chosen answer is always better"
    assert float(found[0]) > -1e-9, "where DPO pulls hardest"


def test_re_dpo_learns_the_share_of_wrong_labels() -> None:
    """Of a policy that is right about what people mean, a fifth of whose labels are swapped."""
    draw = torch.Generator().manual_seed(0)
    n = 4000
    means = 6 * torch.rand(n, generator=draw, dtype=torch.float64) - 3
    meant = torch.rand(n, generator=draw, dtype=torch.float64) < torch.sigmoid(means)
    labels = meant ^ (torch.rand(n, generator=draw) < 0.2)
    h = torch.where(labels, means, -means)
    outputs, indices = torch.stack([h, torch.zeros_like(h)], 1), range(n)
    row = Row([1], ([2], [3]))
    given = [row] * n, [""] * n, [1.0] * n, [(0.0, 0.0)] * n
    task = Preference(*given, "re_dpo", beta=1.0, label_smoothing=0.45)
    for _ in range(300):
        task.learn(outputs, indices)
    assert task.learned == [pytest.approx(0.2, abs=0.03)]
    assert task.metrics(outputs, indices)["flipped"] == task.learned[0]


def learning(learned: float = 0.1) -> Preference:
    """Preferences that the policy does not share, and a share of wrong labels to learn."""
    told = {"references": [(-80.0, -90.0)] * len(ROWS), "loss_type": "re_dpo"}
    return make_task(**told, label_smoothing=learned)


def gradient(engine: TorchEngine) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in engine.module.parameters()])


def weights(engine: TorchEngine) -> Tensor:
    return torch.cat([p.detach().flatten() for p in engine.module.parameters()])


def test_a_steps_share_is_that_of_the_steps_before_whatever_it_is_cut_into() -> None:
    ends, shares = [], []
    for budget in (10**6, 61):
        task, engine, hooks = learning(), make_engine(), Record()
        train(task, engine, make_run(budget), hooks)
        ends.append(weights(engine))
        shares.append([*(record["flipped"] for record in hooks.records), *task.learned])
    assert shares[0][0] == 0.1
    assert abs(shares[0][-1] - 0.1) > 0.01
    assert shares[1] == pytest.approx(shares[0], abs=1e-6)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5)


def test_restored_it_goes_on_to_the_same_end() -> None:
    whole, engine = learning(), make_engine()
    train(whole, engine, make_run(), Record())
    before, resumed = learning(), make_engine()
    with pytest.raises(Preempted):
        train(before, resumed, make_run(), Record(stop_at=1))
    after = learning()
    after.learned[:] = before.learned
    train(after, resumed, make_run(), Record(), start_step=2)
    assert after.learned == whole.learned
    assert torch.equal(weights(resumed), weights(engine))


def paper(scaled: Tensor, beta: float) -> Tensor:
    """Dr. DPO of a batch as its authors write it."""
    losses = -torch.nn.functional.logsigmoid(scaled)
    return -beta * torch.log(torch.mean(torch.exp(-losses / beta)))


def test_dr_dpo_by_hand() -> None:
    """βh = ln 3 and 0, β' = 1: exp(−ℓ) is σ(βh), ¾ and ½; their mean is 5/8."""
    batch, settings = pairs(torch.tensor([math.log(3), 0.0])), LossSettings(BETA)
    level = float(level_of(batch, settings))
    assert level == pytest.approx(math.log(5 / 8), abs=1e-6)
    losses = dr_dpo(batch, replace(settings, level=level))
    by_hand = [-level - (0.75 / 0.625 - 1), -level - (0.5 / 0.625 - 1)]
    assert losses.tolist() == pytest.approx(by_hand, abs=1e-6)
    assert losses.mean().item() == pytest.approx(math.log(8 / 5), abs=1e-6)


@given(st.floats(0.1, 20.0))
def test_dr_dpo_has_the_papers_value_and_gradient_and_always_falls(beta: float) -> None:
    scaled = torch.linspace(-8, 8, 33, dtype=torch.float64, requires_grad=True)
    settings = LossSettings(BETA, dr_dpo_beta=beta)
    level = float(level_of(pairs(scaled.detach()), settings))
    ours = dr_dpo(pairs(scaled), replace(settings, level=level))
    torch.testing.assert_close(ours.mean(), paper(scaled, beta))
    found = slopes(ours / len(scaled), scaled)
    torch.testing.assert_close(found, slopes(paper(scaled, beta), scaled))
    assert (found < 0).all(), "a likelier chosen answer is always better"
    alike = slopes(dpo(pairs(scaled), settings), scaled) / len(scaled)
    assert found[0] > alike[0], "the pair that the policy contradicts counts less than in DPO"


class RankOf(TorchEngine):
    """One rank of several; what all of them computed in the pass ahead is told to it."""

    def __init__(self, rank: int, world_size: int, ahead: Tensor | None) -> None:
        super().__init__(make_engine().module, make_config())
        self.rank, self.world_size, self.ahead = rank, world_size, ahead

    def total(self, numbers: Tensor) -> Tensor:
        ahead, self.ahead = self.ahead, None
        return numbers if ahead is None else ahead


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("budget", [10**6, 130, 61])
def test_dr_dpo_is_exact_over_the_global_batch(world_size: int, budget: int) -> None:
    """Against the paper's line on all pairs at once; weights of pairs stand outside."""
    indices, told = [1, 4, 6, 9, 12, 17], {"references": [(-80.0, -85.0)] * len(ROWS)}
    task = make_task(**told, loss_type="dr_dpo", weights=[1.0] * len(ROWS), dr_dpo_beta=0.7)
    whole = make_engine()
    outputs = whole.module(collate([ROWS[i] for i in indices], "shared", 2)).view(-1, 2)
    loss = paper(0.5 * (outputs[:, 0] - outputs[:, 1] + 80 - 85), 0.7)
    loss.backward()
    expected = gradient(whole)
    total = torch.zeros_like(expected)
    for rank in range(world_size):
        engine = RankOf(rank, world_size, outputs.detach().double().flatten())
        found = gradients(task, engine, make_run(budget), 0, indices)
        total += gradient(engine) / world_size
    if world_size == 1:
        assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    assert float((total - expected).norm()) < 1e-5 * float(expected.norm())


def test_dr_dpo_of_held_out_pairs_is_that_of_all_of_them() -> None:
    task = make_task(loss_type="dr_dpo", weights=[1.0] * len(ROWS))
    found = held_out.evaluate(task, make_engine(), make_run(), 1)
    assert found["eval_loss"] == pytest.approx(math.log(2), rel=1e-5)
