"""What transformers is told when it loads a model: precision, attention, and where to."""

from __future__ import annotations

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from cwpo_dist.config import ModelConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # by their names in the config


def native_dtype(device: torch.device | str) -> torch.dtype:
    """The precision that `auto` stands for on a device: bf16 on CUDA, fp32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def dtype_of(model: ModelConfig, device: torch.device | str) -> torch.dtype:
    """The precision that a model gets on a device."""
    return native_dtype(device) if model.torch_dtype == "auto" else _DTYPES[model.torch_dtype]


def attention_of(model: ModelConfig) -> str | None:
    """What transformers is told; None: it chooses."""
    return None if model.attn_implementation == "auto" else model.attn_implementation


def straight_to(device: torch.device | str, *, new_head: bool) -> dict[str, torch.device] | None:
    """Where weights are read to, for transformers; None: to the CPU, or where ZeRO-3 says.

    To a GPU at once, as the processes of a node would hold a copy each on the host. On 'meta' none
    is read: sizes and missing tensors are known all the same. A new head is drawn on the CPU, so
    that it is the same on every device.
    """
    kind = torch.device(device).type
    if kind == "cpu" or (kind != "meta" and (new_head or is_deepspeed_zero3_enabled())):
        return None
    return {"": torch.device(device)}
