"""A model on the meta device in; what autograd keeps of a token of it for the backward pass, out.

Nothing is computed: a forward pass over tensors without memory, whose saved tensors are counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cwpo_dist.lm.foreign import FOREIGN_ERRORS
from cwpo_dist.lm.modules import decoder_of, unwrapped

TOKENS = 16  # few, as stock attention without memory keeps a square of them


def kept_numbers(model: nn.Module) -> float:
    """Numbers that the decoder's layers keep a token, if all that requires gradients is trained.

    Args:
        model: on the meta device, in fp32, with or without adapters; a mixture of experts is in
            bf16 after it.

    Raises:
        FOREIGN_ERRORS: for a model that looks at values, which nobody can know without computing
            them, or that takes no tensors without memory.
    """
    core = unwrapped(model)
    if getattr(core.config, "_experts_implementation", None) == "grouped_mm":
        model.to(torch.bfloat16)  # else torch has no such product without memory
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(1, 1, TOKENS, TOKENS, device="meta", dtype=dtype)
    try:
        return _kept(core, mask)
    except FOREIGN_ERRORS:  # ALiBi and state spaces take no such mask
        return _kept(core, None)


def _kept(core: Any, mask: Tensor | None) -> float:
    own = {p.untyped_storage()._cdata for p in core.parameters()}
    kept: dict[int, tuple[Any, float]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # Alive, so that no other takes its place.
            kept[storage._cdata] = storage, storage.nbytes() / tensor.element_size()
        return tensor

    some = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
    placed = {} if mask is None else {"attention_mask": mask, "position_ids": some}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = decoder_of(core)(some, use_cache=False, **placed)
    del outputs  # alive until here, and with it what it keeps
    return sum(numbers for _, numbers in kept.values()) / TOKENS
