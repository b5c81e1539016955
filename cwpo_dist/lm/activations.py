"""A model on the meta device in; what autograd keeps of a token of it for the backward pass, out.

Nothing is computed: a forward pass over tensors without memory, whose saved tensors are counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cwpo_dist.lm.modules import unwrapped

TOKENS = 16  # few, as stock attention without memory keeps a square of them


def kept_numbers(model: nn.Module) -> float:
    """Numbers that the decoder's layers keep a token, if all that requires gradients is trained.

    Args:
        model: on the meta device, in fp32; with or without adapters.

    Raises:
        NotImplementedError, RuntimeError: for a model that looks at values, such as a mixture of
            experts, which nobody can know without computing them.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # alive, so that no other takes its place
        return tensor

    some = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
    mask = torch.zeros(1, 1, TOKENS, TOKENS, device="meta")
    decoder = unwrapped(model).base_model
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = decoder(some, attention_mask=mask, position_ids=some, use_cache=False)
    del outputs  # alive until here, and with it what it keeps
    n_bytes: int = sum(storage.nbytes() for storage in kept.values())
    return n_bytes / 4 / TOKENS
