"""A worker's memory: parts that add up, shards that shrink them."""

from __future__ import annotations

from typing import Any

from cwpo_dist.config import LoraConfig, TrainingConfig
from cwpo_dist.stages.checks import ModelSize
from cwpo_dist.stages.memory import by_zero_stage, training_memory

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
