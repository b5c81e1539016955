"""Rotary positions that turn with the length: a row is what the stock model makes of it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import plain
from tiny import tiny_causal_lm, tiny_classifier
from tiny_kinds import VARIANTS, make
from transformers import AutoModelForCausalLM

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.loading import load_policy
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.lm.rope import turning_length, turns_alone
from cwpo_dist.lm.rows import Row, collate

TURNING = ["phi3, longrope", "llama, dynamic RoPE"]  # beyond 24 tokens
SHORT = Row(list(range(3, 11)), ([*range(20, 28), 1], [*range(30, 35), 1]))
ACROSS = Row(list(range(3, 18)), ([*range(40, 44), 1], [*range(50, 70), 1]))
LONG = Row(list(range(3, 30)), ([*range(40, 60), 1], [*range(60, 70), 1]))
LONGER = Row(list(range(90, 130)), ([*range(40, 60), 1], [5, 1]))


def policy(folder: Path, name: str) -> AnswerLogProbs:
    make(name, folder)
    return AnswerLogProbs(load_policy(ModelConfig(model_name_or_path=str(folder)))).eval()


def fresh(folder: Path, row: Row) -> torch.Tensor:
    """Each answer by a stock model that has seen nothing before."""
    found = []
    for answer in row.answers:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        found.append(plain(model, [Row(row.prompt, (answer,))]))
    return torch.cat(found)


@pytest.mark.parametrize("name", TURNING)
def test_a_log_prob_depends_neither_on_its_micro_batch_nor_on_what_came_before(
    tmp_path: Path, name: str
) -> None:
    module = policy(tmp_path, name)
    assert choose_layout(module, longest=80).layout == "plain"
    with torch.no_grad():
        wanted = {id(row): fresh(tmp_path, row) for row in (SHORT, ACROSS, LONG, LONGER)}
        for batch in ([SHORT], [LONGER, SHORT, ACROSS], [LONG, LONGER], [ACROSS, LONG], [LONG]):
            found = module(collate(batch, "plain", 2))
            given = torch.cat([wanted[id(row)] for row in batch])
            torch.testing.assert_close(found, given, atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", TURNING)
def test_rows_that_are_all_shorter_share_their_prompts(tmp_path: Path, name: str) -> None:
    module = policy(tmp_path, name)
    assert turning_length(module) == 24
    choice = choose_layout(module, longest=24)
    assert choice.layout == "packed"
    beyond = choose_layout(module, longest=25)
    assert beyond.layout == "plain"
    assert "turn in rows of more than 24 tokens, and rows may have 25" in beyond.reason
    with torch.no_grad():
        found = module(collate([SHORT], "packed", 2))
        torch.testing.assert_close(found, fresh(tmp_path, SHORT), atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", TURNING)
def test_gradients_do_not_depend_on_the_micro_batch(tmp_path: Path, name: str) -> None:
    module = policy(tmp_path, name).requires_grad_(True)
    module(collate([SHORT, LONGER], "plain", 2)).sum().backward()
    together = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    for row in (LONGER, SHORT):
        module(collate([row], "plain", 2)).sum().backward()
    for ours, theirs in zip(together, (p.grad for p in module.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_scores_too() -> None:
    _, changes = VARIANTS["llama, dynamic RoPE"]
    module = AnswerScores(tiny_classifier("llama", **changes)).eval()
    assert choose_layout(module, longest=80).layout == "plain"
    with torch.no_grad():
        alone = module(collate([SHORT], "plain", 2))
        beside = module(collate([SHORT, LONGER], "plain", 2))
    torch.testing.assert_close(beside[: len(alone)], alone, atol=1e-5, rtol=0)


def test_other_positions_stay_as_transformers_has_them() -> None:
    _, changes = VARIANTS["llama, YaRN"]
    for settings in ({}, changes):
        model: Any = tiny_causal_lm("llama", **settings)
        module = AnswerLogProbs(model)
        assert turning_length(module) is None
        assert not turns_alone(module)
        assert "forward" not in vars(model.model.rotary_emb)
