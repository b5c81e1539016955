"""A model and rows in; the floating-point operations that they need, and not one that they waste.

Useful FLOPs count each matrix product of a forward pass once, for tokens that are no pads: two a
weight and token, and for attention four a width and allowed (query, key) pair. Look-ups, norms and
activations count nothing, and a prompt counts once a row, however often it is computed. Of a
mixture of experts those count that a token is sent to. A decoder that names no heads, as state
spaces do, counts no attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from cwpo_dist.lm.foreign import whole_number
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores, decoder_of, unwrapped, whole_shape
from cwpo_dist.lm.rows import Row

# What configurations call the experts of a token.
_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # a weight of three dimensions, and no experts


@dataclass(frozen=True)
class UsefulFlops:
    """What one forward pass costs.

    Attributes:
        weights: of the decoder's matrix products; each token meets all of them.
        attention_width: heads × width of a head × layers.
        head_weights: of the output head.
        head_reads_answers: the head reads all answer tokens that count, and not one an answer.
    """

    weights: int
    attention_width: int
    head_weights: int
    head_reads_answers: bool

    def forward(self, rows: Sequence[Row]) -> float:
        """Useful FLOPs of one forward pass over the rows; backward costs twice as much again."""
        return float(sum(self._row(row) for row in rows))

    def _row(self, row: Row) -> int:
        prompt, answers = len(row.prompt), [len(answer) for answer in row.answers]
        seen = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in answers)
        read = sum(row.n_scored) if self.head_reads_answers else len(answers)
        return (
            2 * self.weights * row.n_tokens
            + 4 * self.attention_width * seen
            + 2 * self.head_weights * read
        )


def useful_flops(module: AnswerLogProbs | AnswerScores) -> UsefulFlops:
    """Reads the sizes off a module, also one that ZeRO-3 has sharded."""
    core = unwrapped(module.model)
    config = core.config.get_text_config()
    log_probs = isinstance(module, AnswerLogProbs)
    head = core.get_output_embeddings() if log_probs else getattr(core, "score", None)
    return UsefulFlops(
        weights=matmul_weights(decoder_of(core), config),
        attention_width=_attention_width(config),
        head_weights=matmul_weights(head, config) if head is not None else 0,
        head_reads_answers=log_probs,
    )


def matmul_weights(module: nn.Module, config: PretrainedConfig) -> int:
    """The weights that a token is multiplied with: of linear layers, and of its own experts.

    Args:
        module: a decoder, or a head.
        config: of its text model, which says how many experts a token is sent to.
    """
    chosen = next((n for name in _EXPERTS if (n := whole_number(config, name))), 0)
    weights = 0.0
    for part in module.modules():
        if isinstance(part, nn.Linear | Conv1D):
            weights += prod(whole_shape(part.weight))
        elif not isinstance(part, _CONVOLUTIONS):
            for fused in part.parameters(recurse=False):  # [experts, …]
                shape = whole_shape(fused)
                if len(shape) == 3:
                    weights += prod(shape) * min(1.0, (chosen or shape[0]) / shape[0])
    return round(weights)


def head_width(config: object) -> int:
    """Of one attention head; 0 for a model that names none."""
    heads = whole_number(config, "num_attention_heads")
    if not heads:
        return 0
    return whole_number(config, "head_dim") or whole_number(config, "hidden_size") // heads


def _attention_width(config: PretrainedConfig) -> int:
    heads = whole_number(config, "num_attention_heads")
    return heads * head_width(config) * whole_number(config, "num_hidden_layers")
