"""Pairs of a global batch in; one rank's micro-batches out, with each answer of a part once.

Pairs of a prompt that meet in a global batch are a part of it, which is computed at once: an answer
that stands in several of them goes through the model once, and its gradient is the sum of what they
ask of it. They are several parts where limits or the number of ranks ask for it; and without others
of its prompt a pair is a part by itself.

Shapes: P = pairs of a micro-batch, K = answers a pair, A = answers of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cwpo_dist.lm.batches import plan_micro_batches
from cwpo_dist.lm.feeding import ahead, moved
from cwpo_dist.lm.rows import Layout, Row, RowBatch, collate
from cwpo_dist.lm.sequence import ALONE, SequenceGroup
from cwpo_dist.lm.sharing import SharedRows, unshared
from cwpo_dist.pairs.records import prompt_of
from cwpo_dist.training.tasks import Indices, Task

if TYPE_CHECKING:
    from cwpo_dist.training.loop import Engine, Run


@dataclass(frozen=True)
class Limits:
    """What bounds a micro-batch.

    Attributes:
        layout: how its rows are laid out.
        max_tokens: of it, with any padding.
        longest: tokens of a row that several pairs share: a dense mask computes what it hides.
    """

    layout: Layout
    max_tokens: int
    longest: float = math.inf

    def length(self, rows: Sequence[Row]) -> tuple[int, int]:
        """By which rows are planned that stay together, and how many sequences that length is."""
        if self.layout == "packed":
            return sum(row.n_tokens for row in rows), 1
        if self.layout == "shared":
            return len(rows) * max(row.n_tokens for row in rows), len(rows)
        sequences = sum(len(row.answers) for row in rows)
        return sequences * max(row.n_longest for row in rows), sequences

    def allow(self, rows: Sequence[Row]) -> bool:
        """Whether they may be computed at once, for several pairs."""
        longest = max(row.n_tokens for row in rows)
        return self.length(rows)[0] <= self.max_tokens and longest <= self.longest


@dataclass(frozen=True)
class Part:
    """Pairs of one prompt, or of several parts, and the rows that hold their answers.

    Attributes:
        pairs: the position of each in the global batch, and its own row.
        rows: with any number of answers.
        places: of each pair, those of its answers among the answers of all rows.
    """

    pairs: list[tuple[int, Row]]
    rows: list[Row]
    places: list[list[int]]

    @classmethod
    def of(cls, pairs: list[tuple[int, Row]]) -> Part:
        """The answers of these pairs, each once."""
        if len(pairs) == 1:
            ((_, row),) = pairs
            return cls(pairs, [row], [list(range(len(row.answers)))])
        answers = [unshared(row) for _, row in pairs]
        shared = SharedRows.of([("", answer) for answer in chain.from_iterable(answers)])
        places = iter(shared.places)
        return cls(pairs, shared.rows, [[next(places) for _ in each] for each in answers])

    @classmethod
    def joined(cls, parts: Sequence[Part]) -> Part:
        """The same pairs and rows in one."""
        answers = (sum(len(row.answers) for row in part.rows) for part in parts)
        starts = accumulate(answers, initial=0)
        each = zip(parts, starts, strict=False)  # the last start is the end
        return cls(
            pairs=list(chain.from_iterable(part.pairs for part in parts)),
            rows=list(chain.from_iterable(part.rows for part in parts)),
            places=[[at + k for k in pair] for part, at in each for pair in part.places],
        )

    def halves(self) -> tuple[Part, Part]:
        """The same pairs in two parts, the first of them with few different answers."""
        order = sorted(range(len(self.pairs)), key=lambda i: sorted(self.places[i], reverse=True))
        pairs, half = [self.pairs[i] for i in order], (len(order) + 1) // 2
        return Part.of(pairs[:half]), Part.of(pairs[half:])

    def within(self, limits: Limits) -> list[Part]:
        """Itself, or as many as it takes for each to be within the limits or a pair alone."""
        if len(self.pairs) == 1 or limits.allow(self.rows):
            return [self]
        return [part for half in self.halves() for part in half.within(limits)]


@dataclass(frozen=True)
class MicroBatch:
    """One micro-step of one rank.

    Attributes:
        number: from 0 in each step.
        positions: of its pairs in the global batch.
        places_PK: of their answers among those of the batch.
        batch: the rows that hold them, or this rank's part of them.
        weight: 0 marks a pad.
        told: whether this rank tells the others what comes out: one of those that share it does.
        last: of the step.
        over_budget: whether a rank has a pair in it that alone exceeds the budget of tokens.
        step_rows: those of all ranks' micro-batches of the global batch.
    """

    number: int
    positions: list[int]
    places_PK: Tensor
    batch: RowBatch
    weight: float
    told: bool
    last: bool
    over_budget: bool
    step_rows: list[Row]

    def by_pair(self, numbers_A: Tensor) -> Tensor:
        """One number an answer as [P, K]; an answer's gradient is the sum over its pairs."""
        return numbers_A[moved(self.places_PK, numbers_A.device)]

    def tell(self, output_PK: Tensor, outputs_PK: Tensor) -> None:
        """Puts its outputs among those of the global batch, where this rank is to tell them."""
        if self.told:
            places_P = moved(torch.tensor(self.positions), outputs_PK.device)
            outputs_PK.index_copy_(0, places_P, output_PK.detach().to(outputs_PK.dtype))


