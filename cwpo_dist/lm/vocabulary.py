"""Hidden states and a vocabulary's matrix in, log-probs of target tokens out, block by block.

For a small model the vocabulary is most of the work, so its products run once: forward one,
backward two, on blocks of words that stay in cache. With e = exp(z − m) for the logits z of a block
and their maximum m over it, but 0 for the target t, token by token,

    R = log Σ_blocks exp(m) Σ_v e_v,    log p = z_t − log(exp(z_t) + exp(R)) = log σ(z_t − R),
    ∂ log p / ∂z_t = 1 − p = σ(R − z_t),    ∂ log p / ∂z_v = −e_v · exp(m) · p / exp(z_t),

so all that the backward pass needs of a block is e, and one factor a token, which goes into the
smaller side of each product: no pass over logits is left. As the target stands apart, neither log p
nor 1 − p is a difference of near numbers where p is near 1. Blocks are kept up to a bound, and made
again beyond it.

Asked for Σ_v p_v², the forward pass sums e² of each block, too: log Σ_v p_v² is that of
exp(2·log p) + Σ_blocks (exp(m) · |e|)² / Z², with Z = exp(z_t) + exp(R). It has no gradient.

Logits are fp32 whatever the dtype of the model: rounded to bf16 they cost 0.03 nats a token, and
log p > 0 comes out of two roundings that differ.

Shapes: N tokens, H width, V words, v words of a block, B blocks.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

# Words of a block: on CPU a few hundred tokens' logits stay in cache; CUDA wants fewer, larger
# products (not yet run there).
_BLOCK_WORDS = {"cpu": 2048, "cuda": 16384}
# Numbers that are kept for the backward pass, at most: 64 MiB in fp32. More are made again.
KEPT_NUMBERS = 2**24


def vocabulary_log_probs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    *,
    in_place: bool = False,
    squares: bool = False,
) -> Tensor:
    """Log-softmax of hidden · weightᵀ at the targets.

    Args:
        hidden_NH: fp32 or bf16, already scaled as the model scales its logits.
        weight_VH: output embeddings, of the same dtype.
        target_N: int64.
        in_place: the backward pass adds the weight's gradient to `weight.grad` itself, and hands
            autograd none: no second matrix of that size, but hooks on the gradient see nothing.
        squares: beside the log-probs, without a gradient, log Σ_v p_v² of all words v.

    Returns:
        fp32 [N], in nats; with squares [N, 2].
    """
    room = KEPT_NUMBERS if torch.is_grad_enabled() else 0
    found: tuple[Tensor, Tensor | None] = _VocabularyLogProbs.apply(  # type: ignore[no-untyped-call]  # of torch
        hidden_NH, weight_VH, target_N, room, in_place, squares
    )
    log_probs_N, squares_N = found
    return log_probs_N if squares_N is None else torch.stack([log_probs_N, squares_N], dim=1)


class _Context(Protocol):
    """What the forward pass leaves to the backward pass: torch's own fields, and two of ours."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    kept: list[Tensor | None]
    in_place: bool

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


