"""Packed rows in; the attention of all of them by one kernel of variable lengths out.

A row is a segment or more: its prompt with the first answer, and each further answer, whose
keys are the prompt's and its own. Queries stay where they are; keys are gathered, a few more than
tokens. Nothing is compiled and no mask is made. The kernel (flash attention, which torch brings
along) is for half precision on NVIDIA GPUs; before it is used it is compared, forward and backward,
with attention row by row. It has not run on a GPU yet: the plan of segments is proved on CPU.

Shapes: T tokens, T_k gathered keys, S segments, H heads of width D.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from cwpo_dist.lm.feeding import moved
from cwpo_dist.lm.foreign import FOREIGN_ERRORS, model_fault
from cwpo_dist.lm.rows import counted

logger = logging.getLogger(__name__)

Lengths = Sequence[Sequence[int]]  # tokens of each row's prompt and of each of its answers
ByRow = Callable[[Tensor, Tensor, Tensor, Lengths, float | None], Tensor]

_CAUSAL = (-1, 0)  # the last query of a segment sees its last key
_OLDEST = (8, 0)  # compute capability that flash attention needs
_WIDEST = 256  # D that it knows; it must be a multiple of 8
# Relative errors that rounding alone explains, of a token's output and of a whole gradient. One
# key too many or too few is of the order of 1.
_TOLERANCE = {torch.float16: (2e-2, 1e-2), torch.bfloat16: (1e-1, 5e-2)}
_PROBED: Lengths = ((130, 131, 3), (1, 1, 2, 7), (63, 64), (5, 270, 1))  # around the kernel's tiles


@dataclass(frozen=True)
class Segments:
    """Where queries and keys of packed rows lie.

    Attributes:
        query_ends: int32 [S + 1], where each segment's queries begin, and the end.
        key_ends: int32 [S + 1], the same of its keys.
        keys: int64 [T_k], the token of each key.
        longest_query: tokens of the longest segment's queries.
        longest_key: the same of its keys.
    """

    query_ends: Tensor
    key_ends: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, lengths: Lengths, device: torch.device) -> Segments:
        """The segments of rows of these lengths; the host waits for nothing."""
        queries: list[int] = []
        sizes: list[int] = []
        keys: list[tuple[int, int]] = []  # where some lie side by side, and how many
        start = 0
        for prompt, first, *further in lengths:
            end = start + prompt + first
            queries.append(prompt + first)
            sizes.append(prompt + first)
            keys.append((start, prompt + first))
            for length in further:
                queries.append(length)
                sizes.append(prompt + length)
                keys += [(start, prompt), (end, length)]
                end += length
            start = end
        return cls(
            _ends(queries, device),
            _ends(sizes, device),
            moved(torch.from_numpy(counted(*np.array(keys).T)), device),
            max(queries),
            max(sizes),
        )


def _ends(sizes: Sequence[int], device: torch.device) -> Tensor:
    return moved(torch.tensor([0, *accumulate(sizes)], dtype=torch.int32), device)


def attend(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None
) -> Tensor:
    """Attention of all segments.

    Args:
        query: [1, H, T, D].
        key: [1, H or fewer, T, D].
        value: as `key`.
        segments: of the packed rows.
        scaling: of the scores; None: D^(−½).

    Returns:
        [1, H, T, D].
    """
    q_THD, k_THD, v_THD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    # Indexed, not `index_select`: the gradient of a key that several segments see is then a sum in
    # one order, not by atomics.
    output_THD = varlen_attn(
        q_THD,
        k_THD[segments.keys],
        v_THD[segments.keys],
        segments.query_ends,
        segments.key_ends,
        segments.longest_query,
        segments.longest_key,
        scale=scaling,
        window_size=_CAUSAL,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output_THD.transpose(0, 1)[None]  # type: ignore[union-attr]  # no aux asked


def usable(query: Tensor, key: Tensor, value: Tensor, dropout: float, by_row: ByRow) -> bool:
    """Whether the kernel computes these tensors, and was seen to do it right on their device.

    Args:
        query: [1, H, T, D].
        key: [1, H or fewer, T, D].
        value: as `key`.
        dropout: of the attention weights, which the kernel does not know.
        by_row: attention row by row, of [1, H, T, D]: what it is compared with, once a process and
            kind of layer.
    """
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in _TOLERANCE
        and not dropout
        and width % 8 == 0
        and width <= _WIDEST
        and value.shape == key.shape
        and _proved(query.device, query.dtype, query.shape[1], key.shape[1], width, by_row)
    )


@cache
def _proved(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int, by_row: ByRow
) -> bool:
    """Whether outputs and gradients are those of attention row by row; a warning where not."""
    try:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < _OLDEST:
            raise NotImplementedError("it needs a device of compute capability 8.0 or more")
        found = differences(device, dtype, heads, key_heads, width, by_row)
    except FOREIGN_ERRORS as error:
        reason = f"it fails ({model_fault(error)})"
    else:
        fits = all(one <= most for one, most in zip(found, _TOLERANCE[dtype], strict=True))
        if fits:
            return True
        reason = f"it is off by {found[0]:.1e}, its gradients by {found[1]:.1e}"
    logger.warning(
        "packed rows take attention row by row, which is slower: torch's kernel of variable "
        "lengths is not used for %d heads of %d in %s on %s, as %s",
        *(heads, width, str(dtype).removeprefix("torch."), device, reason),
    )
    return False


def differences(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int, by_row: ByRow
) -> tuple[float, float]:
    """Largest relative error of a token's output, and of a gradient, on rows of random numbers.

    Args:
        device: to be judged.
        dtype: of query, key and value.
        heads: of queries.
        key_heads: of keys and values, which `heads` is a multiple of.
        width: of a head.
        by_row: what counts as right.
    """
    tokens = sum(map(sum, _PROBED))
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, tokens, width) for count in (heads, key_heads, key_heads, heads)]
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    with torch.inference_mode(mode=False), torch.enable_grad():
        query, key, value, above = (tensor.clone().requires_grad_() for tensor in drawn)
        outputs = (
            attend(query, key, value, Segments.of(_PROBED, device), None),
            by_row(query, key, value, _PROBED, None),
        )
        mine, wanted = (
            torch.autograd.grad(output, (query, key, value), above) for output in outputs
        )
        ours, theirs = (output.detach().float() for output in outputs)
    by_token = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    gradients = [
        float((one.float() - other.float()).norm() / other.float().norm())
        for one, other in zip(mine, wanted, strict=True)
    ]
    return float(by_token.max().nan_to_num(torch.inf)), max(gradients)
