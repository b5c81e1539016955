"""A model's output embeddings in; a module from hidden states to the log-probs of tokens out.

Shapes: N tokens, n tokens of a chunk, H width, V words.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from cwpo_dist.lm.vocabulary import vocabulary_log_probs

# Floats of one chunk of logits, for heads that are more than a matrix: 64 MiB in fp32.
_CHUNK_LOGITS = 2**24
# What configurations call the bound of logits, c·tanh(logits / c).
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class ChunkedHead(nn.Module):
    """Hidden states of answer tokens → the log-probs of those tokens, a piece of logits at a time.

    A head that is one matrix goes through `vocabulary_log_probs`, by blocks of the vocabulary.
    Others (biased, with LoRA inside, soft-capped, quantised) go by chunks of tokens, and make their
    logits a second time for the backward pass.

    The head's parameters are registered here too, as the same objects, so ZeRO-3 gathers them when
    this module starts and holds them until it ends: one gather for all chunks, in forward and in
    backward. Chunks skip the hooks of the head's own module, as ZeRO-3 demands that all ranks call
    the same modules equally often, and ranks differ in their chunks. So no leaf module is needed.
    """

    def __init__(self, lm_head: nn.Module, config: PretrainedConfig):
        """Takes the model's output embeddings, and what its config does to logits after them."""
        super().__init__()
        self._lm_head = (lm_head,)  # a tuple: the sub-module stays registered with its model alone
        for name, parameter in lm_head.named_parameters():
            self.register_parameter(name.replace(".", "_"), parameter)
        caps = (getattr(config, name, None) for name in _SOFTCAPS)
        self.softcap: float | None = next((cap for cap in caps if cap is not None), None)
        self.scale = _logit_scale(config)
        self.chunk_size = max(64, _CHUNK_LOGITS // int(config.vocab_size))
        self.in_place = False  # see `accumulate_in_place`
        is_matrix = type(lm_head) is nn.Linear and lm_head.bias is None
        self.is_matrix = is_matrix and self.softcap is None

    def forward(self, hidden_NH: Tensor, target_N: Tensor, *, squares: bool = False) -> Tensor:
        """Log-prob of each target, in nats, fp32 [N]; with squares [N, 2], and log Σ_v p_v²."""
        if self.is_matrix:
            scaled_NH = hidden_NH if self.scale == 1.0 else hidden_NH * self.scale
            weight_VH = self._lm_head[0].weight
            assert isinstance(weight_VH, Tensor)
            return vocabulary_log_probs(
                scaled_NH, weight_VH, target_N, in_place=self.in_place, squares=squares
            )
        size = self.chunk_size
        chunks = zip(torch.split(hidden_NH, size), torch.split(target_N, size), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([self._logps(*chunk, squares) for chunk in chunks])
        found = [checkpoint(self._logps, *chunk, squares, use_reentrant=False) for chunk in chunks]
        return torch.cat(found)

    def _logps(self, hidden_nH: Tensor, target_n: Tensor, squares: bool) -> Tensor:
        logits_nV = self._lm_head[0].forward(hidden_nH).float()
        if self.scale != 1.0:
            logits_nV = logits_nV * self.scale
        if self.softcap is not None:
            logits_nV = torch.tanh(logits_nV / self.softcap) * self.softcap
        log_probs_n = -nn.functional.cross_entropy(logits_nV, target_n, reduction="none")
        if not squares:
            return log_probs_n
        squares_n = torch.logsumexp(2 * logits_nV.detach().log_softmax(1), dim=1)
        return torch.stack([log_probs_n, squares_n], dim=1)


def _logit_scale(config: PretrainedConfig) -> float:
    """Cohere multiplies its logits by `logit_scale`, Granite divides by `logits_scaling`.

    Others have other names: what these do not explain, the probe measures.
    """
    return float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
