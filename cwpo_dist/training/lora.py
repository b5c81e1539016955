"""A model in, the same under LoRA out; and a base folder and an adapter folder in, one model out.

Merging streams the base's safetensors through memory on CPU, one shard (5 GB by default) at a time,
so a 70B base needs no 70B machine. `merge_adapter` gives what peft's `merge_and_unload` gives.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, TaskType, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from cwpo_dist.config import LoraConfig, ModelConfig
from cwpo_dist.lm.loading import model_path

logger = logging.getLogger(__name__)

Head = Literal["logps", "scores"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# What LoraConfig cannot ask for, and a plain W + B·A·scale would not be.
_SPECIAL = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")


class MergeError(ValueError):
    """An adapter that cannot be streamed into its base; the message says why."""


def add_lora(model: PreTrainedModel, lora: LoraConfig, head: Head, seed: int) -> PeftModel:
    """The model with fresh adapters; they alone (and an annotator's head) require gradients.

    Args:
        model: a causal LM, or a sequence classifier.
        lora: rank, scale, dropout, targets.
        head: 'scores' for a classifier, whose new head is trained whole.
        seed: of the adapters.
    """
    settings = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        task_type=TaskType.CAUSAL_LM if head == "logps" else TaskType.SEQ_CLS,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads what transformers renamed
        torch.manual_seed(seed)
        # In the model's own precision: DeepSpeed wants one, and keeps the fp32 masters itself.
        adapted: Any = get_peft_model(model, settings, autocast_adapter_dtype=False)
    assert isinstance(adapted, PeftModel)
    return adapted


def save_adapter(model: PeftModel, whole: dict[str, Tensor], folder: Path) -> None:
    """Writes adapter weights and configuration in peft's format.

    Args:
        model: the adapted model; its own weights are not read (they may be shards).
        whole: its trainable parameters by the model's names.
        folder: made if need be.
    """
    model.save_pretrained(str(folder), state_dict=whole, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card


def base_folder(model: ModelConfig) -> Path:
    """The local folder of a model's configuration and weights, downloaded if it is a hub id."""
    path = model_path(model.model_name_or_path)
    if Path(path).is_dir():
        return Path(path)
    patterns = ["*.json", "*.safetensors"]
    return Path(snapshot_download(path, revision=model.revision, allow_patterns=patterns))


def merge_adapter(
    base: Path, adapter: Path, out: Path, *, dtype: torch.dtype | None = None
) -> None:
    """Writes base + adapter as one Hugging Face folder (weights and configurations).

    Args:
        base: folder of a model in safetensors.
        adapter: folder that `save_adapter` wrote.
        out: made if need be; shards keep the base's names.
        dtype: of floating-point weights; None keeps the base's.

    Raises:
        MergeError: for an adapter that is more than plain LoRA, or targets that the base's files
            do not name (an old checkpoint that its class renames while loading).
    """
    updates = _updates(adapter)
    names = {name: shard for shard in _shards(base) for name in _names(base / shard)}
    unknown = sorted(updates.keys() - names.keys())
    if unknown:
        raise MergeError(f"{base}: no tensor {unknown[0]!r} (and {len(unknown) - 1} more) in it")
    out.mkdir(parents=True, exist_ok=True)
    size = 0
    for shard in sorted(set(names.values())):
        merged = {}
        for name, weight in _tensors(base / shard):
            update = updates.get(name)
            merged[name] = _merged(weight, update, dtype)
        size += sum(tensor.numel() * tensor.element_size() for tensor in merged.values())
        save_file(merged, out / shard, metadata={"format": "pt"})
    if len(set(names.values())) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": names}
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
    _copy_configuration(base, out, dtype)


def merge_in_memory(model: PreTrainedModel, adapter: Path, out: Path, dtype: torch.dtype) -> None:
    """As `merge_adapter`, for any adapter that peft can merge, on a model loaded whole."""
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.to(dtype).save_pretrained(str(out))


@dataclass(frozen=True)
class _Update:
    """What LoRA adds to one weight: scale · up · down, transposed for Conv1D weights."""

    down: Tensor
    up: Tensor
    scale: float
    transposed: bool

    def delta(self) -> Tensor:
        product = (self.up.float() @ self.down.float()) * self.scale
        return product.T if self.transposed else product


def _updates(adapter: Path) -> dict[str, _Update]:
    """By the name of the weight that each belongs to."""
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text())
    special = [name for name in _SPECIAL if settings.get(name)]
    if special:
        raise MergeError(f"{adapter}: {', '.join(special)} set, which is more than plain LoRA")
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    scale = settings["lora_alpha"] / settings["r"]
    updates = {}
    for name in sorted(weights):
        if name.endswith(_DOWN):
            stem = name.removesuffix(_DOWN)
            down, up = weights.pop(name), weights.pop(stem + _UP)
            target = stem.removeprefix(_PREFIX) + ".weight"
            updates[target] = _Update(down, up, scale, bool(settings.get("fan_in_fan_out")))
    if weights:
        raise MergeError(f"{adapter}: {min(weights)!r} is no LoRA of a linear layer")
    return updates


def _merged(weight: Tensor, update: _Update | None, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
    if update is None:
        return weight.to(wanted)
    return (weight.float() + update.delta()).to(wanted).contiguous()


def _shards(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    raise MergeError(f"{folder}: neither {WEIGHTS} nor {INDEX}; give a folder in safetensors")


def _names(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as tensors:
        return list(tensors.keys())


def _tensors(shard: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(shard, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            yield name, tensors.get_tensor(name)


def _copy_configuration(base: Path, out: Path, dtype: torch.dtype | None) -> None:
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if dtype is not None:
        config.dtype = dtype
    config.save_pretrained(out)
    generation = base / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, out / generation.name)
