"""Ranks that share every sequence: each has some of its tokens, and attention some of its heads.

Sequence parallelism as of DeepSpeed Ulysses (arXiv 2309.14509): what a decoder does token by token,
each rank does for its own tokens; around attention two exchanges turn "all heads of some tokens"
into "some heads of all tokens" and back. So activations of a sequence are spread over the ranks.

Of DeepSpeed's own, `UlyssesSPAttentionHF` drops the mask, by which packed rows know where they
begin; `DistributedAttention` knows no fewer key heads than ranks, and gives each rank one stretch
of the sequence. Here tokens are dealt in turn: of stretches, those of the prompt would have nothing
to do at the vocabulary. What is left is one collective, which gloo has too.

Shapes: S ranks, T tokens, n = ⌈T / S⌉ of a rank, H heads of width D, N answer tokens that count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from cwpo_dist.lm.rows import RowBatch


@dataclass(frozen=True)
class SequenceGroup:
    """Ranks that compute each micro-batch together.

    Attributes:
        size: how many they are.
        rank: this one's number among them.
        handle: torch's process group of them; None for a rank by itself.
    """

    size: int = 1
    rank: int = 0
    handle: dist.ProcessGroup | None = None

    @classmethod
    def joined(cls, size: int, timeout: timedelta) -> SequenceGroup:
        """The group of this rank, of so many neighbours; a collective of all ranks."""
        if size == 1:
            return ALONE
        handle, _ = dist.new_subgroups(size, timeout=timeout)
        return cls(size, dist.get_rank(handle), handle)

    def part(self, batch: RowBatch) -> RowBatch:
        """This rank's tokens of a packed batch: every S-th; pads at the end make parts equal."""
        if self.size == 1:
            return batch
        assert batch.layout == "packed", "which the probe of a model has shown"
        tokens = batch.input_ids.shape[1]
        own_N = self.holds(batch.source)
        ids, positions = (
            pad(numbers, (0, -tokens % self.size))[:, self.rank :: self.size].contiguous()
            for numbers in (batch.input_ids, batch.position_ids)
        )
        return replace(
            batch,
            input_ids=ids,
            position_ids=positions,
            source=batch.source[own_N] // self.size,
            target=batch.target[own_N],
            answer=batch.answer[own_N],
            lengths=(len(range(self.rank, tokens, self.size)),),
            padded_tokens=ids.numel(),
            group=self,
        )

    def holds(self, places: Tensor) -> Tensor:
        """Whether this rank has the tokens at these places of the whole sequence."""
        return places % self.size == self.rank

    def own(self, places: Tensor) -> Tensor:
        """Those of these places that this rank has, as places among its own tokens."""
        return places[self.holds(places)] // self.size

    def heads(self, tensor: Tensor, tokens: int) -> Tensor:
        """All heads of own tokens → own heads of all tokens: [1, H, n, D] → [1, H', T, D].

        Fewer heads than ranks, or not a multiple of them (keys and values of grouped queries), are
        repeated until they are; the queries of a head still meet its own.
        """
        if self.size == 1:
            return tensor
        repeats = math.lcm(tensor.shape[1], self.size) // tensor.shape[1]
        each = tensor.repeat_interleave(repeats, dim=1)[0].unflatten(0, (self.size, -1))
        of_all = _Exchanged.apply(each, self.handle)  # type: ignore[no-untyped-call]  # of torch
        return of_all.permute(1, 2, 0, 3).flatten(1, 2)[None, :, :tokens]  # type: ignore[no-any-return]  # of torch

    def tokens(self, tensor: Tensor) -> Tensor:
        """Own heads of all tokens → all heads of own tokens: [1, H', T, D] → [1, H, n, D]."""
        if self.size == 1:
            return tensor
        whole = pad(tensor[0], (0, 0, 0, -tensor.shape[2] % self.size))
        each = whole.unflatten(1, (-1, self.size)).permute(2, 0, 1, 3)
        of_own: Tensor = _Exchanged.apply(each, self.handle)  # type: ignore[no-untyped-call]  # of torch
        return of_own.flatten(0, 1)[None]

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, on each of them.

        Its gradient is that of this rank's own part: every rank has the loss of the sum, and all
        their gradients are summed like those of other batches.
        """
        if self.size == 1:
            return tensor
        total: Tensor = _Summed.apply(tensor, self.handle)  # type: ignore[no-untyped-call]  # of torch
        return total


ALONE = SequenceGroup()


class _Context(Protocol):
    handle: dist.ProcessGroup | None


class _Exchanged(torch.autograd.Function):
    """[S, …], the s-th for rank s → [S, …], the s-th of rank s; its own inverse and transpose."""

    @staticmethod
    def forward(ctx: _Context, parts: Tensor, handle: dist.ProcessGroup | None) -> Tensor:
        ctx.handle = handle
        return _exchanged(parts, handle)

    @staticmethod
    def backward(ctx: _Context, gradients: Tensor) -> tuple[Tensor, None]:
        return _exchanged(gradients, ctx.handle), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: _Context, part: Tensor, handle: dist.ProcessGroup | None) -> Tensor:
        return _total(part, handle)

    @staticmethod
    def backward(_ctx: _Context, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _total(part: Tensor, handle: dist.ProcessGroup | None) -> Tensor:
    total = part.clone()
    dist.all_reduce(total, group=handle)
    return total


def _exchanged(parts: Tensor, handle: dist.ProcessGroup | None) -> Tensor:
    found = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
    dist.all_to_all_single(found, parts.contiguous(), group=handle)
    return found
