"""A base, an adapter and what they were merged into, in; nothing, or the layer that is wrong, out.

What fits in memory is compared whole, as peft and transformers load it: every weight, and the
outputs on a batch of random tokens. Of a larger model each adapted layer is compared alone, its
weights read back from the files, and every other tensor must be the base's.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.loading import load_policy, load_reward_model
from cwpo_dist.lm.modules import unwrapped
from cwpo_dist.training.lora import Head, load_adapter, lora_layers, parted
from cwpo_dist.training.merge import Update, base_folder, copies, read_updates, weight_files

logger = logging.getLogger(__name__)

# How far a merged weight may be from the adapted one, of its norm: no rounding to the dtype gives
# so much, not of a single number.
_WEIGHT = {torch.float32: 1e-4, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# Nats by which the log-prob of a token may be off, or a score. The median counts: where rounding
# sends a token to another expert, that one is off by more.
_OUTPUT = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
_INPUTS, _ROWS, _TOKENS = 32, 3, 16
_SMALL = 2**20  # numbers of a weight that is kept while the other model is loaded
_SPARE = 1.25  # of the float32 weights: for activations, and for what else runs on the node
_REMEDY = (
    "adapter/ holds what was trained, and loads with peft; leave the layer out of "
    "lora.target_modules, or report it with the model's name"
)


class MergeMismatch(ValueError):
    """A merged folder that is not base and adapter; the message names the layer."""


def check_merged(base: ModelConfig, adapter: Path, merged: Path, dtype: torch.dtype) -> None:
    """Compares a merged causal language model, whose base's files are its weights.

    Args:
        base: what training started from.
        adapter: folder that `save_adapter` wrote.
        merged: folder that `merge_adapter` wrote.
        dtype: of its weights.

    Raises:
        MergeMismatch: naming the layer that is furthest off.
    """
    skeleton = load_policy(base, device="meta")
    needed = 4 * sum(parameter.numel() for parameter in skeleton.parameters())
    available = free_memory()
    if needed * _SPARE < available:
        check_whole(_load_policy, base, adapter, merged, "logps", dtype)
        return
    logger.info(
        "the merged model is checked layer by layer: whole it would take %.0f GB of memory, and "
        "%.0f GB are free",
        needed / 1e9,
        available / 1e9,
    )
    check_layers(base, adapter, merged, dtype)


def free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this node has left, or the container that we are in.

    Args:
        cgroup: where the container's limit stands, in either version.
    """
    free = psutil.virtual_memory().available
    for limit, use, statistics, cached in _CGROUPS:
        given = (cgroup / limit).read_text().strip() if (cgroup / limit).is_file() else "max"
        if given == "max":
            continue
        lines = (line.split() for line in (cgroup / statistics).read_text().splitlines())
        cache = next((int(value) for name, value in lines if name == cached), 0)  # can be dropped
        free = min(free, int(given) - int((cgroup / use).read_text()) + cache)
    return free


# The files of a limit, of what is in use, of statistics, and the name of the cache in them.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def check_whole(
    load_base: Callable[[ModelConfig], PreTrainedModel],
    base: ModelConfig,
    adapter: Path,
    merged: Path,
    head: Head,
    dtype: torch.dtype,
) -> None:
    """Compares base and adapter with the merged folder, one after the other in memory.

    Args:
        load_base: gives the model below the adapter, on the CPU.
        base: what training started from.
        adapter: folder in peft's format.
        merged: folder that transformers alone will load.
        head: of the model.
        dtype: of the merged weights.

    Raises:
        MergeMismatch: as `check_merged`.
    """
    exact = base.model_copy(update={"torch_dtype": "float32"})
    adapted = load_adapter(load_base(exact), adapter).float().eval()
    expected = _fingerprints(_weights(adapted))
    outputs = _outputs(adapted, head)
    del adapted
    gc.collect()  # peft's wrappers refer to each other
    load = load_policy if head == "logps" else load_reward_model
    model = load(_at(merged, base), device="cpu").eval()
    found = _fingerprints(model.named_parameters(remove_duplicate=False))
    _compare({name: _off(found.get(name), weight) for name, weight in expected.items()}, dtype)
    off = float((_outputs(model, head) - outputs).abs().median())
    logger.info("the merged model and its adapter: outputs on a probe differ by %.0e", off)
    if not off <= _OUTPUT[dtype]:  # also for NaN
        raise MergeMismatch(
            f"the merged model is not base and adapter: on a probe its outputs are off by {off:.1e}"
            f"{' nats' * (head == 'logps')}, though every weight agrees: its buffers or its "
            f"configuration differ. {_REMEDY}"
        )


def check_layers(base: ModelConfig, adapter: Path, merged: Path, dtype: torch.dtype) -> None:
    """Compares W'x with Wx + scale · B(Ax) of each adapted layer, and all else with the base.

    Holds one tensor of either folder at a time.

    Args:
        base: what training started from; its files are its weights.
        adapter: folder in peft's format.
        merged: folder that `merge_adapter` wrote.
        dtype: of its weights.

    Raises:
        MergeMismatch: as `check_merged`.
    """
    skeleton = load_policy(base, device="meta")
    updates = read_updates(adapter, skeleton)
    still_tied = parted(load_policy(_at(merged, base), device="meta"), set(updates))
    if still_tied:
        raise MergeMismatch(
            f"the merged model ties {' and '.join(sorted(still_tied[0]))}, which LoRA parts. "
            f"{_REMEDY}"
        )
    folder = base_folder(base)
    before, after = weight_files(folder), weight_files(merged)
    twice = copies(parted(skeleton, set(updates)), set(before))
    source = {copy: name for name, written in twice.items() for copy in written}
    off = {}
    for seed, (name, file) in enumerate(after.items()):
        original = source.get(name, name)
        weight = _tensor(folder / before[original], original)
        off[name] = _layer_off(weight, _tensor(merged / file, name), updates.get(name), seed)
    _compare(off | dict.fromkeys(updates.keys() - after.keys(), float("inf")), dtype)