class _VocabularyLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        target_N: Tensor,
        room: int,
        in_place: bool,
        squares: bool,
    ) -> tuple[Tensor, Tensor | None]:
        target_N1 = hidden_NH.new_zeros(len(hidden_NH), 1, dtype=torch.float32)
        maxima, sums, norms, kept, start = [], [], [], [], 0
        for weight_vH in weight_VH.split(_BLOCK_WORDS[weight_VH.device.type]):
            logits_Nv = fp32_product(hidden_NH, weight_vH)
            target_N1 += _targets_in(logits_Nv, target_N, start)
            maxima.append(logits_Nv.amax(1, keepdim=True))
            exponentials_Nv = _others(logits_Nv, maxima[-1], target_N, start)
            sums.append(exponentials_Nv.sum(1, keepdim=True))
            if squares:
                norms.append(torch.linalg.vector_norm(exponentials_Nv, dim=1, keepdim=True))
            room -= exponentials_Nv.numel()
            kept.append(exponentials_Nv.to(weight_VH.dtype) if room >= 0 else None)
            start += len(weight_vH)
        maximum_NB = torch.cat(maxima, dim=1)
        others_N1 = torch.logsumexp(maximum_NB + torch.cat(sums, dim=1).log(), 1, keepdim=True)
        ctx.save_for_backward(hidden_NH, weight_VH, target_N, maximum_NB, target_N1, others_N1)
        ctx.kept, ctx.in_place = kept, in_place
        log_probs_N1 = logsigmoid(target_N1 - others_N1)
        if not squares:
            return log_probs_N1[:, 0], None
        total_N1 = torch.logaddexp(target_N1, others_N1)
        norm_NB = maximum_NB + torch.cat(norms, dim=1).log() - total_N1
        squares_N = torch.logsumexp(2 * torch.cat([log_probs_N1, norm_NB], dim=1), 1)
        ctx.mark_non_differentiable(squares_N)
        return log_probs_N1[:, 0], squares_N

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_N: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, target_N, maximum_NB, target_N1, others_N1 = ctx.saved_tensors
        blocks = weight_VH.split(_BLOCK_WORDS[weight_VH.device.type])
        total_N1 = torch.logaddexp(target_N1, others_N1)
        factor_NB = (maximum_NB - total_N1).exp() * -grad_N[:, None]  # ∂loss/∂z = e · factor …
        grad_N1 = torch.sigmoid(others_N1 - target_N1) * grad_N[:, None]  # … but for the targets
        grad_hidden_NH = weight_VH[target_N] * grad_N1  # fp32 until all blocks are in it
        grad_weight_VH, fresh = _weight_gradient(weight_VH, ctx)
        start = 0
        for number, weight_vH in enumerate(blocks):
            exponentials_Nv, ctx.kept[number] = ctx.kept[number], None  # frees as it goes
            if exponentials_Nv is None:
                logits_Nv = fp32_product(hidden_NH, weight_vH)
                maximum_N1 = maximum_NB[:, number : number + 1]
                exponentials_Nv = _others(logits_Nv, maximum_N1, target_N, start)
                exponentials_Nv = exponentials_Nv.to(weight_VH.dtype)
            factor_N1 = factor_NB[:, number : number + 1]
            grad_hidden_NH.addcmul_(exponentials_Nv @ weight_vH, factor_N1)
            if grad_weight_VH is not None:
                block_vH = grad_weight_VH[start : start + len(weight_vH)]
                scaled_NH = (hidden_NH * factor_N1).to(weight_VH.dtype)
                # With beta 0 what lies in fresh memory is not read, even where it is NaN.
                block_vH.addmm_(exponentials_Nv.T, scaled_NH, beta=0 if fresh else 1)
            start += len(weight_vH)
        if grad_weight_VH is not None:  # targets, whose e is 0 above; one word may be several
            grad_weight_VH.index_add_(0, target_N, (hidden_NH * grad_N1).to(weight_VH.dtype))
        return (
            grad_hidden_NH.to(hidden_NH.dtype),
            None if ctx.in_place else grad_weight_VH,
            None,
            None,
            None,
            None,
        )


def _weight_gradient(weight_VH: Tensor, ctx: _Context) -> tuple[Tensor | None, bool]:
    """Where the weight's gradient goes, and whether that memory holds nothing yet.

    In place it is the parameter's own `grad`. Autograd would be handed a matrix as large as the
    embeddings in every micro-step, only to add it to `grad` and drop it. ZeRO-1 to -3 learn of a
    gradient by hooks, which then see nothing, so it is asked for only where there are none
    (`accumulate_in_place`).
    """
    if not ctx.needs_input_grad[1]:
        return None, True
    if not ctx.in_place:
        return torch.empty_like(weight_VH), True
    fresh = weight_VH.grad is None
    if fresh:
        weight_VH.grad = torch.empty_like(weight_VH)
    return weight_VH.grad, fresh


def fp32_product(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
    """Logits, fp32 [N, V]: the sums that a product makes in fp32 anyway, not rounded."""
    if hidden_NH.dtype == torch.float32:
        return hidden_NH @ weight_VH.T
    if hidden_NH.is_cuda:
        return torch.mm(hidden_NH, weight_VH.T, out_dtype=torch.float32)
    return hidden_NH.float() @ weight_VH.float().T  # products of bf16 numbers are exact in fp32


def _targets_in(logits_Nv: Tensor, target_N: Tensor, start: int) -> Tensor:
    """The targets' logits [N, 1] where the block, from word `start` on, has them; else 0."""
    place_N1, inside_N1 = _places(target_N, start, logits_Nv.shape[1])
    return torch.where(inside_N1, logits_Nv.gather(1, place_N1), 0.0)


def _others(logits_Nv: Tensor, maximum_N1: Tensor, target_N: Tensor, start: int) -> Tensor:
    """exp(z − m), 0 for targets; takes the place of the logits."""
    exponentials_Nv = logits_Nv.sub_(maximum_N1).exp_()
    place_N1, inside_N1 = _places(target_N, start, logits_Nv.shape[1])
    kept_N1 = exponentials_Nv.gather(1, place_N1).masked_fill_(inside_N1, 0.0)
    return exponentials_Nv.scatter_(1, place_N1, kept_N1)


def _places(target_N: Tensor, start: int, words: int) -> tuple[Tensor, Tensor]:
    """Columns of the targets in a block, and whether they are its own; no wait for a device."""
    place_N1 = (target_N - start)[:, None]
    return place_N1.clamp(0, words - 1), (place_N1 >= 0) & (place_N1 < words)
