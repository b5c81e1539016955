"""Hidden states and a vocabulary's matrix in, log-probs of target tokens out, block by block.

For a small model the vocabulary is most of the work, so its products run once: forward one,
backward two, on blocks of words that stay in cache. With e = exp(z − m) for the logits z of a block
and their maximum m over it, token by token,

    log p = z_target − L,    L = log Σ_blocks exp(m) Σ_v e_v,
    ∂ log p / ∂z_v = [v = target] − e_v · exp(m − L),

so all that the backward pass needs of a block is e, and one factor a token, which goes into the
smaller side of each product: no pass over logits is left. Blocks are kept up to a bound, and made
again beyond it.

Shapes: N tokens, H width, V words, v words of a block, B blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Words of a block: on CPU a few hundred tokens' logits stay in cache; CUDA wants fewer, larger
# products (not yet run there).
_BLOCK_WORDS = {"cpu": 2048, "cuda": 16384}
# Numbers that are kept for the backward pass, at most: 64 MiB in fp32. More are made again.
KEPT_NUMBERS = 2**24


def vocabulary_log_probs(
    hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, *, in_place: bool = False
) -> Tensor:
    """Log-softmax of hidden · weightᵀ at the targets.

    Args:
        hidden_NH: fp32 or bf16, already scaled as the model scales its logits.
        weight_VH: output embeddings, of the same dtype.
        target_N: int64.
        in_place: the backward pass adds the weight's gradient to `weight.grad` itself, and hands
            autograd none: no second matrix of that size, but hooks on the gradient see nothing.

    Returns:
        fp32 [N], in nats.
    """
    keep = KEPT_NUMBERS if torch.is_grad_enabled() else 0
    apply: Any = _VocabularyLogProbs.apply  # untyped in torch
    log_probs_N: Tensor = apply(hidden_NH, weight_VH, target_N, keep, in_place)
    return log_probs_N


class _VocabularyLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        target_N: Tensor,
        keep: int,
        in_place: bool,
    ) -> Tensor:
        target_logits_N = (hidden_NH * weight_VH[target_N]).sum(1, dtype=torch.float32)
        maxima, sums, kept = [], [], []
        for weight_vH in weight_VH.split(_BLOCK_WORDS[weight_VH.device.type]):
            exponentials_Nv, maximum_N1 = _exponentials(hidden_NH, weight_vH, None)
            maxima.append(maximum_N1)
            sums.append(exponentials_Nv.sum(1, keepdim=True))
            keep -= exponentials_Nv.numel()
            kept.append(exponentials_Nv.to(weight_VH.dtype) if keep >= 0 else None)
        maximum_NB = torch.cat(maxima, dim=1)
        total_N1 = torch.logsumexp(maximum_NB + torch.cat(sums, dim=1).log(), 1, keepdim=True)
        ctx.save_for_backward(hidden_NH, weight_VH, target_N, maximum_NB, total_N1)
        ctx.kept, ctx.in_place = kept, in_place
        return target_logits_N - total_N1[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, target_N, maximum_NB, total_N1 = ctx.saved_tensors
        blocks = weight_VH.split(_BLOCK_WORDS[weight_VH.device.type])
        # −∂loss/∂z = e · factor, but for the targets
        factor_NB = ((maximum_NB - total_N1).exp() * -grad_N[:, None]).to(weight_VH.dtype)
        grad_N1 = grad_N[:, None].to(weight_VH.dtype)
        grad_hidden_NH = weight_VH[target_N] * grad_N1
        grad_weight_VH, fresh = _weight_gradient(weight_VH, ctx)
        start = 0
        for number, weight_vH in enumerate(blocks):
            exponentials_Nv, ctx.kept[number] = ctx.kept[number], None  # frees as it goes
            if exponentials_Nv is None:
                maximum_N1 = maximum_NB[:, number : number + 1]
                exponentials_Nv = _exponentials(hidden_NH, weight_vH, maximum_N1)[0]
                exponentials_Nv = exponentials_Nv.to(weight_VH.dtype)
            factor_N1 = factor_NB[:, number : number + 1]
            grad_hidden_NH.addcmul_(exponentials_Nv @ weight_vH, factor_N1)
            if grad_weight_VH is not None:
                block_vH = grad_weight_VH[start : start + len(weight_vH)]
                block_vH.addmm_(exponentials_Nv.T, hidden_NH * factor_N1, beta=0 if fresh else 1)
            start += len(weight_vH)
        if grad_weight_VH is not None:
            grad_weight_VH.index_add_(0, target_N, hidden_NH * grad_N1)
        return grad_hidden_NH, None if ctx.in_place else grad_weight_VH, None, None, None


def _weight_gradient(weight_VH: Tensor, ctx: Any) -> tuple[Tensor | None, bool]:
    """Where the weight's gradient goes, and whether that memory holds nothing yet."""
    if not ctx.needs_input_grad[1]:
        return None, True
    if not ctx.in_place:
        return torch.empty_like(weight_VH), True
    fresh = weight_VH.grad is None
    if fresh:
        weight_VH.grad = torch.empty_like(weight_VH)
    return weight_VH.grad, fresh


def _exponentials(
    hidden_NH: Tensor, weight_vH: Tensor, maximum_N1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """exp(z − m) of a block, fp32 [N, v], and m [N, 1], their maximum if none is given."""
    logits_Nv = (hidden_NH @ weight_vH.T).float()
    if maximum_N1 is None:
        maximum_N1 = logits_Nv.amax(1, keepdim=True)
    return logits_Nv.sub_(maximum_N1).exp_(), maximum_N1
