"""A model and rows in; the floating-point operations that they need, and not one that they waste.

Useful FLOPs count each matrix product of a forward pass once, for tokens that are no pads: two a
weight and token, and for attention four a width and allowed (query, key) pair. Look-ups, norms and
activations count nothing, and a prompt counts once a row, however often it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores, unwrapped
from cwpo_dist.lm.rows import Row


@dataclass(frozen=True)
class UsefulFlops:
    """What one forward pass costs.

    Attributes:
        weights: of the decoder's matrix products; each token meets all of them.
        attention_width: heads × width of a head × layers.
        head_weights: of the output head.
        head_reads_answers: the head reads every answer token, and not one token an answer.
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
        read = sum(answers) if self.head_reads_answers else len(answers)
        return (
            2 * self.weights * row.n_tokens
            + 4 * self.attention_width * seen
            + 2 * self.head_weights * read
        )


def useful_flops(module: AnswerLogProbs | AnswerScores) -> UsefulFlops:
    """Reads the sizes off a module, also one that ZeRO-3 has sharded."""
    core = unwrapped(module.model)
    config = core.config.get_text_config()
    heads, layers = int(config.num_attention_heads), int(config.num_hidden_layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    log_probs = isinstance(module, AnswerLogProbs)
    head = core.get_output_embeddings() if log_probs else getattr(core, "score", None)
    return UsefulFlops(
        weights=_matmul_weights(core.base_model),
        attention_width=heads * int(head_dim) * layers,
        head_weights=_matmul_weights(head) if head is not None else 0,
        head_reads_answers=log_probs,
    )


def _matmul_weights(module: Any) -> int:
    products = (m for m in module.modules() if isinstance(m, nn.Linear | Conv1D))
    return sum(int(getattr(m.weight, "ds_numel", m.weight.numel())) for m in products)
