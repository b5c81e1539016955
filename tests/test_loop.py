"""The loop in plain torch: exact losses and gradients, order, stops, and refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import zero_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_loop import IDS, ROWS, WEIGHTS, Record, make_config, make_engine, make_run, make_task
from torch import Tensor, nn

from cwpo_dist.config import LoraConfig
from cwpo_dist.lm.batches import global_batch, total_steps
from cwpo_dist.lm.modules import AnswerLogProbs
from cwpo_dist.lm.rows import Row
from cwpo_dist.stop_signals import Preempted
from cwpo_dist.training import loop
from cwpo_dist.training.checkpoint import trainable
from cwpo_dist.training.loop import (
    Hooks,
    NonFiniteLoss,
    Run,
    gradients,
    train,
)
from cwpo_dist.training.lora import add_lora
from cwpo_dist.training.optim import STATE_KEYS, fresh_state, learning_rates, make_optimizer
from cwpo_dist.training.tasks import Preference, Sft, Task, TaskError
from cwpo_dist.training.torch_engine import TorchEngine


def first(task: Task, engine: TorchEngine, run: Run, indices: list[int]) -> float:
    return gradients(task, engine, run, 0, indices).loss


@pytest.mark.parametrize("budget", [10**6, 130, 61])
def test_dpo_starts_at_ln_2(budget: int) -> None:
    """`none`: times the batch's mean weight; `batch`: ln 2; `dataset`: between the two means."""
    indices = [1, 5, 9, 20]
    mean = np.mean([WEIGHTS[i] for i in indices])
    for normalization, expected in (
        ("none", mean),
        ("batch", 1.0),
        ("dataset", mean / np.mean(WEIGHTS)),
    ):
        loss = first(make_task(normalization), make_engine(), make_run(budget), indices)
        assert loss == pytest.approx(math.log(2) * expected, rel=1e-5)


def test_weights_that_act_give_the_gradient_of_dividing_by_their_mean() -> None:
    """Σ (C/C̄)·ℓ / n, as a trainer elsewhere has it from the column, is Σ C·ℓ / (n·C̄)."""
    indices = [0, 3, 7, 11, 19]
    acting, plain = make_engine(seed=1), make_engine(seed=1)
    first(make_task("dataset"), acting, make_run(), indices)
    first(make_task("none"), plain, make_run(), indices)
    expected = gradient(plain) / np.mean(WEIGHTS)
    assert float((gradient(acting) - expected).norm()) < 1e-6 * float(expected.norm())


def test_a_batch_of_ties_alone_teaches_nothing() -> None:
    task = make_task("batch", weights=[0.0] * 4 + WEIGHTS[4:])
    engine = make_engine()
    assert first(task, engine, make_run(), [0, 1, 2, 3]) == 0
    assert engine.step(1.0) == 0


class _RankOf(TorchEngine):
    """One rank of several, alone: its gradient is its share of the sum times the world size."""

    def __init__(self, rank: int, world_size: int) -> None:
        model = tiny.tiny_causal_lm("llama", 0, tie_word_embeddings=True)
        super().__init__(AnswerLogProbs(model), make_config())
        self.rank, self.world_size = rank, world_size


def gradient(engine: TorchEngine) -> Tensor:
    return torch.cat([p.grad.double().flatten() for _, p in trainable(engine.module)])


@settings(max_examples=15)
@given(
    world_size=st.integers(1, 5),
    budget=st.integers(40, 400),
    n_rows=st.integers(1, 9),
    normalization=st.sampled_from(["none", "batch", "dataset"]),
)
def test_any_split_gives_the_same_gradient(
    world_size: int, budget: int, n_rows: int, normalization: str
) -> None:
    """Averaged over ranks, as DeepSpeed does; also where ranks have nothing but pads."""
    task, indices = make_task(normalization, references=[(-50.0, -60.0)] * len(ROWS)), range(n_rows)
    whole = make_engine()
    first(task, whole, make_run(), list(indices))
    total = torch.zeros_like(gradient(whole))
    for rank in range(world_size):
        engine = _RankOf(rank, world_size)
        gradients(task, engine, make_run(budget), 0, list(indices))
        total += gradient(engine) / world_size
    assert float((total - gradient(whole)).norm()) < 1e-5 * float(gradient(whole).norm())


