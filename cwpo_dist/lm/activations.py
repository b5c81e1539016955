"""A model on the meta device in; what autograd keeps of a token of it for the backward pass, out.

Nothing is computed: a forward pass over tensors without memory, whose saved tensors are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from cwpo_dist.lm.foreign import FOREIGN_ERRORS
from cwpo_dist.lm.modules import decoder_of, unwrapped
from cwpo_dist.lm.transformers_internals import attention_in_use, experts_in_use

_NAME = "cwpo_counted"  # of the attention, as transformers knows it
TOKENS = 16  # few, as stock attention without memory keeps a square of them


@dataclass(frozen=True)
class Kept:
    """What autograd keeps of a token for the backward pass.

    Attributes:
        numbers: in fp32.
        half_bytes: bytes in bf16, in which norms and rotary positions still keep fp32.
    """

    numbers: float
    half_bytes: float


def kept_of_token(model: nn.Module) -> Kept:
    """What the decoder's layers keep, if all that requires gradients is trained.

    Args:
        model: on the meta device, in fp32, with or without adapters; in bf16 after it.

    Raises:
        FOREIGN_ERRORS: for a model that looks at values, which nobody can know without computing
            them, or that takes no tensors without memory.
    """
    core = unwrapped(model)
    # Of grouped experts torch has no such product without memory in fp32.
    grouped = experts_in_use(core) == "grouped_mm"
    numbers = None if grouped else _kept(core)[0]
    model.to(torch.bfloat16)
    if attention_in_use(core) == "sdpa":
        core.set_attn_implementation(_NAME)
    in_half, half_bytes = _kept(core)
    return Kept(in_half if numbers is None else numbers, half_bytes)


class _Fused(torch.autograd.Function):
    """What a fused kernel keeps. Without memory torch takes another way, which keeps more."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, H, T, D] each → [B, H, T, D], of no values."""
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(_ctx: FunctionCtx, *_: Tensor) -> None:
        """Nobody asks for it."""
        raise NotImplementedError


def _fused(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
) -> tuple[Tensor, None]:
    return _Fused.apply(query, key, value).transpose(1, 2), None  # type: ignore[no-untyped-call]  # torch's


AttentionInterface.register(_NAME, _fused)
AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _kept(core: PreTrainedModel) -> tuple[float, float]:
    """Numbers and bytes a token."""
    dtype = next(core.parameters()).dtype
    mask = torch.zeros(1, 1, TOKENS, TOKENS, device="meta", dtype=dtype)
    try:
        return _kept_under(core, mask)
    except FOREIGN_ERRORS:  # ALiBi and state spaces take no such mask
        return _kept_under(core, None)


def _kept_under(core: PreTrainedModel, mask: Tensor | None) -> tuple[float, float]:
    # torch gives one Python object a storage for as long as the storage lives, so ids tell apart.
    own = {id(p.untyped_storage()) for p in core.parameters()}
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            # Alive, so that no other takes its place.
            kept[id(storage)] = storage, tensor.element_size()
        return tensor

    some = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
    placed = {} if mask is None else {"attention_mask": mask, "position_ids": some}
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        outputs = decoder_of(core)(some, use_cache=False, **placed)
    del outputs  # alive until here, and with it what it keeps
    numbers = sum(storage.nbytes() / size for storage, size in kept.values())
    return numbers / TOKENS, sum(storage.nbytes() for storage, _ in kept.values()) / TOKENS
