"""A worker's memory: parts that add up, shards that shrink them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tiny import tiny_causal_lm

from cwpo_dist.config import LoraConfig, TrainingConfig
from cwpo_dist.lm.activations import Kept, kept_of_token
from cwpo_dist.lm.modules import decode, unwrapped
from cwpo_dist.lm.recompute import let_recompute, recompute
from cwpo_dist.lm.rows import collate
from cwpo_dist.lm.stock import probe_rows
from cwpo_dist.planning.costs import AnswerLengths, Estimate, Lengths
from cwpo_dist.planning.memory import (
    activations,
    by_zero_stage,
    data_memory,
    generating_memory,
    training_memory,
)
from cwpo_dist.runs.checks import Checked
from cwpo_dist.runs.sizes import ModelSize, TrainedSize, _cached
from cwpo_dist.runs.stage import Training
from cwpo_dist.training.lora import add_lora

LORA = LoraConfig(r=8)
SIZE = ModelSize(
    parameters=1_000_000,
    matmul=800_000,
    head=200_000,
    layers=2,
    width=100,
    words=2_000,
    trained=(
        TrainedSize(None, 1_000_000, kept=Kept(4_000.0, 9_000.0)),
        TrainedSize(LORA, 22_400, kept=Kept(6_000.0, 13_000.0)),
    ),
)


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(learning_rate=1.0, max_tokens_per_micro_batch=1000, **changes)


def test_each_zero_stage_shards_one_part_more() -> None:
    """Weights, gradients and AdamW's state of a million parameters over four workers in fp32."""
    found = by_zero_stage(config(num_workers=4), SIZE, on_gpu=False)
    plain, optimizer, gradients, weights = found.values()
    assert list(found) == [0, 1, 2, 3]
    assert (plain.weights, plain.gradients) == (4_000_000, 4_000_000)
    assert optimizer.gradients == plain.gradients + 4_000_000, "and a bucket of them"
    assert (gradients.gradients, gradients.weights) == (1_000_000 + 4_000_000, 4_000_000)
    assert weights.weights == 1_000_000 + 4_000_000, "its shard, and what is gathered"
    assert {m.activations for m in (plain, optimizer, gradients, weights)} == {plain.activations}
    assert plain.total == sum(plain.parts().values())
    assert optimizer.optimizer == 3 * 1_000_000, "ZeRO keeps weights of its own"


def test_the_stage_of_a_deepspeed_section_goes_first() -> None:
    """As it does in a worker; the table of all stages has each as it is."""
    section = {"zero_optimization": {"stage": 3}}
    asked, plain = config(num_workers=4, deepspeed=section), config(num_workers=4)
    found = by_zero_stage(plain, SIZE, on_gpu=True)
    assert by_zero_stage(asked, SIZE, on_gpu=True) == found
    assert training_memory(asked, SIZE, on_gpu=True) == found[3]
    left_to_us = config(num_workers=4, deepspeed={"zero_optimization": {"stage": "auto"}})
    assert training_memory(left_to_us, SIZE, on_gpu=True) == found[2]


@pytest.mark.parametrize(
    ("told", "seen"), [({"max_steps": 53}, 5 * 630 + 3 * 64), ({"max_steps": 3}, 3 * 64), ({}, 630)]
)
def test_steps_beyond_an_epoch_are_computed_too(told: dict[str, int], seen: int) -> None:
    """`max_steps` goes before epochs: ten steps go through 630 pairs, the last of them short."""
    lengths = {"policy": Lengths(1.0, 500.0, 400.0, 300.0, AnswerLengths(1.0, 200.0, 150.0))}
    unread: Any = None  # the configuration, and what was counted
    estimate = Estimate(unread, unread, Checked({"policy": SIZE}, (), {}), lengths)
    work = Training("", model="policy", pairs=630, training=config(**told))
    assert estimate.cost(work).tokens == seen * 500


def test_lora_trains_little_and_checkpoints_keep_little() -> None:
    full, lora = (training_memory(config(lora=lora), SIZE, on_gpu=False) for lora in (None, LORA))
    assert lora.gradients == 2 * 4 * 22_400
    assert lora.optimizer < full.optimizer / 10
    kept = training_memory(config(gradient_checkpointing=True), SIZE, on_gpu=False)
    assert kept.activations < full.activations
    assert kept.optimizer == full.optimizer


def test_workers_that_share_a_sequence_share_its_activations() -> None:
    whole, shared = (
        activations(config(num_workers=4, sequence_parallel_size=size), SIZE, on_gpu=False)
        for size in (1, 4)
    )
    assert whole == 4 * shared


def test_unknown_activations_are_said_and_what_is_known_still_counts() -> None:
    size = replace(SIZE, trained=(TrainedSize(None, 1_000_000, None, "it looks at values"),))
    memory = training_memory(config(), size, on_gpu=False)
    assert memory.activations is None
    known = training_memory(config(), SIZE, on_gpu=False)
    assert memory.total == known.weights + known.gradients + known.optimizer + known.update
    recomputed = training_memory(config(gradient_checkpointing=True), size, on_gpu=False)
    assert recomputed.activations is None


