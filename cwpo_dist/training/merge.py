"""A base model and an adapter folder in, one Hugging Face folder out: what peft's merge gives.

Merging streams the base's safetensors through memory on CPU, one shard (5 GB by default) at a time,
so a 70B base needs no 70B machine. Where LoRA adapts one of two tied embeddings, both are written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cwpo_dist.config import ModelConfig
from cwpo_dist.hub_names import is_hub_id
from cwpo_dist.lm.loading import load_policy, model_path
from cwpo_dist.lm.switches import give_back
from cwpo_dist.training.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PREFIX,
    hushed_peft,
    load_adapter,
    parted,
    say_untied,
    untie,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# A and B of a linear layer and of an embedding.
_PAIRS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
# What a plain W + B·A·scale of layers would not be; target_parameters: fused experts.
SPECIAL = (
    *("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"),
    "target_parameters",
)


class MergeError(ValueError):
    """An adapter that cannot be streamed into its base; the message says why."""


@dataclass(frozen=True)
class Update:
    """What LoRA adds to one layer.

    Attributes:
        layer: without weights: what it does with one.
        down: A, [r, in].
        up: B, [out, r].
        scale: α / r.
    """

    layer: nn.Module
    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> Tensor:
        """Scale · B·A, as the layer keeps its weight: [out, in], or [in, out] (GPT-2's, tables)."""
        product = (self.up.float() @ self.down.float()) * self.scale
        return product.T if isinstance(self.layer, Conv1D | nn.Embedding) else product


def base_folder(model: ModelConfig) -> Path:
    """The local folder of a model's configuration and weights, downloaded if it is a hub id."""
    path = model_path(model.model_name_or_path)
    if not is_hub_id(path):
        return Path(path)
    patterns = ["*.json", "*.safetensors"]
    return Path(snapshot_download(path, revision=model.revision, allow_patterns=patterns))


def merge_adapter(
    base: ModelConfig, adapter: Path, out: Path, *, dtype: torch.dtype | None = None
) -> None:
    """Writes base + adapter as one Hugging Face folder (weights and configurations).

    Args:
        base: a causal language model in safetensors.
        adapter: folder that `save_adapter` wrote.
        out: made if need be; shards keep the base's names.
        dtype: of floating-point weights; None keeps the base's.

    Raises:
        MergeError: for an adapter that is more than plain LoRA, or targets that the base's files
            do not name (an old checkpoint that its class renames while loading).
    """
    folder, skeleton = base_folder(base), load_policy(base, device="meta")
    updates = read_updates(adapter, skeleton)
    files = weight_files(folder)
    untied = parted(skeleton, set(updates))
    twice = copies(untied, set(files))
    unknown = sorted(updates.keys() - files.keys() - {name for c in twice.values() for name in c})
    if unknown:
        raise MergeError(f"{folder}: no tensor {unknown[0]!r} (and {len(unknown) - 1} more) in it")
    out.mkdir(parents=True, exist_ok=True)
    size = 0
    for shard in sorted(set(files.values())):
        merged = {}
        for name, weight in _tensors(folder / shard):
            for written in (name, *twice.get(name, ())):
                merged[written] = _merged(weight, updates.get(written), dtype)
                files[written] = shard
        size += sum(tensor.numel() * tensor.element_size() for tensor in merged.values())
        save_file(merged, out / shard, metadata={"format": "pt"})
    if len(set(files.values())) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
    _copy_configuration(folder, out, dtype, untied=bool(untied))


def merge_in_memory(model: PreTrainedModel, adapter: Path, out: Path, dtype: torch.dtype) -> None:
    """As `merge_adapter`, for any adapter that peft can merge, on a model loaded whole.

    Args:
        model: the base, which is changed.
        adapter: its folder.
        out: a folder that is there.
        dtype: of what is written.
    """
    stems = {stem for stem, _, _ in adapted_layers(load_file(adapter / ADAPTER_WEIGHTS))}
    if parted(model, {f"{stem}.weight" for stem in stems}):
        untie(model)  # else peft would add to the weight of both
    with hushed_peft():
        merged: Any = load_adapter(model, adapter).merge_and_unload()
    give_back(merged)
    merged.to(dtype).save_pretrained(str(out))


def read_updates(adapter: Path, skeleton: PreTrainedModel) -> dict[str, Update]:
    """What an adapter folder adds, by the name of the weight that each belongs to.

    Args:
        adapter: the folder.
        skeleton: the base model; its weights are not read.

    Raises:
        MergeError: for an adapter that is more than plain LoRA of linear layers and embeddings.
    """
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text())
    special = [name for name in SPECIAL if settings.get(name)]
    if special:
        raise MergeError(f"{adapter}: {', '.join(special)} set, which is more than plain LoRA")
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    scale = settings["lora_alpha"] / settings["r"]
    updates = {}
    for stem, a, b in adapted_layers(weights):
        layer = skeleton.get_submodule(stem)
        if not isinstance(layer, nn.Linear | Conv1D | nn.Embedding):
            raise MergeError(f"{adapter}: {stem!r} is a {type(layer).__name__}")
        updates[f"{stem}.weight"] = Update(layer, weights.pop(a), weights.pop(b), scale)
    if weights:
        raise MergeError(f"{adapter}: {min(weights)!r} is not the LoRA of a layer")
    return updates


def weight_files(folder: Path) -> dict[str, str]:
    """The file that each tensor of a model folder lies in.

    Raises:
        MergeError: for a folder without safetensors.
    """
    return {name: shard for shard in _shards(folder) for name in _names(folder / shard)}


def adapted_layers(weights: dict[str, Tensor]) -> list[tuple[str, str, str]]:
    """The layers that an adapter's tensors belong to, and the names of each one's A and B."""
    return [
        (name.removesuffix(down).removeprefix(PREFIX), name, name.removesuffix(down) + up)
        for name in sorted(weights)
        for down, up in _PAIRS
        if name.endswith(down)
    ]


def copies(untied: list[set[str]], there: set[str]) -> dict[str, list[str]]:
    """Names that files with tied embeddings lack, by the name of the tensor that they stand for."""
    return {min(shared & there): sorted(shared - there) for shared in untied if shared & there}


def _merged(weight: Tensor, update: Update | None, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
    if update is not None:
        weight = weight.float() + update.delta()
    return weight.to(wanted).contiguous()


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


def _copy_configuration(base: Path, out: Path, dtype: torch.dtype | None, *, untied: bool) -> None:
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if dtype is not None:
        config.dtype = dtype
    if untied:
        say_untied(config)
    config.save_pretrained(out)
    generation = base / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, out / generation.name)
