"""A worker's memory: parts that add up, shards that shrink them, and what real workers took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cwpo_dist.config import LoraConfig, TrainingConfig
from cwpo_dist.scoring.placement import Machine
from cwpo_dist.stages.checks import ModelSize
from cwpo_dist.stages.memory import by_zero_stage, largest_budget, room, training_memory

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "memory.py"
SIZE = ModelSize(
    parameters=1_000_000,
    matmul=800_000,
    head=200_000,
    layers=2,
    width=100,
    linear=(200, 200, 500, 500) * 2,
    positions=None,
)


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(learning_rate=1.0, max_tokens_per_micro_batch=1000, **changes)


def test_each_zero_stage_shards_one_part_more() -> None:
    """Weights, gradients and AdamW's state of a million parameters over four workers in fp32."""
    plain, optimizer, gradients, weights = by_zero_stage(config(num_workers=4), SIZE, 4)
    assert (plain.weights, plain.gradients) == (4_000_000, 4_000_000)
    assert optimizer.gradients == plain.gradients
    assert (gradients.gradients, gradients.weights) == (1_000_000, 4_000_000)
    assert weights.weights == 1_000_000
    assert {m.activations for m in (plain, optimizer, gradients, weights)} == {plain.activations}
    assert plain.total == sum(plain.parts().values())
    assert optimizer.optimizer == 3 * 1_000_000, "ZeRO keeps weights of its own"


def test_lora_trains_little_and_checkpoints_keep_little() -> None:
    full, lora = (training_memory(config(lora=lora), SIZE, 4) for lora in (None, LoraConfig(r=8)))
    assert lora.gradients == 4 * 8 * sum(SIZE.linear)
    assert lora.optimizer < full.optimizer / 10
    kept = training_memory(config(gradient_checkpointing=True), SIZE, 4)
    assert kept.activations < full.activations
    assert kept.optimizer == full.optimizer


def test_the_largest_budget_fits_and_one_token_more_hardly_does() -> None:
    space = training_memory(config(), SIZE, 4).total
    budget = largest_budget(config(), SIZE, 4, space)
    assert abs(budget - 1000) <= 1
    assert largest_budget(config(), SIZE, 4, 1000) == 0


def test_workers_share_their_node() -> None:
    gib = 2**30
    nodes = [Machine(8.0, 0.0, {"memory": 64.0 * gib}), Machine(2.0, 0.0, {"memory": 16.0 * gib})]
    assert room(config(num_workers=2), nodes, on_gpu=False) == 8 * gib - gib
    gpus = [Machine(8.0, 1.0, {"accelerator_type:H100": 1.0}), Machine(8.0, 1.0, {})]
    assert room(config(), gpus, on_gpu=True) == 79 * gib
    assert room(config(), [Machine(8.0, 1.0)], on_gpu=True) is None


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        ["--layers", "4"],
        ["--layers", "4", "--zero-stage", "3"],
        ["--max-tokens", "1000"],
        ["--max-tokens", "1000", "--lora"],
    ],
)
def test_plan_is_within_a_fifth_of_what_a_worker_took(smollm2: Path, options: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--model", str(smollm2), *options],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert 0.8 <= json.loads(done.stdout.splitlines()[-1])["planned_over_measured"] <= 1.2
