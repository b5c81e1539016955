"""Ranks that share packed rows against one that has them whole: outputs, gradients, refusals.

Ranks are threads here, which meet in collectives of ours; zero_ranks.py has real ones.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from plain_loop import make_config, make_task
from test_modules import PAD, coefficients, flat_gradient, random_rows
from tiny import tiny_causal_lm, tiny_classifier
from torch import Tensor, nn

from cwpo_dist.lm import sequence
from cwpo_dist.lm.loading import ModelError
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.lm.probe import choose_layout, unshared
from cwpo_dist.lm.rows import Row, RowBatch, collate
from cwpo_dist.lm.sequence import SequenceGroup
from cwpo_dist.training.loop import Run, StepResult, gradients
from cwpo_dist.training.tasks import Preference
from cwpo_dist.training.torch_engine import TorchEngine

ROWS = [*random_rows(3, 2), *random_rows(4, 1, n_answers=3), Row([5], ([6], [7, 8]))]
FEW = [Row([5], ([6],))]  # a token for each of two ranks, and none for others


class Meeting:
    """Collectives of as many threads as there are ranks."""

    def __init__(self, size: int) -> None:
        self.barrier, self.brought = Barrier(size, timeout=600), [torch.empty(0)] * size

    def of(self, rank: int) -> Any:
        return self, rank

    def gathered(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self.barrier.wait()
        self.brought[rank] = tensor.clone()
        self.barrier.wait()
        return list(self.brought)


@pytest.fixture(autouse=True)
def _threads_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    def exchanged(parts: Tensor, handle: Any) -> Tensor:
        meeting, rank = handle
        return torch.stack([theirs[rank] for theirs in meeting.gathered(rank, parts)])

    def total(part: Tensor, handle: Any) -> Tensor:
        meeting, rank = handle
        return torch.stack(meeting.gathered(rank, part)).sum(0)

    monkeypatch.setattr(sequence, "_exchanged", exchanged)
    monkeypatch.setattr(sequence, "_total", total)


def together(module: nn.Module, batch: RowBatch, size: int) -> list[tuple[Tensor, Tensor]]:
    """Each rank's outputs, and its part of the gradient."""
    meeting = Meeting(size)

    def work(rank: int) -> tuple[Tensor, Tensor]:
        own = copy.deepcopy(module)
        output = own(SequenceGroup(size, rank, meeting.of(rank)).part(batch))
        return output.detach(), flat_gradient(own, (output * coefficients(len(output))).sum())

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(work, range(size)))


def module_of(name: str, **changes: Any) -> AnswerLogProbs | AnswerScores:
    if name == "scores":
        module: AnswerLogProbs | AnswerScores = AnswerScores(tiny_classifier("llama", **changes))
    else:
        module = AnswerLogProbs(tiny_causal_lm(name, **changes))
    assert choose_layout(module, longest=64).layout == "packed"
    return module


@pytest.mark.parametrize("rows", [ROWS, FEW], ids=["rows", "few"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "gpt2", "scores"])
def test_ranks_that_share_rows_compute_what_one_does(name: str, size: int, rows: list[Row]) -> None:
    """Llama and Qwen2 have two key heads for four of queries: repeated where four ranks share."""
    module, batch = module_of(name), collate(rows, "packed", PAD)
    whole = module(batch)
    gradient = flat_gradient(module, (whole * coefficients(len(whole))).sum())
    found = together(module, batch, size)
    for output, _ in found:
        torch.testing.assert_close(output, whole.detach(), rtol=1e-5, atol=1e-5)
    total = torch.stack([part for _, part in found]).sum(0)
    assert float((total - gradient).norm()) < 1e-5 * float(gradient.norm())


class Sharing(TorchEngine):
    """One of four ranks in two groups."""

    def __init__(self, module: nn.Module, rank: int, every: Meeting, own: Meeting) -> None:
        super().__init__(copy.deepcopy(module), make_config())
        self.rank, self.world_size, self.every = rank, 4, every
        self.sequence = SequenceGroup(2, rank % 2, own.of(rank % 2))

    def total(self, numbers: Tensor) -> Tensor:
        return torch.stack(self.every.gathered(self.rank, numbers)).sum(0)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sigmoid_norm", "dr_dpo", "wpo"])