def test_adapted_experts_are_held_once_more_and_a_layer_of_them_where_layers_recompute() -> None:
    copied = TrainedSize(None, 1_000_000, Kept(4_000.0, 9_000.0), copied=500_000)
    size = replace(SIZE, trained=(copied,))
    for on_gpu, number in ((False, 4), (True, 2)):
        of = partial(activations, on_gpu=on_gpu)
        assert of(config(), size) - of(config(), SIZE) == number * 500_000
        recompute = config(gradient_checkpointing=True)
        assert of(recompute, size) - of(recompute, SIZE) == number * 250_000


def test_on_gpus_gradients_are_summed_in_fp32_and_stage_0_is_none() -> None:
    """Over four workers, bf16 weights of a million parameters."""
    found = by_zero_stage(config(num_workers=4), SIZE, on_gpu=True)
    assert list(found) == [1, 2, 3]
    assert found[1].weights == 2_000_000
    assert found[1].gradients == 4_000_000 + 2_000_000, "and a bucket of them in bf16"
    assert found[2].gradients == 1_000_000 + 2_000_000
    assert found[1].activations == 1000 * 9_000 + 4 * 1000 * 2_000, "logits are fp32"
    asked_for = training_memory(config(num_workers=4, zero_stage=0), SIZE, on_gpu=True)
    assert asked_for == found[1]


def test_generation_keeps_keys_and_values() -> None:
    size = replace(SIZE, cached=300)
    for parts in (1, 4):  # weights, keys and values are dealt out, logits are not
        memory = generating_memory(size, prompts=16, tokens=1000, parts=parts, on_gpu=True)
        assert memory == 2 * (1_000_000 + 16 * 1000 * 300) / parts + 4 * 16 * 2_000


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2", "gpt_neox"])
def test_the_keys_and_values_of_a_token_are_those_of_the_cache(family: str) -> None:
    model = tiny_causal_lm(family)
    cache = model(input_ids=torch.zeros(1, 7, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert _cached(model.config.get_text_config()) == held / 7


def kept_in_fact(model: Any) -> float:
    """Bytes a token that autograd holds on to after a forward pass over real rows."""
    batch, kept = collate(probe_rows(200)[:2], "plain", 0), {}
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _alive = decode(unwrapped(model).base_model, batch)
    n_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return n_bytes / batch.padded_tokens


NO_DROPOUT = {"opt": {"dropout": 0.0, "attention_dropout": 0.0}}  # as in training


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_what_is_kept_is_counted_without_computing(family: str) -> None:
    planned = kept_of_token(tiny_causal_lm(family).to("meta"))
    assert 4 * planned.numbers == pytest.approx(kept_in_fact(tiny_causal_lm(family)), rel=0.1)
    half = tiny_causal_lm(family, **NO_DROPOUT.get(family, {})).to(torch.bfloat16)
    assert planned.half_bytes == pytest.approx(kept_in_fact(half), rel=0.1)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_recomputed_layers_keep_little_until_told_otherwise(adapted: bool) -> None:
    model: Any = tiny_causal_lm("llama", num_hidden_layers=8)
    if adapted:
        model = add_lora(model, LoraConfig(lora_dropout=0.0), "logps", seed=0)
    whole = kept_in_fact(model)
    # On adapters transformers also lets the embeddings' output require a gradient: a row more.
    same = pytest.approx(whole, rel=0.02 if adapted else 0, abs=0)
    let_recompute(model)
    assert not hasattr(unwrapped(model).base_model.layers[-1], "_gradient_checkpointing_func")
    assert kept_in_fact(model) == same
    recompute(model, on=True)
    assert kept_in_fact(model) < 0.3 * whole
    recompute(model, on=False)
    assert kept_in_fact(model) == same


def test_a_million_pairs_are_a_file_a_node_and_little_in_each_worker() -> None:
    """By hand: 500 int32 and 100 bytes beside them a pair; the order of an epoch."""
    pairs, gib = 10**6, 2**30
    found = data_memory(pairs, 500 * pairs)
    assert found.node == pairs * (500 * 4 + 100)
    assert found.worker <= pairs * 100
    lengths = {"policy": Lengths(1.0, 500.0, 400.0, 300.0, AnswerLengths(1.0, 200.0, 150.0))}
    unread: Any = None  # the configuration, and what was counted
    estimate = Estimate(unread, unread, Checked({"policy": SIZE}, (), {}), lengths)
    work = Training("", model="policy", pairs=pairs, training=config())
    assert estimate.cost(work).details[-1] == (
        f"and up to {found.node / gib:.1f} GiB of token ids on each node's disk (TMPDIR), which "
        f"its workers read together, with {found.worker / gib:.1f} GiB of memory in each"
    )
    few = replace(work, pairs=1000)
    assert "token ids" not in " ".join(estimate.cost(few).details)
