"""Attention over rows that lie end to end in one sequence: no pads, no dense mask.

A stock Hugging Face decoder computes everything but attention token by token, so rows packed into
one sequence cost it nothing for padding; only attention must know where rows begin and end. On CPU
it is computed row by row by torch's own kernel; on CUDA by FlexAttention under a block mask (tested
here on CPU in its eager form; it has not run on a GPU yet).

Shapes: T tokens, R rows, K answers a row, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from cwpo_dist.lm.rows import mask_allows

NAME = "cwpo_packed"  # of the attention implementation, as transformers knows it
_LENGTHS = "cwpo_lengths"  # of packed rows, on their block mask

# What some models add to their attention scores, and this function would leave out.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of packed rows; of anything else, as transformers' `sdpa` computes it.

    Args:
        module: the attention layer.
        query: [1, H, T, D].
        key: [1, H or fewer, T, D].
        value: as `key`.
        attention_mask: int64 [1, 1, R, 1 + K], tokens of each row's prompt and of its answers; any
            other mask is not of packed rows.
        dropout: probability, while training.
        scaling: of the scores; None: D^(−½).
        **kwargs: whatever else the model hands to its attention.

    Returns:
        [1, T, H, D], and no attention weights.

    Raises:
        ValueError: for a model whose attention is more than a softmax of scaled products.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    found = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if found:
        raise ValueError(f"packed rows know no {', '.join(found)}")
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    attend = partial(scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    lengths_RS = attention_mask[0, 0].tolist()
    sizes = [sum(lengths) for lengths in lengths_RS]
    rows = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    pieces: list[Tensor] = []
    for lengths, (q, k, v) in zip(lengths_RS, rows, strict=True):
        pieces += _row_attention(attend, q, k, v, lengths)
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _row_attention(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, lengths: list[int]
) -> list[Tensor]:
    """One row's outputs [1, H, n, D]: prompt with its first answer, then each further answer."""
    prompt, first, *further = lengths
    end = prompt + first
    q, k, v = (tensor[:, :, :end] for tensor in (query, key, value))
    outputs = [attend(q, k, v, is_causal=True)]
    for length in further:
        # The prompt's keys with the answer's own; its query i sees all of the prompt and 0 … i.
        k, v = (
            torch.cat([tensor[:, :, :prompt], tensor[:, :, end : end + length]], dim=2)
            for tensor in (key, value)
        )
        seen = torch.ones(length, prompt + length, dtype=torch.bool, device=q.device).tril(prompt)
        outputs.append(attend(query[:, :, end : end + length], k, v, attn_mask=seen))
        end += length
    return outputs


def packed_mask_mod(lengths_RS: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Lengths [R, 1 + K] of prompts and answers → a FlexAttention `mask_mod` over T tokens."""
    flat = lengths_RS.flatten()
    part_T = torch.repeat_interleave(torch.arange(len(flat), device=flat.device), flat)
    row_T, segment_T = part_T // lengths_RS.shape[1], part_T % lengths_RS.shape[1]

    def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = mask_allows(query, key, segment_T[query], segment_T[key])
        return (row_T[query] == row_T[key]) & allowed

    return mask_mod


def packed_mask(lengths: Tensor, n_tokens: int) -> Tensor | BlockMask:
    """What a decoder takes as its mask: on CUDA a block mask, elsewhere the lengths themselves.

    Args:
        lengths: int64 [1, 1, R, 1 + K].
        n_tokens: T, their sum.
    """
    if not lengths.is_cuda:
        return lengths
    mask_mod = packed_mask_mod(lengths[0, 0])
    mask = create_block_mask(mask_mod, 1, None, n_tokens, n_tokens, device=lengths.device)
    setattr(mask, _LENGTHS, lengths[0, 0])  # for whoever meets the mask further down
    return mask


def packed_lengths(mask: Any) -> Tensor | None:
    """Lengths [R, 1 + K] out of what `packed_mask` gave; None for anything else."""
    if isinstance(mask, Tensor) and mask.dtype == torch.int64 and mask.dim() == 4:
        return mask[0, 0]
    found: Tensor | None = getattr(mask, _LENGTHS, None)
    return found


def attention_for(device: torch.device) -> str:
    """The attention implementation by which packed rows are computed on a device."""
    return "flex_attention" if device.type == "cuda" else NAME


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