@pytest.mark.parametrize("budget", [10**6, 61])
def test_two_groups_of_two_ranks_compute_what_one_process_does(loss_type: str, budget: int) -> None:
    """Gradient, loss and tokens of a batch of unequal weights, with a pair too many for groups."""
    tasks, indices = [make_task(loss_type=loss_type) for _ in range(5)], [1, 4, 6, 9, 12, 17, 20]
    module = module_of("llama", seed=1, tie_word_embeddings=True)  # the reference is of seed 0
    module.squares = loss_type == "wpo"
    run = Run(make_config(max_tokens_per_micro_batch=budget), 3, "packed", PAD)
    alone, every, groups = TorchEngine(module, run.config), Meeting(4), [Meeting(2), Meeting(2)]
    engines = [Sharing(module, rank, every, groups[rank // 2]) for rank in range(4)]

    def step(task: Preference, engine: TorchEngine) -> StepResult:
        return gradients(task, engine, run, 0, indices)

    wanted = step(tasks[4], alone)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(step, tasks[:4], engines))
    assert {round(each.loss, 4) for each in found} == {round(wanted.loss, 4)}
    assert {each.useful_tokens for each in found} == {wanted.useful_tokens}
    flat, *others = (
        torch.cat([p.grad.flatten() for p in engine.module.parameters()])
        for engine in (alone, *engines)
    )
    error = torch.stack(others).mean(0) - flat  # engines average over ranks
    assert float(error.norm()) < 1e-5 * float(flat.norm())


def test_key_heads_that_divide_nothing_are_repeated() -> None:
    module, batch = (
        module_of("llama", num_attention_heads=6, num_key_value_heads=3, hidden_size=48),
        collate(ROWS, "packed", PAD),
    )
    for output, _ in together(module, batch, 2):
        torch.testing.assert_close(output, module(batch).detach(), rtol=1e-5, atol=1e-5)


def test_every_token_is_on_one_rank_and_reading_is_shared_evenly() -> None:
    batch = collate(ROWS, "packed", PAD)
    parts = [SequenceGroup(4, rank).part(batch) for rank in range(4)]
    assert sum(part.useful_tokens for part in parts) == batch.useful_tokens
    assert {part.padded_tokens for part in parts} == {-(-batch.padded_tokens // 4)}
    dealt = torch.stack([part.input_ids[0] for part in parts], dim=1).flatten()
    assert torch.equal(dealt[: batch.useful_tokens], batch.input_ids[0])
    read = [len(part.target) for part in parts]
    assert sum(read) == len(batch.target)
    assert max(read) - min(read) <= len(ROWS) * 3, "whatever rank has the prompts"


def test_a_group_proves_its_model_before_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting(2)
    modules = [module_of("llama") for _ in range(2)]

    def prove(rank: int) -> str:
        group = SequenceGroup(2, rank, meeting.of(rank))
        return choose_layout(modules[rank], longest=64, group=group).layout

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(prove, range(2))) == ["packed"] * 2
        monkeypatch.setattr(sequence, "_exchanged", lambda parts, _: parts)  # and none is made
        with pytest.raises(
            ModelError, match=r"sequence_parallel_size: 2: of LlamaFor.* miss whole"
        ):
            list(threads.map(prove, range(2)))


def test_rows_that_are_not_packed_and_heads_that_do_not_divide_are_refused() -> None:
    group = SequenceGroup(2, 0)
    with pytest.raises(ModelError, match=r"rows are plain .*ALiBi.* set it to 1"):
        choose_layout(AnswerLogProbs(tiny_causal_lm("bloom")), longest=64, group=group)
    odd = tiny_causal_lm("llama", num_attention_heads=3, num_key_value_heads=1, hidden_size=24)
    with pytest.raises(ModelError, match=r"2 workers cannot share 3 attention heads.*; set"):
        choose_layout(AnswerLogProbs(odd), longest=64, group=group)


def test_what_a_configuration_says_of_sharing() -> None:
    assert unshared(tiny_causal_lm("llama"), 64) is None
    assert unshared(tiny_classifier("llama"), 64) is None
    reasons = [
        unshared(tiny_causal_lm("llama", attn_implementation="eager"), 64),
        unshared(tiny_causal_lm("mistral", sliding_window=32), 64),
        unshared(tiny_classifier("bert"), 64),
    ]
    for reason, words in zip(reasons, ("'eager'", "window of 32", "as a whole"), strict=True):
        assert reason is not None
        assert words in reason
