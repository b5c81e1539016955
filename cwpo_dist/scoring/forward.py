"""Rows of token ids in, one number per answer out: token-budget batches through a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from cwpo_dist.lm.batches import plan_micro_batches
from cwpo_dist.lm.flops import useful_flops
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.lm.rows import Row, RowBatch, collate, planned_length

Module = AnswerLogProbs | AnswerScores
_Told = TypeVar("_Told")


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


class Ranks(Protocol):
    """Processes that apply one sharded model together, each to its share of the batches.

    Attributes:
        device: where batches go.
        rank: of this process.
        world_size: how many there are.
    """

    device: torch.device
    rank: int
    world_size: int

    @property
    def module(self) -> Module:
        """The model, to be called through `forward`."""
        ...

    def forward(self, batch: RowBatch) -> Tensor:
        """One number an answer [P, K]; called equally often on all ranks."""
        ...

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over ranks."""
        ...

    def agreed(self, value: _Told) -> _Told:
        """What rank 0 has, on all ranks."""
        ...

    def check_stop(self) -> None:
        """Raises, on all ranks, when one was told to stop."""
        ...


class RowForward:
    """A model that is applied to rows in token-budget batches, without gradients.

    Batches depend on the rows alone, also where several ranks share them.
    """

    def __init__(
        self,
        module: Module,
        pad_id: int,
        max_length: int,
        max_tokens: int,
        ranks: Ranks | None = None,
    ) -> None:
        """Takes the module where its loader placed it, or the ranks that hold it together."""
        self.ranks = ranks
        if ranks is None:
            self.device, self.module = next(module.parameters()).device, module.eval()
        else:
            self.device, self.module = ranks.device, module
        self.pad_id, self.max_tokens = pad_id, max_tokens
        self.layout = choose_layout(self.module, longest=max_length).layout
        self.flops = useful_flops(self.module)

    def __call__(self, rows: Sequence[Row]) -> Forwarded:
        """One number for each answer."""
        plan = self._plan([planned_length(row, self.layout) for row in rows])
        apply = self._alone if self.ranks is None else partial(self._together, self.ranks)
        values, padded_tokens = apply([micro for micro in plan if micro], rows)
        counts = {
            "tokens": sum(row.n_tokens for row in rows),
            "padded_tokens": padded_tokens,
            "flops": int(self.flops.forward(rows)),
        }
        return Forwarded(values, counts)

    def _plan(self, lengths: list[int]) -> list[list[int]]:
        (plan,) = plan_micro_batches(lengths, self.max_tokens, 1, self.layout)
        return plan

    def _alone(self, plan: list[list[int]], rows: Sequence[Row]) -> tuple[list[list[float]], int]:
        outputs, padded_tokens = [], 0
        for micro in plan:
            output_PK, tokens = self._batch([rows[i] for i in micro])
            outputs.append(output_PK)
            padded_tokens += tokens
        # Read back once: a device computes on while the next batch is laid out.
        found = torch.cat(outputs).cpu().tolist() if outputs else []
        order = [i for micro in plan for i in micro]
        by_row = dict(zip(order, found, strict=True))
        return [by_row[i] for i in range(len(rows))], padded_tokens

    @torch.inference_mode()
    def _batch(self, rows: list[Row]) -> tuple[Tensor, int]:
        """What the model says of one batch of rows, fp32 [P, K], and its tokens, pads included."""
        batch = collate(rows, self.layout, self.pad_id)
        return self.module(batch.to(self.device)).float(), batch.padded_tokens

    def _together(
        self, ranks: Ranks, plan: list[list[int]], rows: Sequence[Row]
    ) -> tuple[list[list[float]], int]:
        """Batches dealt to ranks in turn; who has none left repeats the last, in vain."""
        if not plan:
            return [], 0
        values_RK = torch.zeros(len(rows), len(rows[0].answers), device=self.device)
        padded = torch.zeros(1, dtype=torch.int64, device=self.device)
        for first in range(0, len(plan), ranks.world_size):
            number = first + ranks.rank
            micro = plan[min(number, len(plan) - 1)]
            batch = collate([rows[i] for i in micro], self.layout, self.pad_id)
            output_PK = ranks.forward(batch)
            if number < len(plan):
                values_RK[micro] = output_PK
                padded += batch.padded_tokens
        found: list[list[float]] = ranks.total(values_RK).cpu().tolist()
        return found, int(ranks.total(padded))
