"""Pairs of a prompt in one batch: each answer once through the model, and the pairs' own gradient.

The oracle goes pair by pair, each answer alone in a plain row.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_loop import Record, make_config
from torch import Tensor

from cwpo_dist.config import AlignConfig, FitConfig
from cwpo_dist.lm import packed
from cwpo_dist.lm.batches import global_batch, proportional, uniform
from cwpo_dist.lm.flops import UsefulFlops
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.lm.rows import Layout, Row, collate
from cwpo_dist.lm.sharing import in_one_row, unshared
from cwpo_dist.stop_signals import Preempted
from cwpo_dist.training.checkpoint import trainable
from cwpo_dist.training.loop import Run, gradients, train
from cwpo_dist.training.micro_batches import Limits, micro_batches, parts_of
from cwpo_dist.training.tasks import BradleyTerry, Preference, Sft, Task
from cwpo_dist.training.torch_engine import TorchEngine

LAYOUTS: tuple[Layout, ...] = ("packed", "shared", "plain")
ANSWERS = (4, 1, 3, 2, 5)  # of each prompt; of one answer there is a pair with a copy's beginning
Pairs = tuple[list[Row], list[str]]


def all_pairs(seed: int = 0) -> Pairs:
    """All pairs of some prompts' answers, in a random direction, prompt by prompt."""
    draw = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> list[int]:
        return draw.integers(3, 250, draw.integers(low, high)).tolist()

    rows, names = [], []
    for prompt, count in enumerate(ANSWERS):
        asked = tokens(4, 20)
        # Some answers leave their prompt early, as those do whose template writes no border.
        alone = [Row(asked[: len(asked) - k % 2], (tokens(2, 12),)) for k in range(count)]
        for k, (a, b) in enumerate(combinations([*alone, Row(asked, (tokens(2, 12),))], 2)):
            rows.append(in_one_row([a, b] if draw.random() < 0.5 else [b, a]))
            names.append(f"{prompt:018x}{k:014x}")
    return rows, names


ROWS, NAMES = all_pairs()
DRAW = np.random.default_rng(9)
WEIGHTS = (DRAW.random(len(ROWS)) ** 2).tolist()
REFERENCES = DRAW.normal(-40, 5, (len(ROWS), 2)).tolist()


def preferences(**changes: Any) -> Preference:
    told = {"weights": WEIGHTS, "references": REFERENCES, "loss_type": "sigmoid", "beta": 0.3}
    return Preference(ROWS, NAMES, **(told | changes))


def engine_of(task: Task, rank: int = 0, world_size: int = 1) -> TorchEngine:
    module: Any
    if isinstance(task, BradleyTerry):
        module = AnswerScores(tiny.tiny_classifier("llama", attn_implementation=packed.NAME))
    else:
        module = AnswerLogProbs(tiny.tiny_causal_lm("llama", attn_implementation=packed.NAME))
    engine = TorchEngine(module, make_config())
    engine.rank, engine.world_size = rank, world_size
    return engine


def run_of(layout: Layout, budget: int, longest: float = 1e9) -> Run:
    config = make_config(max_tokens_per_micro_batch=budget, global_batch_size=12, max_steps=5)
    return Run(config, 3, layout, 2, longest_shared=longest)


def gradient(engine: TorchEngine) -> Tensor:
    return torch.cat([p.grad.double().flatten() for _, p in trainable(engine.module)])


def pair_by_pair(task: Task, indices: list[int]) -> tuple[float, Tensor]:
    """Loss and gradient of a batch: a forward pass for each answer of each pair, by itself."""
    engine, loss = engine_of(task), 0.0
    for i in indices:
        each = [engine.module(collate([row], "plain", 2)) for row in unshared(task.rows[i])]
        one = task.losses(torch.cat(each)[None], [i]).sum() / task.denominator(indices)
        one.backward()
        loss += one.item()
    return loss, gradient(engine)


def tasks() -> dict[str, Task]:
    shares = np.random.default_rng(3).random(len(ROWS))
    return {
        "preference": preferences(),
        "by batch": preferences(normalization="batch"),
        "ipo": preferences(loss_type="ipo_norm"),
        "fit": BradleyTerry(ROWS, NAMES),
        "votes": BradleyTerry(ROWS, NAMES, shares),
        "sft": Sft([row.part(slice(0, 1)) for row in ROWS], NAMES),
    }


