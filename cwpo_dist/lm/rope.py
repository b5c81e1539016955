"""A model in; the same model, whose rotary positions depend on each sequence alone, out.

Two kinds of RoPE turn otherwise in long sequences: longrope beyond the length that the model was
trained at, dynamic NTK beyond it and in every length its own way. transformers asks for the longest
sequence of a batch, and under dynamic NTK remembers the longest that it has ever seen: a row would
depend on its neighbours and on what came before. `turn_alone` asks each sequence of a batch for
itself, from the start, so that a row is what the stock model makes of it alone.

The names of transformers' buffers that this reads stand here and nowhere else.

Shapes: B sequences, L padded length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_ALONE = "_cwpo_alone"  # marks a module that asks each sequence for itself


def turn_alone(model: nn.Module) -> None:
    """Lets rotary embeddings that depend on a length take each sequence's own; no other changes."""
    for module in _length_dependent(model):
        if not hasattr(module, _ALONE):
            module.forward = partial(_each_alone, module, module.forward)
            setattr(module, _ALONE, True)


def turns_alone(model: nn.Module) -> bool:
    """Whether it asks each sequence for itself, and so must be told each one's own positions."""
    return any(hasattr(module, _ALONE) for module in model.modules())


def turning_length(model: nn.Module) -> int | None:
    """The most tokens of a sequence up to which its rotary positions are as in any shorter one.

    Returns:
        None where no length changes them.
    """
    lengths = (length for module in _length_dependent(model) for length in _lengths(module))
    return min(lengths, default=None)


def _length_dependent(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if any("dynamic" in kind or kind == "longrope" for kind in _kinds(module).values()):
            yield module


def _kinds(module: nn.Module) -> dict[str, str]:
    """Of a rotary embedding its kind, by type of layer ('' where it has but one); else nothing."""
    kind = getattr(module, "rope_type", None)
    kinds = kind if isinstance(kind, dict) else {"": kind}
    return {layer: each for layer, each in kinds.items() if isinstance(each, str)}


def _lengths(module: Any) -> Iterator[int]:
    for layer, kind in _kinds(module).items():
        if "dynamic" in kind:
            yield int(module.original_max_seq_len)
        elif kind == "longrope":
            parameters = module.config.rope_parameters
            parameters = parameters[layer] if layer else parameters
            yield int(parameters["original_max_position_embeddings"])


def _each_alone(
    module: nn.Module,
    stock: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    position_ids: Tensor,
    *args: object,
    **kwargs: object,
) -> tuple[Tensor, ...]:
    """Cosines and sines [B, L, …] of positions [B, L], each sequence by its own longest one."""
    found = []
    for row in range(position_ids.shape[0]):
        _forget(module)
        found.append(stock(x[:1], position_ids[row : row + 1], *args, **kwargs))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _forget(module: nn.Module) -> None:
    """A dynamic embedding as it was made: what it has seen no longer counts."""
    for layer, kind in _kinds(module).items():
        if "dynamic" not in kind:
            continue
        prefix = f"{layer}_" if layer else ""
        first = getattr(module, f"{prefix}original_inv_freq")
        used = getattr(module, f"{prefix}inv_freq")
        module.register_buffer(f"{prefix}inv_freq", first.to(used.device), persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