def test_proportional_sampling_trains_on_drawn_pairs_of_weight_one() -> None:
    """Resumed half-way it ends with the same weights; a pair without weight never comes."""
    weights = [0.0] * 4 + WEIGHTS[4:]
    task = make_task(weights=weights, sampling="proportional")
    assert task.order.drawn == int(sum(weights))
    run = make_run(max_steps=-1, num_train_epochs=2, global_batch_size=4)
    whole, hooks = make_engine(), Record()
    train(task, whole, run, hooks)
    assert hooks.saves[-1] == 2 * math.ceil(task.order.drawn / 4)
    assert {record["weight"] for record in hooks.records} == {1.0}
    assert hooks.records[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    parts = make_engine()
    with pytest.raises(Preempted):
        train(task, parts, run, Record(stop_at=2))
    again = make_task(weights=weights, sampling="proportional")
    train(again, parts, run, Record(), start_step=3)
    for ours, theirs in zip(parts.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_sft_is_the_mean_over_answer_tokens() -> None:
    """Against the stock model's own loss with labels."""
    rows = zero_cases.make_rows(1)
    engine, indices = make_engine(), [2, 7, 11]
    loss = first(Sft(rows, IDS), engine, make_run(70), indices)
    nats, tokens = 0.0, 0
    for i in indices:
        ids = torch.tensor([rows[i].prompt + rows[i].answers[0]])
        labels = ids.clone()
        labels[0, : len(rows[i].prompt)] = -100
        with torch.no_grad():
            stock = engine.module.model(input_ids=ids, labels=labels).loss
        nats += float(stock) * len(rows[i].answers[0])
        tokens += len(rows[i].answers[0])
    assert loss == pytest.approx(nats / tokens, rel=1e-5)


def test_order_is_each_pair_once_an_epoch() -> None:
    seen: list[int] = []

    class Spy(Preference):
        def denominator(self, indices: Any) -> float:
            seen.extend(indices)
            return super().denominator(indices)

    task = make_task()
    spy = Spy(**{name: getattr(task, name) for name in task.__dataclass_fields__})
    train(spy, make_engine(), make_run(num_train_epochs=2, max_steps=-1), Hooks())
    n = len(ROWS)
    assert sorted(seen[:n]) == sorted(seen[n:]) == list(range(n))
    assert seen[:n] != seen[n:]


def test_total_steps() -> None:
    assert total_steps(make_config(max_steps=7), 100) == 7
    epochs = {"max_steps": -1, "num_train_epochs": 2.5, "global_batch_size": 8}
    assert total_steps(make_config(**epochs), 20) == 8  # 2.5 × 3, rounded up
    assert total_steps(make_config(**epochs | {"num_train_epochs": 0.5}), 4) == 1
    assert total_steps(make_config(**epochs | {"num_train_epochs": 1.1}), 80) == 11  # not 12


def test_loss_falls_at_a_rate_that_shows_it() -> None:
    hooks = Record()
    run = make_run(200, max_steps=30, learning_rate=0.3)
    train(make_task(references=[(-90.0, -90.0)] * len(ROWS)), make_engine(), run, hooks)
    losses = [record["loss"] for record in hooks.records]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
def test_learning_rates_are_those_of_transformers(kind: str) -> None:
    from transformers import get_scheduler

    config = make_config(lr_scheduler_type=kind, warmup_steps=3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=3, num_training_steps=10)
    rate = learning_rates(config, 10)
    for step in range(10):
        assert rate(step) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_vectors_are_not_decayed() -> None:
    optimizer = make_optimizer(
        nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)),
        make_config(optim="adamw", weight_decay=0.1),
    )
    shapes = {
        g["weight_decay"]: [tuple(p.shape) for p in g["params"]] for g in optimizer.param_groups
    }
    assert shapes == {0.1: [(2, 3)], 0.0: [(2,), (2,), (2,)]}


def test_optimizer_state_lies_where_its_parameter_does() -> None:
    """As torch makes it for a fused optimizer, whose CUDA kernel reads `step` on the device."""
    elsewhere = torch.empty(3, device="meta")
    state = fresh_state(elsewhere, STATE_KEYS["adamw"])
    assert {tensor.device.type for tensor in state.values()} == {"meta"}
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones(3)
    optimizer.step()
    own, ours = optimizer.state[parameter], fresh_state(parameter, STATE_KEYS["adamw"])
    assert own.keys() == ours.keys()
    for name, tensor in own.items():
        assert (tensor.dtype, tensor.shape) == (ours[name].dtype, ours[name].shape), name


def test_saves_and_end() -> None:
    hooks = Record()
    train(make_task(), make_engine(), make_run(max_steps=5, save_steps=2), hooks)
    assert hooks.saves == [2, 4, 5]
    rest = Record()
    train(make_task(), make_engine(), make_run(max_steps=5, save_steps=2), rest, start_step=4)
    assert (rest.steps, rest.saves) == ([4], [5])


def test_stop_checkpoints_first() -> None:
    hooks = Record(stop_at=1)
    with pytest.raises(Preempted, match="step 2 of 5"):
        train(make_task(), make_engine(), make_run(max_steps=5), hooks)
    assert hooks.saves == [2]
    last = Record(stop_at=4)  # the last step: it is done, there is nothing to resume
    train(make_task(), make_engine(), make_run(max_steps=5), last)
    assert last.saves == [5]