@pytest.mark.parametrize("name", tasks())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("budget", "ranks"), [(10**6, 1), (70, 1), (10**6, 3), (120, 2), (1, 8)])
def test_the_gradient_is_that_of_pair_by_pair(
    name: str, layout: Layout, budget: int, ranks: int
) -> None:
    """Of batches with several pairs of a prompt and of unequal weights, however they are split."""
    task = tasks()[name]
    for indices in ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [20, 3, 11, 9, 25, 30], [5]):
        loss, expected = pair_by_pair(task, indices)
        total = torch.zeros_like(expected)
        for rank in range(ranks):
            engine = engine_of(task, rank, ranks)
            engine.total = lambda numbers: numbers  # of one rank alone
            gradients(task, engine, run_of(layout, budget), 0, indices)
            total += gradient(engine) / ranks
        assert float((total - expected).norm()) < 1e-5 * float(expected.norm())
        if ranks == 1:
            found = gradients(task, engine_of(task), run_of(layout, budget), 0, indices)
            assert found.loss == pytest.approx(loss, rel=1e-5)


@settings(max_examples=60)
@given(
    indices=st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=24, unique=True),
    layout=st.sampled_from(LAYOUTS),
    budget=st.integers(1, 400),
    longest=st.integers(1, 400),
    ranks=st.integers(1, 5),
)
def test_each_pair_finds_its_answers_and_limits_hold(
    indices: list[int], layout: Layout, budget: int, longest: int, ranks: int
) -> None:
    task, limits = preferences(), Limits(layout, budget, longest)
    parts = parts_of(task, indices, limits, ranks)
    assert len(parts) >= min(ranks, len(indices))
    for part in parts:
        batch = collate(part.rows, layout, 2)
        within = batch.padded_tokens <= budget and max(r.n_tokens for r in part.rows) <= longest
        assert within or len(part.pairs) == 1
        assert limits.length(part.rows)[0] == batch.padded_tokens
        assert len({NAMES[indices[position]][:18] for position, _ in part.pairs}) == 1
    seen: Counter[int] = Counter()
    for rank in range(ranks):
        for micro in micro_batches(parts, limits, rank, ranks, 2):
            seen.update(micro.positions if micro.weight else [])
            read = answers_in(micro.batch)
            for position, places in zip(micro.positions, micro.places_PK.tolist(), strict=True):
                own = unshared(task.rows[indices[position]])
                assert [read[place] for place in places] == [
                    tuple(row.answers[0]) for row in own
                ], "whose log-prob it is"
    assert seen == Counter(range(len(indices)))


def answers_in(batch: Any) -> list[tuple[int, ...]]:
    """The tokens of each answer of a batch that count."""
    targets, owners = batch.target.tolist(), batch.answer.tolist()
    found: list[list[int]] = [[] for _ in range(len(batch.last))]
    for token, owner in zip(targets, owners, strict=True):
        found[owner].append(token)
    return list(map(tuple, found))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_answer_of_several_pairs_goes_through_the_model_once(layout: Layout) -> None:
    """Four answers and all their six pairs: the tokens of a row of four, not of six of two."""
    asked, answers = [9] * 7, [[20 + k] * (5 + k) for k in range(4)]
    rows = [Row(asked, (answers[a], answers[b])) for b in range(4) for a in range(b)]
    names = [f"{1:018x}{k:014x}" for k in range(6)]
    task = BradleyTerry(rows, names)
    found = gradients(task, engine_of(task), run_of(layout, 10**6), 0, list(range(6)))
    once = 5 + 6 + 7 + 8 + (7 if layout != "plain" else 4 * 7)
    assert found.useful_tokens == once
    assert [len(row.answers) for row in found.rows] == [4]
    apart = BradleyTerry(rows, [f"{k:018x}{0:014x}" for k in range(6)])
    found = gradients(apart, engine_of(task), run_of(layout, 10**6), 0, list(range(6)))
    assert found.useful_tokens == 3 * (5 + 6 + 7 + 8) + 7 * (6 if layout != "plain" else 12)


GROUPS = np.repeat(np.arange(40), [1 + k % 6 for k in range(40)])


