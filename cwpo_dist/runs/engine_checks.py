"""A run in which vLLM shall write, and its policy's sizes, in; what vLLM would refuse, out."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from cwpo_dist.config import Config, ModelConfig
from cwpo_dist.runs.sizes import ModelSize


def vllm_faults(config: Config, policy: ModelConfig, size: ModelSize) -> Iterator[str]:
    """One line a fault: field, value, remedy.

    Args:
        config: the run.
        policy: that answers.
        size: of it.
    """
    if not _installed():
        yield (
            "evaluate.engine: vllm, but it is not installed here; on every node pip install "
            "'cwpo_dist[vllm]' (without constraints.txt), or set it to transformers"
        )
    name, layers = policy.model_name_or_path, policy.num_hidden_layers
    if layers is not None:
        yield (
            f"policy.num_hidden_layers: {layers}, but vLLM reads whole models; leave it out, or "
            "set evaluate.engine to transformers"
        )
    longest = policy.max_length + config.evaluate.max_new_tokens
    if size.turning is not None and longest > size.turning:
        yield (
            f"policy.max_length: {policy.max_length} and evaluate.max_new_tokens are {longest}, "
            f"but the rotary positions of {name!r} turn beyond {size.turning}, and vLLM would turn "
            "those of short texts too; lower one, or set evaluate.engine to transformers"
        )
    for number in {int(pool.gpus_per_actor) for pool in config.evaluate.actor_pools()}:
        if number > 1 and size.attention_heads % number:
            yield (
                f"evaluate.gpus_per_actor: {number}, but {name!r} has {size.attention_heads} "
                "attention heads, which vLLM deals out to them; give a number that divides these"
            )


def _installed() -> bool:
    return importlib.util.find_spec("vllm") is not None
