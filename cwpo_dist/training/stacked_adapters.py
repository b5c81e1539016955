"""Two LoRA adapters in, the second trained on the first one's merged model; one of both out.

Ranks add up: s₁B₁A₁ + s₂B₂A₂ = [s₁B₁ s₂B₂]·[A₁; A₂], so the adapter of both is exact. Programs that
read adapters take one, and know of no order in which several would have to be applied: after an SFT
stage with LoRA, the policy's own adapter would be wrong on the base alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    below, above = _settings(first), _settings(second)
    stacked = _stacked(
        [load_file(folder / ADAPTER_WEIGHTS) for folder in (first, second)],
        ranks=[int(below["r"]), int(above["r"])],
        scales=[each["lora_alpha"] / each["r"] for each in (below, above)],
    )
    rank = int(below["r"]) + int(above["r"])
    both = above | {
        "r": rank,
        "lora_alpha": rank,  # a scale of 1: each one's own is in its B
        "target_modules": sorted({*below["target_modules"], *above["target_modules"]}),
    }
    save_file(stacked, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (out / ADAPTER_CONFIG).write_text(json.dumps(both, indent=2, sort_keys=True))


def _settings(folder: Path) -> dict[str, Any]:
    """An adapter's configuration, if ranks of such a one can be added up."""
    settings: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text())
    special = [name for name in SPECIAL if settings.get(name)]
    if special or isinstance(settings["target_modules"], str):
        raise StackError(f"{folder.name}: {', '.join(special) or 'a pattern'} set")
    return settings


def _stacked(
    weights: list[dict[str, Tensor]], ranks: list[int], scales: list[float]
) -> dict[str, Tensor]:
    """A of both, one below the other, and their scaled B side by side, layer by layer."""
    stacked: dict[str, Tensor] = {}
    for _, a, b in sorted({layer for each in weights for layer in adapted_layers(each)}):
        downs = [each.get(a) for each in weights]
        ups = [_times(each.get(b), scale) for each, scale in zip(weights, scales, strict=True)]
        stacked[a] = torch.cat(_filled(downs, ranks, dim=0), dim=0)
        stacked[b] = torch.cat(_filled(ups, ranks, dim=1), dim=1)
    if stacked.keys() != weights[0].keys() | weights[1].keys():
        raise StackError("an adapter holds more than LoRA of linear layers and embeddings")
    return stacked


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