def _load_policy(model: ModelConfig) -> PreTrainedModel:
    return load_policy(model, device="cpu")


def _at(merged: Path, base: ModelConfig) -> ModelConfig:
    """The merged folder as transformers reads it, in float32."""
    place = {"model_name_or_path": str(merged), "revision": None, "num_hidden_layers": None}
    return base.model_copy(update=place | {"torch_dtype": "float32"})


def _weights(adapted: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """All weights by the plain model's names, those of adapted layers as LoRA changes them."""
    changed = set()
    for name, layer in lora_layers(adapted).items():
        parameter = getattr(layer, "parameter_name", "weight")  # fused experts have other names
        weight = getattr(layer.get_base_layer(), parameter)
        any_layer: Any = layer  # each kind of layer has the method, their base class declares none
        changed.add(_plain(f"{name}.{parameter}"))
        yield _plain(f"{name}.{parameter}"), weight + any_layer.get_delta_weight("default")
    for name, weight in unwrapped(adapted).named_parameters(remove_duplicate=False):
        if _plain(name) not in changed and not any(part in name for part in _NOT_PLAIN):
            yield _plain(name), weight


# In names of what a plain model has not: adapters, and the head below an annotator's trained one.
_NOT_PLAIN = (".lora_A.", ".lora_B.", ".lora_embedding_", ".original_module.")


def _plain(name: str) -> str:
    """A parameter's name without peft's wrappers."""
    return name.replace("base_layer.", "").replace("modules_to_save.default.", "")


@torch.no_grad()
def _fingerprints(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """What each weight does to a random vector, by name; a small one as it is."""
    found = {}
    for name, weight in weights:
        if weight.ndim > 1 and weight.numel() > _SMALL:
            generator = torch.Generator().manual_seed(0)
            found[name] = weight @ torch.randn(weight.shape[-1], generator=generator)
        else:
            found[name] = weight.clone()
    return found


@torch.no_grad()
def _outputs(model: nn.Module, head: Head) -> Tensor:
    """Log-probs of random tokens given those before, or scores of random rows."""
    words = int(unwrapped(model).config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    tokens_RL = torch.randint(words, (_ROWS, _TOKENS), generator=generator)
    if head == "scores":  # one row at a time: several need a pad token
        return torch.cat([model(input_ids=tokens_L[None]).logits[0] for tokens_L in tokens_RL])
    logps_RLV = model(input_ids=tokens_RL, use_cache=False).logits[:, :-1].log_softmax(-1)
    logps_RL1: Tensor = logps_RLV.gather(-1, tokens_RL[:, 1:, None])
    return logps_RL1


def _layer_off(weight: Tensor, merged: Tensor, update: Update | None, seed: int) -> float:
    """How far a merged weight is from the adapted one, or without LoRA from the base's."""
    if update is None:
        return _off(merged.float(), weight.to(merged.dtype).float())
    layer, generator = update.layer, torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Embedding):
        x = torch.randint(layer.num_embeddings, (_INPUTS,), generator=generator)
    else:
        x = torch.randn(_INPUTS, update.down.shape[1], generator=generator)
    return _off(_apply(layer, merged, x), _apply(layer, weight, x) + _adapt(update, x))


def _apply(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """Wx, as the layer computes it but for a bias or a scale of embeddings."""
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, weight).float()
    return x @ weight.float() if isinstance(layer, Conv1D) else F.linear(x, weight.float())


def _adapt(update: Update, x: Tensor) -> Tensor:
    """Scale · B(Ax)."""
    down, up = update.down.float(), update.up.float()
    first = F.embedding(x, down.T) if isinstance(update.layer, nn.Embedding) else x @ down.T
    return update.scale * (first @ up.T)


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        found: Tensor = tensors.get_tensor(name)
    return found


def _off(found: Tensor | None, expected: Tensor) -> float:
    """The norm of the difference, of the norm of what is expected."""
    if found is None or found.shape != expected.shape:
        return math.inf
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo().tiny))


def _compare(off: Mapping[str, float], dtype: torch.dtype) -> None:
    """Refuses when a weight is further off than rounding explains, naming the worst."""
    wrong = {name: value for name, value in off.items() if not value <= _WEIGHT[dtype]}  # and NaN
    if wrong:
        worst = max(wrong, key=lambda name: (math.isnan(wrong[name]), wrong[name]))
        raise MergeMismatch(
            f"the merged model is not base and adapter: {worst} is off by {wrong[worst]:.1e} of its"
            f" norm ({len(wrong)} of {len(off)} tensors are, by more than {_WEIGHT[dtype]:.0e}). "
            f"{_REMEDY}"
        )