class _Poisoned(Preference):
    """Its third step meets a loss that is not finite."""

    def losses(self, outputs_PK: Tensor, indices: Any) -> Tensor:
        loss_P = super().losses(outputs_PK, indices)
        return loss_P + torch.tensor([math.nan if i == 4 else 0.0 for i in indices])


def test_non_finite_loss_names_step_and_pair() -> None:
    task = make_task()
    poisoned = _Poisoned(**{name: getattr(task, name) for name in task.__dataclass_fields__})
    engine, hooks, run = make_engine(), Record(), make_run(100, max_steps=6, save_steps=1)
    with pytest.raises(NonFiniteLoss, match=r"not finite for 1 of \d pairs \(pair4\)") as caught:
        train(poisoned, engine, run, hooks)
    step = hooks.steps[-1]
    assert f"step {step + 1}:" in str(caught.value)
    assert hooks.saves == list(range(1, step + 1))
    clean = make_engine()  # what it would be had it stopped before: no update was made
    for done in range(step):
        indices = global_batch(len(ROWS), 8, run.seed, done)[1].tolist()
        gradients(task, clean, run, done, indices)
        clean.step(run.config.learning_rate)
    pairs = zip(trainable(engine.module), trainable(clean.module), strict=True)
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in pairs)


def lora_engine(dropout: float) -> TorchEngine:
    config = make_config(lora=LoraConfig(r=2, lora_dropout=dropout), optim="adamw")
    model = add_lora(tiny.tiny_causal_lm("llama", 0), config.lora, "logps", 0)
    return TorchEngine(AnswerLogProbs(model).train(), config)


def final(engine: TorchEngine, **changes: Any) -> Tensor:
    run = make_run(100, optim="adamw", **changes)
    train(make_task(), engine, run, Hooks())
    return torch.cat([p.detach().flatten() for _, p in trainable(engine.module)])


def test_lora_dropout_follows_the_seed_alone() -> None:
    """Whatever the global random state; another seed draws otherwise."""
    torch.manual_seed(1)
    one = final(lora_engine(0.5))
    torch.manual_seed(2)
    two = final(lora_engine(0.5))
    assert torch.equal(one, two)
    engine = lora_engine(0.5)
    train(make_task(), engine, replace(make_run(100, optim="adamw"), seed=99), Hooks())
    other = torch.cat([p.detach().flatten() for _, p in trainable(engine.module)])
    assert not torch.equal(one, other)
    assert not torch.equal(one, final(lora_engine(0.0)))


class _Dice(TorchEngine):
    """Notes what a dropout of each forward pass would draw, as one rank of two."""

    def __init__(self, rank: int) -> None:
        super().__init__(AnswerLogProbs(tiny.tiny_causal_lm("llama", 0)), make_config())
        self.rank, self.world_size = rank, 2
        self.drawn: list[float] = []

    def forward(self, batch: Any) -> Tensor:
        self.drawn.append(torch.rand(1).item())
        return super().forward(batch)


def test_every_micro_step_of_every_rank_draws_masks_of_its_own_and_the_same_ones_again() -> None:
    def drawn(seed: int, step: int, rank: int) -> list[float]:
        engine = _Dice(rank)
        gradients(make_task(), engine, replace(make_run(61), seed=seed), step, list(range(8)))
        return engine.drawn

    cells = [(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)]
    found = [drawn(*cell) for cell in cells]
    assert len(found[0]) > 1, "several micro-steps"
    everything = [number for numbers in found for number in numbers]
    assert len(set(everything)) == len(everything)
    assert [drawn(*cell) for cell in cells] == found


def test_only_adapters_train() -> None:
    names = [name for name, _ in trainable(lora_engine(0.0).module)]
    assert names
    assert all(".lora_" in name for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [0.0] * len(ROWS)}, "all ties"),
        ({"weights": [-1.0, *WEIGHTS[1:]]}, "negative"),
        ({"weights": [math.nan, *WEIGHTS[1:]]}, "weights: not finite for 1 pairs .pair0"),
        ({"references": [(-math.inf, 0.0)] * len(ROWS)}, "references: not finite"),
        ({"weights": WEIGHTS[1:]}, "21 weights"),
        ({"pair_ids": IDS[1:]}, "21 pair ids"),
        ({"rows": [], "pair_ids": []}, "no pairs to train on"),
        ({"rows": [Row([3], ([4],)), *ROWS[1:]]}, "pair pair0: 1 answers"),
    ],
)
def test_bad_data_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        make_task(**changes)


def test_an_infinite_log_prob_is_refused_though_its_loss_is_finite() -> None:
    task, outputs = make_task(), torch.zeros(2, 2, dtype=torch.float64)
    outputs[1, 1] = -math.inf  # of the rejected answer: −log σ(∞) = 0
    assert bool(torch.isfinite(task.losses(outputs, [3, 6])).all())
    with pytest.raises(NonFiniteLoss, match=r"step 8: .* 1 of 2 pairs .pair6."):
        loop.finite_loss(task, 7, [3, 6], outputs)
