"""Rows of token ids in, one number per answer out: token-budget batches through a model.

Shapes: A answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, islice
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from cwpo_dist.lm.batches import plan_micro_batches
from cwpo_dist.lm.feeding import ahead
from cwpo_dist.lm.flops import useful_flops
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores, refuse_one_by_one
from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.lm.rows import Row, RowBatch, collate, cut, planned_length

Module = AnswerLogProbs | AnswerScores
Number = Any  # of an answer: a float, or of several heads a list of them
_Told = TypeVar("_Told")


@dataclass(frozen=True)
class Forwarded:
    """What one pass gives.

    Attributes:
        values: of each row's answers, in their order; of several heads a list for each.
        counts: `tokens`, those of prompts that were repeated among them; `padded_tokens` (pads
            included); and useful `flops`, which count a prompt once. They depend on the rows alone.
    """

    values: list[list[Number]]
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
        """One number an answer [A]; called equally often on all ranks."""
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

    A row that exceeds the budget is cut into rows that repeat its prompt. Batches depend on the
    rows alone, also where several ranks share them.
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
        if ranks is not None:
            refuse_one_by_one(self.module)
        # A dense mask computes what it hides, so that such a row must not be long: as a pair's.
        self.longest = max_tokens if self.layout != "shared" else min(max_tokens, 2 * max_length)
        self.flops = useful_flops(self.module)

    def __call__(self, rows: Sequence[Row]) -> Forwarded:
        """One number for each answer."""
        pieces = [piece for row in rows for piece in cut(row, self.longest, self.layout)]
        plan = self._plan(pieces)
        apply = self._alone if self.ranks is None else partial(self._together, self.ranks)
        found, padded_tokens = apply([[pieces[i] for i in micro] for micro in plan])
        order = list(chain.from_iterable(plan))
        by_piece = dict(zip(order, _by_row(found, [pieces[i] for i in order]), strict=True))
        counts = {
            "tokens": sum(piece.n_tokens for piece in pieces),
            "padded_tokens": padded_tokens,
            "flops": int(self.flops.forward(rows)),
        }
        in_order = chain.from_iterable(by_piece[i] for i in range(len(pieces)))
        return Forwarded(_by_row(in_order, rows), counts)

    def _plan(self, rows: list[Row]) -> list[list[int]]:
        lengths = [planned_length(row, self.layout) for row in rows]
        counts = [len(row.answers) for row in rows] if self.layout == "plain" else None
        (plan,) = plan_micro_batches(lengths, self.max_tokens, 1, self.layout, counts)
        return [micro for micro in plan if micro]

    def _alone(self, batches: list[list[Row]]) -> tuple[list[Number], int]:
        outputs, padded_tokens = [], 0
        for laid_out in ahead(map(self._laid_out, batches)):
            output_A, tokens = self._batch(laid_out)
            outputs.append(output_A)
            padded_tokens += tokens
        # Read back once: a device computes on while the next batch is laid out.
        return torch.cat(outputs).cpu().tolist() if outputs else [], padded_tokens

    def _laid_out(self, rows: list[Row]) -> list[RowBatch]:
        """What the model is called with, one after the other, for rows of one batch."""
        return [collate(rows, self.layout, self.pad_id).pinned(self.device)]

    @torch.inference_mode()
    def _batch(self, laid_out: list[RowBatch]) -> tuple[Tensor, int]:
        """What the model says of one batch of rows, fp32 [A], and its tokens, pads included."""
        outputs = [self.module(batch.to(self.device)).float() for batch in laid_out]
        return torch.cat(outputs), sum(batch.padded_tokens for batch in laid_out)

    def _together(self, ranks: Ranks, batches: list[list[Row]]) -> tuple[list[Number], int]:
        """Batches dealt to ranks in turn; who has none left repeats the last, in vain."""
        if not batches:
            return [], 0
        answers = (sum(len(row.answers) for row in rows) for rows in batches)
        ends = list(accumulate(answers, initial=0))
        padded = torch.zeros(1, dtype=torch.int64, device=self.device)
        own = range(ranks.rank, len(batches) + ranks.rank, ranks.world_size)
        dealt = [batches[min(number, len(batches) - 1)] for number in own]
        for number, (batch,) in zip(own, ahead(map(self._laid_out, dealt)), strict=True):
            output_A = ranks.forward(batch)
            if number == ranks.rank:  # which says whether a number is one, or several heads'
                values_A = output_A.new_zeros(ends[-1], *output_A.shape[1:])
            if number < len(batches):
                values_A[ends[number] : ends[number + 1]] = output_A
                padded += batch.padded_tokens
        found: list[Number] = ranks.total(values_A).cpu().tolist()
        return found, int(ranks.total(padded))


def _by_row(values: Iterable[Number], rows: Iterable[Row]) -> list[list[Number]]:
    """One number an answer, in the order of the rows, as a list of each row's."""
    left = iter(values)
    return [list(islice(left, len(row.answers))) for row in rows]