@pytest.mark.parametrize("seed", [0, 7])
def test_an_epoch_by_prompt_has_each_pair_once_and_prompts_whole(seed: int) -> None:
    order, firsts = uniform(len(GROUPS), GROUPS), []
    for epoch in range(3):
        rows = order.epoch(seed, epoch)
        assert sorted(rows.tolist()) == list(range(len(GROUPS)))
        prompts = GROUPS[rows]
        assert np.count_nonzero(np.diff(prompts)) == 39, "all of a prompt side by side"
        firsts.append((prompts[:6].tolist(), rows[prompts == 35].tolist()))
    assert len({str(prompts) for prompts, _ in firsts}) == 3, "in an order of its own"
    assert len({str(rows) for _, rows in firsts}) > 1, "and the pairs of a prompt, too"


def test_a_step_by_prompt_is_a_function_of_seed_and_step_alone() -> None:
    order, again = uniform(len(GROUPS), GROUPS), uniform(len(GROUPS), GROUPS)
    steps = [global_batch(order, 12, 5, step)[1].tolist() for step in range(30)]
    assert [global_batch(again, 12, 5, step)[1].tolist() for step in reversed(range(30))] == (
        steps[::-1]
    )
    prompts = [list(dict.fromkeys(GROUPS[order.epoch(seed, 0)].tolist())) for seed in (5, 6)]
    assert prompts[0] != prompts[1], "another seed, another order of the prompts"


def test_by_prompt_a_pair_is_drawn_as_often_as_its_weight_asks() -> None:
    weights = np.random.default_rng(1).random(len(GROUPS)) ** 2
    order = proportional(weights, GROUPS)
    epochs = 3000
    drawn = np.zeros(len(GROUPS))
    for epoch in range(epochs):
        rows = order.epoch(2, epoch)
        assert len(rows) == len(set(rows.tolist())) == order.drawn
        assert np.count_nonzero(np.diff(GROUPS[rows])) == len(set(GROUPS[rows].tolist())) - 1
        drawn[rows] += 1
    wanted = weights * order.drawn / weights.sum()
    error = np.abs(drawn / epochs - wanted) / np.sqrt(wanted * (1 - wanted) / epochs)
    assert error.max() < 5, "standard errors"


@pytest.mark.parametrize("sampling", [None, "proportional"])
def test_a_training_by_prompt_that_was_stopped_ends_as_one_that_was_not(sampling: Any) -> None:
    task, run = preferences(sampling=sampling, batch_by="prompt"), run_of("shared", 150)
    whole, hooks = engine_of(task), Record()
    train(task, whole, run, hooks)
    in_pairs = replace(task, batch_by="pair")
    other = Record()
    train(in_pairs, engine_of(task), run, other)
    assert [r["loss"] for r in other.records] != [r["loss"] for r in hooks.records]
    parts = engine_of(task)
    with pytest.raises(Preempted):
        train(task, parts, run, Record(stop_at=2))
    train(replace(task), parts, run, Record(), start_step=3)
    for ours, theirs in zip(parts.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_said_is_of_pairs_and_of_the_rows_that_were_computed() -> None:
    task, run = preferences(batch_by="prompt"), run_of("packed", 10**6)
    flops = UsefulFlops(weights=1, attention_width=0, head_weights=0, head_reads_answers=True)
    indices = global_batch(task.order, 12, run.seed, 0)[1].tolist()
    found = gradients(task, engine_of(task), run, 0, indices)
    assert found.useful_tokens == sum(row.n_tokens for row in found.rows)
    assert found.useful_tokens < sum(task.rows[i].n_tokens for i in indices)
    hooks = Record()
    train(task, engine_of(task), replace(run, flops=flops), hooks)
    first = hooks.records[0]
    assert first["pairs_per_step"] == 12
    # Two operations a weight and token, and a backward pass of twice as many.
    assert first["useful_flops_per_second"] == pytest.approx(3 * 2 * first["tokens_per_second"])
    assert first["tokens_per_second"] / first["pairs_per_second"] == pytest.approx(
        found.useful_tokens / 12
    )


def test_keys_of_runs_by_pair_are_what_they_were() -> None:
    for section in (FitConfig, AlignConfig):
        assert "batch_by" not in section().identity()
        assert section(batch_by="prompt").identity()["batch_by"] == "prompt"
