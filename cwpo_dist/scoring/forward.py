"""Rows of token ids in, one number per answer out: token-budget batches through a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cwpo_dist.lm.batches import plan_micro_batches
from cwpo_dist.lm.flops import useful_flops
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.lm.rows import Row, collate, planned_length

Module = AnswerLogProbs | AnswerScores


@dataclass(frozen=True)
class Forwarded:
    """What one pass gives.

    Attributes:
        values: [rows, answers], in the order of the rows.
        counts: `tokens`, `padded_tokens` (pads included) and useful `flops`; they depend on the
            rows alone.
    """

    values: list[list[float]]
    counts: dict[str, int]


class RowForward:
    """A model that is applied to rows in token-budget batches, without gradients."""

    def __init__(self, module: Module, pad_id: int, max_length: int, max_tokens: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module = module.to(self.device).eval()
        self.pad_id, self.max_tokens = pad_id, max_tokens
        self.layout = choose_layout(self.module, longest=max_length).layout
        self.flops = useful_flops(self.module)

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row]) -> Forwarded:
        """One number for each answer."""
        lengths = [planned_length(row, self.layout) for row in rows]
        (plan,) = plan_micro_batches(lengths, self.max_tokens, 1, self.layout)
        outputs, padded_tokens = [], 0
        for micro in filter(None, plan):
            batch = collate([rows[i] for i in micro], self.layout, self.pad_id)
            outputs.append(self.module(batch.to(self.device)).float())
            padded_tokens += batch.padded_tokens
        # Read back once: a device computes on while the next batch is laid out.
        found = torch.cat(outputs).cpu().tolist() if outputs else []
        order = [i for micro in plan for i in micro]
        by_row = dict(zip(order, found, strict=True))
        counts = {
            "tokens": sum(row.n_tokens for row in rows),
            "padded_tokens": padded_tokens,
            "flops": int(self.flops.forward(rows)),
        }
        return Forwarded([by_row[i] for i in range(len(rows))], counts)
