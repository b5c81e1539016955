"""Rows of token ids in, one number per answer out: token-budget batches through a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cwpo_dist.lm.batches import plan_micro_batches
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.lm.rows import Row, collate, planned_length

Module = AnswerLogProbs | AnswerScores


class RowForward:
    """Rows in, one number per answer out: token-budget batches through a module, no gradients."""

    def __init__(self, module: Module, pad_id: int, max_length: int, max_tokens: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module = module.to(self.device).eval()
        self.pad_id, self.max_tokens = pad_id, max_tokens
        self.layout = choose_layout(self.module, longest=max_length).layout

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row]) -> list[list[float]]:
        """Values [len(rows), answers] in the order of the rows."""
        lengths = [planned_length(row, self.layout) for row in rows]
        values: list[list[float]] = [[] for _ in rows]
        for micro in plan_micro_batches(lengths, self.max_tokens, 1, self.layout)[0]:
            if not micro:
                continue
            batch = collate([rows[i] for i in micro], self.layout, self.pad_id)
            output = self.module(batch.to(self.device)).float().cpu().tolist()
            for i, value in zip(micro, output, strict=True):
                values[i] = value
        return values