def parts_of(task: Task, indices: Indices, limits: Limits, world_size: int) -> list[Part]:
    """A global batch, part by part; the same on all ranks.

    Args:
        task: whose rows they are.
        indices: rows of the global batch.
        limits: of a micro-batch.
        world_size: ranks, those that share a sequence as one; there are as many parts at least,
            where the pairs suffice.
    """
    by_prompt: dict[str, list[tuple[int, Row]]] = {}
    for position, i in enumerate(indices):
        by_prompt.setdefault(prompt_of(task.pair_ids[i]), []).append((position, task.rows[i]))
    parts = [part for pairs in by_prompt.values() for part in Part.of(pairs).within(limits)]
    while len(parts) < min(world_size, len(indices)):  # else ranks would have nothing to do
        largest = max(range(len(parts)), key=lambda i: len(parts[i].pairs))
        parts[largest : largest + 1] = parts[largest].halves()
    return parts


def fed(
    task: Task, engine: Engine, run: Run, batches: Iterable[Indices], passes: int = 1
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of global batches, laid out while the device is at those before.

    Args:
        task: whose rows they are.
        engine: of this rank.
        run: limits and pad.
        batches: rows of each global batch.
        passes: how often each is gone through.

    Returns:
        As many as every other rank has.
    """
    ranks, group = (engine.rank, engine.world_size), engine.sequence

    def laid_out() -> Iterator[MicroBatch]:
        for indices in batches:
            parts = parts_of(task, indices, run.limits, engine.world_size // group.size)
            for _ in range(passes):
                for micro in micro_batches(parts, run.limits, *ranks, run.pad_id, group):
                    yield replace(micro, batch=micro.batch.pinned(engine.device))

    return ahead(laid_out())


def next_pass(feed: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """What of it comes up to the end of a pass through a global batch."""
    for micro in feed:
        yield micro
        if micro.last:
            return


def micro_batches(
    parts: Sequence[Part],
    limits: Limits,
    rank: int,
    world_size: int,
    pad_id: int,
    sequence: SequenceGroup = ALONE,
) -> Iterator[MicroBatch]:
    """A rank's micro-batches of a global batch: as many as every other rank has.

    Args:
        parts: of the global batch.
        limits: of a micro-batch.
        rank: whose they are.
        world_size: of how many.
        pad_id: the tokenizer's.
        sequence: the ranks that share this one's micro-batches.
    """
    rank, world_size = rank // sequence.size, world_size // sequence.size
    lengths, sequences = zip(*(limits.length(part.rows) for part in parts), strict=True)
    plans = plan_micro_batches(lengths, limits.max_tokens, world_size, limits.layout, sequences)
    shortest = min(range(len(parts)), key=lengths.__getitem__)
    step_rows = [row for part in parts for row in part.rows]
    for number, chosen in enumerate(plans[rank]):
        part = Part.joined([parts[i] for i in chosen or [shortest]])
        longest = max(lengths[i] for plan in plans for i in plan[number])
        yield MicroBatch(
            number=number,
            positions=[position for position, _ in part.pairs],
            places_PK=torch.tensor(part.places),
            batch=sequence.part(collate(part.rows, limits.layout, pad_id)),
            weight=1.0 if chosen else 0.0,
            told=bool(chosen) and sequence.rank == 0,
            last=number == len(plans[0]) - 1,
            over_budget=longest > limits.max_tokens,
            step_rows=step_rows,
        )
