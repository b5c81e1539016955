"""Two LoRA adapters in, the second trained on the first one's merged model; one of both out.

Ranks add up: s₁B₁A₁ + s₂B₂A₂ = [s₁B₁ s₂B₂]·[A₁; A₂], so the adapter of both is exact.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cwpo_dist.training.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from cwpo_dist.training.merge import SPECIAL, adapted_layers


class StackError(ValueError):
    """Adapters whose ranks do not simply add up; the message says why."""


def stack_adapters(first: Path, second: Path, out: Path) -> None:
    """Writes weights and configuration of one adapter that does what two do one after the other.

    A layer that only one of them adapts is padded with zeros, so that the rank is one number, which
    every program that reads adapters knows; its scale is 1.

    Args:
        first: folder of the adapter on the base.
        second: folder of the adapter on base and first.
        out: a folder that is there; may be `second`.

    Raises:
        StackError: for adapters that are more than plain LoRA of layers.
    """
    settings = [json.loads((folder / ADAPTER_CONFIG).read_text()) for folder in (first, second)]
    for folder, each in zip((first, second), settings, strict=True):
        special = [name for name in SPECIAL if each.get(name)]
        if special or isinstance(each["target_modules"], str):
            raise StackError(f"{folder.name}: {', '.join(special) or 'a pattern'} set")
    weights = [load_file(folder / ADAPTER_WEIGHTS) for folder in (first, second)]
    ranks = [int(each["r"]) for each in settings]
    scales = [each["lora_alpha"] / each["r"] for each in settings]
    stacked: dict[str, Tensor] = {}
    for _, a, b in sorted({layer for each in weights for layer in adapted_layers(each)}):
        downs = [each.get(a) for each in weights]
        ups = [_times(each.get(b), scale) for each, scale in zip(weights, scales, strict=True)]
        stacked[a] = torch.cat(_filled(downs, ranks, dim=0), dim=0)
        stacked[b] = torch.cat(_filled(ups, ranks, dim=1), dim=1)
    if stacked.keys() != weights[0].keys() | weights[1].keys():
        raise StackError("an adapter holds more than LoRA of linear layers and embeddings")
    targets = {name for each in settings for name in each["target_modules"]}
    both = settings[1] | {"r": sum(ranks), "lora_alpha": sum(ranks)}
    both |= {"target_modules": sorted(targets)}
    save_file(stacked, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (out / ADAPTER_CONFIG).write_text(json.dumps(both, indent=2, sort_keys=True))


def _filled(parts: list[Tensor | None], ranks: list[int], dim: int) -> list[Tensor]:
    """Zeros for the adapter that leaves a layer alone."""
    there = next(part for part in parts if part is not None)
    shapes = [[*there.shape] for _ in parts]
    for shape, rank in zip(shapes, ranks, strict=True):
        shape[dim] = rank
    return [
        there.new_zeros(shape) if part is None else part
        for part, shape in zip(parts, shapes, strict=True)
    ]


def _times(up: Tensor | None, scale: float) -> Tensor | None:
    """Scale · B: in its own precision where that is exact (a power of two), else in float32."""
    if up is None:
        return None
    exact = up.float() * scale
    return exact.to(up.dtype) if torch.equal(exact.to(up.dtype).float(), exact) else exact
