"""Each pair's loss has its own weight and reference, whatever batch or piece the pair is in."""

from __future__ import annotations

import pytest
import torch
from plain_loop import ROWS, WEIGHTS, make_engine, make_run, make_task
from tiny import tiny_causal_lm
from torch.nn.functional import logsigmoid

from cwpo_dist.config import LoraConfig
from cwpo_dist.lm.rows import collate
from cwpo_dist.training import held_out
from cwpo_dist.training.loop import gradients
from cwpo_dist.training.lora import add_lora


@pytest.mark.parametrize("budget", [10**6, 130])
def test_a_batchs_gradient_is_that_of_its_own_pairs(budget: int) -> None:
    """By hand: Σ C·−log σ(β·h) over pairs from anywhere in the data set, over their number."""
    indices = [20, 7, 15, 9]
    task, engine, oracle = make_task(), make_engine(seed=1), make_engine(seed=1)
    result = gradients(task, engine, make_run(budget), 0, indices)
    logps = oracle.module(collate([ROWS[i] for i in indices], "shared", 2)).view(-1, 2)
    assert task.references is not None
    ratios = logps - torch.tensor([task.references[i] for i in indices])
    losses = -logsigmoid(0.5 * (ratios[:, 0] - ratios[:, 1]))
    loss = (torch.tensor([WEIGHTS[i] for i in indices]) * losses).sum() / len(indices)
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    for ours, wanted in zip(engine.module.parameters(), oracle.module.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad, atol=1e-5, rtol=1e-4)


def test_adapters_are_drawn_from_the_seed_alone() -> None:
    def adapters(seed: int) -> list[torch.Tensor]:
        model = add_lora(tiny_causal_lm("llama"), LoraConfig(r=2), "logps", seed)
        return [p.detach() for n, p in model.named_parameters() if "lora_A" in n]

    first = adapters(1)
    torch.manual_seed(9)
    assert first
    assert all(map(torch.equal, first, adapters(1)))
    assert not any(map(torch.equal, first, adapters(2)))


def test_pairs_that_are_drawn_by_their_weight_count_as_one_each() -> None:
    """Whatever the sum is divided by: their weights are in the draw, and in nothing else."""
    weights = [0.1 + k / 40 for k in range(len(ROWS))]
    for normalization in ("none", "batch"):  # divided by their mean they could not be drawn
        task = make_task(normalization, weights=weights, sampling="proportional")
        assert task.denominator([0, 1, 2]) == 3.0
    plain = {n: make_task(n, weights=weights) for n in ("none", "batch", "dataset")}
    assert {n: task.denominator([0, 1, 2]) for n, task in plain.items()} == pytest.approx(
        {"none": 3.0, "batch": sum(weights[:3]), "dataset": 3.0}  # weigh divided these
    )


def test_held_out_numbers_are_the_same_in_whatever_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    task, run = make_task(weights=[1.0] * len(ROWS)), make_run(130)
    whole = held_out.evaluate(task, make_engine(seed=1), run, 1)
    monkeypatch.setattr(held_out, "BATCH", 5)
    pieces = held_out.evaluate(task, make_engine(seed=1), run, 1)
    assert pieces == pytest.approx(whole, rel=1e-4)
