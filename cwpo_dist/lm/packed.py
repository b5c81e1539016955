"""Attention over rows that lie end to end in one sequence: no pads, no dense mask.

A stock Hugging Face decoder computes everything but attention token by token, so rows packed into
one sequence cost it nothing for padding; only attention must know where rows begin and end. It is
computed row by row by torch's own kernels, or, where it can be, by one kernel for all (varlen.py).
Where scores must not depend on the batch, it goes by tiles of one answer (fixed_shapes.py).

Shapes: T tokens, R rows, K answers of the row that has most, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cwpo_dist.lm import fixed_shapes, varlen
from cwpo_dist.lm.feeding import pinned
from cwpo_dist.lm.sequence import ALONE, SequenceGroup

NAME = "cwpo_packed"  # of the attention implementation, as transformers knows it
_HOST = "cwpo_host"  # lengths on the host, on a mask that lies on another device
_GROUP = "cwpo_group"  # the ranks that share the rows, on the mask
_SEGMENTS = "cwpo_segments"  # of the kernel, on the mask that all layers get

_pads: ContextVar[bool | None] = ContextVar("pads", default=None)  # whether there are; None: ask

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
        query: [1, H, T, D]; where ranks share the rows, of this one's tokens.
        key: [1, H or fewer, T, D].
        value: as `key`.
        attention_mask: what `packed_mask` gave; any other mask is not of packed rows.
        dropout: probability, while training.
        scaling: of the scores; None: D^(−½).
        **kwargs: whatever else the model hands to its attention.

    Returns:
        [1, T, H, D], and no attention weights.

    Raises:
        ValueError: for a model whose attention is more than a softmax of scaled products, or has
            heads that ranks cannot share.
    """
    lengths = packed_lengths(attention_mask)
    if lengths is None or attention_mask is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    found = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if found:
        raise ValueError(f"packed rows do not support {', '.join(found)}")
    group, tokens = group_of(attention_mask), sum(map(sum, lengths))
    if query.shape[1] % group.size:
        raise ValueError(f"{group.size} workers cannot share {query.shape[1]} attention heads")
    query, key, value = (group.heads(each, tokens) for each in (query, key, value))
    if fixed_shapes.active():
        output = fixed_shapes.by_tile(query, key, value, lengths, scaling)
    elif varlen.usable(query, key, value, dropout, by_row):
        output = varlen.attend(query, key, value, _segments(attention_mask, lengths), scaling)
    else:
        output = by_row(query, key, value, lengths, scaling, dropout)
    return group.tokens(output).transpose(1, 2), None


def packed_mask(lengths: Tensor, device: torch.device, group: SequenceGroup = ALONE) -> Tensor:
    """What a decoder takes as the mask of packed rows.

    A mask is all that stock decoders hand from their input to the attention of every layer, and
    transformers takes one of four dimensions for finished and leaves it as it is. So the lengths
    travel in its shape and place, and attention that is not ours would fail on it, not misread it.

    Args:
        lengths: of a packed batch, as `RowBatch.attention_mask` has them on the host.
        device: of the decoder.
        group: the ranks that share the rows.

    Returns:
        The lengths there, which remember the group, and those on the host: to read them back would
        wait for all that the device has still to do.
    """
    mask = pinned(lengths, device).to(device, non_blocking=True, copy=True)
    setattr(mask, _HOST, lengths)
    setattr(mask, _GROUP, group)
    return mask


def packed_lengths(mask: object) -> varlen.Lengths | None:
    """Each row's lengths out of what `packed_mask` gave; None for anything else."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.int64 or mask.dim() != 4:
        return None
    lengths_RS: Tensor = getattr(mask, _HOST, mask)[0, 0]
    return [[length for length in lengths if length] for lengths in lengths_RS.tolist()]


def group_of(mask: object) -> SequenceGroup:
    """The ranks that share the rows of what `packed_mask` gave."""
    return getattr(mask, _GROUP, ALONE)


def _segments(mask: Tensor, lengths: varlen.Lengths) -> varlen.Segments:
    """Of the kernel: made once a mask, for all layers."""
    found: varlen.Segments | None = getattr(mask, _SEGMENTS, None)
    if found is None:
        found = varlen.Segments.of(lengths, mask.device)
        setattr(mask, _SEGMENTS, found)
    return found


def by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: varlen.Lengths,
    scaling: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of one row after the other, each by one of torch's own fused kernels.

    Args:
        query: [1, H, T, D].
        key: [1, H or fewer, T, D].
        value: as `key`.
        lengths: tokens of each row's prompt and of its answers.
        scaling: of the scores; None: D^(−½).
        dropout: probability.

    Returns:
        [1, H, T, D].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    attend = partial(scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    sizes = [sum(each) for each in lengths]
    rows = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    pieces: list[Tensor] = []
    for (prompt, first, *further), (q, k, v) in zip(lengths, rows, strict=True):
        # The prompt with its first answer, then each further answer.
        end = prompt + first
        pieces.append(attend(*(tensor[:, :, :end] for tensor in (q, k, v)), is_causal=True))
        for length in further:
            # The prompt's keys with the answer's own; its query i sees all of the prompt and 0 … i.
            k_seen, v_seen = (
                torch.cat([tensor[:, :, :prompt], tensor[:, :, end : end + length]], dim=2)
                for tensor in (k, v)
            )
            seen = torch.ones(length, prompt + length, dtype=torch.bool, device=q.device)
            own = q[:, :, end : end + length]
            pieces.append(attend(own, k_seen, v_seen, attn_mask=seen.tril(prompt)))
            end += length
    return torch.cat(pieces, dim=2)


@contextmanager
def told_of_pads(*, some: bool) -> Iterator[None]:
    """Within it, stock masks of plain rows are the same, but made without reading the device.

    torch's attention needs no mask where there are no pads. transformers looks, on the device,
    whether there are some; the host knows.
    """
    token = _pads.set(some)
    try:
        yield
    finally:
        _pads.reset(token)


def _stock_mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """As transformers makes it for torch's attention, which needs none where the host says so."""
    pads = _pads.get()
    if pads:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    attention_mask = attention_mask if pads is not False else None
    mask: Tensor | None = sdpa_mask(attention_mask=attention_mask, **kwargs)
    return mask


AttentionInterface.register(NAME, packed_attention)
for _name in ("sdpa", NAME):
    AttentionMaskInterface.register(_name, _stock_mask)
