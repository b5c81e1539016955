"""Numbers of rows and their lengths in, the order of a run and its micro-batches out.

The global batch of a step depends on (seed, epoch, step) alone, never on world size or on how it
is split into micro-batches.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cwpo_dist.config import TrainingConfig
from cwpo_dist.lm.rows import Layout

_UNIT = 2**32  # of a weight of 1, in whole numbers: Σ stays below 2⁶³ for two thousand million rows


def steps_per_epoch(n: int, batch: int) -> int:
    """Global batches in an epoch; the last may be short.

    Raises:
        ValueError: for no rows, or batches of none.
    """
    if n < 1 or batch < 1:
        raise ValueError(f"{n} rows in batches of {batch}: both must be at least 1")
    return -(-n // batch)


def total_steps(config: TrainingConfig, epoch_rows: int) -> int:
    """Optimizer steps of a training: `max_steps`, or those of `num_train_epochs`, rounded up.

    As transformers' Trainer counts them, but that 1.1 epochs of 10 steps are 11, and not 12 for the
    float just above 11.

    Args:
        config: of the stage.
        epoch_rows: that an epoch goes through; 0 in a plan that finds none.
    """
    if config.max_steps > 0:
        return config.max_steps
    per_epoch = -(-epoch_rows // config.global_batch_size)
    return math.ceil(round(config.num_train_epochs * per_epoch, 9))


@dataclass(frozen=True, eq=False)  # compared, and cached, as the object that it is
class Order:
    """What decides the rows of an epoch, beside its seed.

    Attributes:
        rows: of the data set.
        drawn: rows of an epoch; all of them, each once, unless `shares` draws among them.
        shares: [rows] whole numbers, as often as a row is drawn in Σ shares / drawn epochs of ever
            other offsets; None: each row once an epoch.
        groups: [rows] numbers from 0; rows of a group are side by side in every epoch, groups and
            the rows of each at random; None: rows lie in any order.
    """

    rows: int
    drawn: int
    shares: NDArray[np.int64] | None = None
    groups: NDArray[np.int64] | None = None

    def epoch(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The row indices of one epoch, in their order."""
        return _epoch(self, seed, epoch)


def uniform(rows: int, groups: NDArray[np.int64] | None = None) -> Order:
    """Every row once an epoch."""
    return Order(rows, rows, groups=groups)


def proportional(
    weights: Sequence[float] | NDArray[np.floating[Any]], groups: NDArray[np.int64] | None = None
) -> Order:
    """An epoch of ⌊ΣC⌋ rows (at least 1), in which a row of weight C is with probability ∝ C.

    By systematic sampling: rows lie end to end in the epoch's random order, each as long as its
    weight, and are taken where evenly spaced points fall, from a random offset on. So an epoch has
    the same number of rows whatever the offset, and no row twice. Σ ℓ over it has in expectation
    the gradient of Σ C·ℓ over all rows, times drawn / ΣC; its mean that of Σ C·ℓ / ΣC.

    Args:
        weights: C of each row, from 0 (never drawn) to 1.
        groups: as of an `Order`.

    Raises:
        ValueError: for a weight that would have its row drawn twice.
    """
    weights_N = np.asarray(weights, dtype=np.float64)
    lowest, highest = weights_N.min(initial=1), weights_N.max(initial=0)
    if not len(weights) or lowest < 0 or highest > 1:
        raise ValueError(f"weights: from {lowest} to {highest}; sampling needs them from 0 to 1")
    shares = np.rint(weights_N * _UNIT).astype(np.int64)
    if not shares.any():
        raise ValueError("weights: all are zero, or nearly; nothing can be drawn in proportion")
    return Order(len(weights), max(1, int(shares.sum()) // _UNIT), shares, groups)


def systematic(shares: NDArray[np.int64], drawn: int, offset: int) -> NDArray[np.int64]:
    """The rows in which the points (offset + k·Σ shares) / drawn, k < drawn, fall; ascending.

    Whole numbers alone, so that no row is drawn by rounding: over all offsets from 0 to Σ shares
    a row is drawn exactly shares × drawn times, at most once by each where no share is above
    Σ shares / drawn (systematic sampling, Madow 1949).

    Args:
        shares: [N] whole numbers, not negative.
        drawn: how many rows are drawn.
        offset: from 0 to below Σ shares.

    Returns:
        int64 [drawn].
    """
    ends = np.cumsum(shares)
    whole, rest = divmod(int(ends[-1]), drawn)
    k = np.arange(drawn)
    points = k * whole + (offset + k * rest) // drawn
    return np.searchsorted(ends, points, side="right")


def global_batch(n: int | Order, batch: int, seed: int, step: int) -> tuple[int, NDArray[np.int64]]:
    """The rows of one optimizer step.

    Args:
        n: rows of the data set, or the order of its epochs.
        batch: rows a step over all ranks.
        seed: of the run.
        step: counted from 0 over all epochs.

    Returns:
        The epoch, and the row indices (fewer than `batch` in an epoch's last step).
    """
    order = uniform(n) if isinstance(n, int) else n
    epoch, position = divmod(step, steps_per_epoch(order.drawn, batch))
    rows = order.epoch(seed, epoch)
    return epoch, rows[position * batch : (position + 1) * batch].copy()


def plan_micro_batches(
    lengths: Sequence[int] | NDArray[np.integer],
    max_tokens: int,
    world_size: int,
    layout: Layout,
    sequences: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """Splits one global batch over ranks and micro-steps by a budget of tokens, pads included.

    Micro-batches of like cost share a micro-step, as all ranks wait for the slowest in each. Packed
    rows have no pads: micro-batches are evened out by their tokens. Otherwise rows of like length
    share a micro-batch. The costliest come first, so that what does not fit in memory fails at
    once.

    Args:
        lengths: planned length of each row of the global batch.
        max_tokens: bound on the tokens of a micro-batch: the sum of its rows, or rows × longest row
            where they are padded; one row alone may exceed it.
        world_size: ranks.
        layout: how the rows of a micro-batch are laid out.
        sequences: of each row, which are alike in length and have its length together: for plain
            rows of unequal numbers of answers; None: all have as many.

    Returns:
        plan[rank][micro_step]: positions in `lengths`. All ranks have the same number (≥ 1) of
        micro-steps; a rank with nothing to do in one has [].
    """
    if max_tokens < 1 or world_size < 1:
        raise ValueError(f"max_tokens {max_tokens}, world_size {world_size}: both must be positive")
    if layout == "packed":
        cost = partial(_packed_tokens, lengths=lengths)
        micro_batches = _pack(lengths, max_tokens, world_size)
    else:
        counts = sequences or [1] * len(lengths)
        longest = [int(length) // count for length, count in zip(lengths, counts, strict=True)]
        cost = partial(_padded_tokens, longest=longest, counts=counts)
        micro_batches = _even_out(_fill(longest, cost, max_tokens), world_size)
    micro_batches.sort(key=lambda rows: (-cost(rows), rows))
    n_steps = max(1, -(-len(micro_batches) // world_size))
    micro_batches += [[]] * (n_steps * world_size - len(micro_batches))
    return [
        [list(micro_batches[step * world_size + rank]) for step in range(n_steps)]
        for rank in range(world_size)
    ]


@lru_cache(maxsize=1)  # a training asks for one epoch after the other
def _epoch(order: Order, seed: int, epoch: int) -> NDArray[np.int64]:
    """What is drawn of the permutation, still in its order, which is random."""
    permutation = _permutation(order, seed, epoch)
    if order.shares is None:
        return permutation
    shares = order.shares[permutation]
    offset = _generator(seed, epoch, 1).integers(int(shares.sum()))
    return permutation[systematic(shares, order.drawn, int(offset))]


def _permutation(order: Order, seed: int, epoch: int) -> NDArray[np.int64]:
    permutation = _generator(seed, epoch).permutation(order.rows)
    if order.groups is None:
        return permutation
    rank = _generator(seed, epoch, 2).permutation(int(order.groups.max(initial=-1)) + 1)
    return permutation[np.argsort(rank[order.groups[permutation]], kind="stable")]


def _generator(*seeds: int) -> np.random.Generator:
    """A stream of its own for each purpose."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seeds)))


def _fill(longest: list[int], cost: Callable[[list[int]], int], max_tokens: int) -> list[list[int]]:
    """Micro-batches filled to the budget, longest sequences first; positions break ties."""
    filled: list[list[int]] = []
    for row in sorted(range(len(longest)), key=lambda row: (-longest[row], row)):
        current = filled[-1] if filled else []
        if current and cost([*current, row]) <= max_tokens:
            current.append(row)
        else:
            filled.append([row])
    return filled


def _even_out(micro_batches: list[list[int]], world_size: int) -> list[list[int]]:
    """Halves the largest micro-batches until ranks share them evenly, where rows suffice."""
    while len(micro_batches) % world_size and max(map(len, micro_batches)) > 1:
        largest = max(range(len(micro_batches)), key=lambda i: (len(micro_batches[i]), -i))
        rows = micro_batches.pop(largest)
        half = (len(rows) + 1) // 2
        micro_batches[largest:largest] = [rows[:half], rows[half:]]
    return micro_batches


def _pack(
    lengths: Sequence[int] | NDArray[np.integer], max_tokens: int, world_size: int
) -> list[list[int]]:
    """The fewest equal micro-batches within the budget, as many on each rank where rows suffice."""
    order = sorted(range(len(lengths)), key=lambda row: (-int(lengths[row]), row))
    alone = [[row] for row in order if lengths[row] > max_tokens]
    rest = order[len(alone) :]
    count = -(-_packed_tokens(rest, lengths) // max_tokens)
    while True:
        count += -(len(alone) + count) % world_size
        spread = _spread(rest, lengths, count)
        if all(_packed_tokens(rows, lengths) <= max_tokens for rows in spread):
            return alone + [rows for rows in spread if rows]
        count += 1


def _spread(
    order: list[int], lengths: Sequence[int] | NDArray[np.integer], count: int
) -> list[list[int]]:
    """Each row, longest first, to the micro-batch with the fewest tokens so far (LPT)."""
    loads = [(0, number) for number in range(count)]
    spread: list[list[int]] = [[] for _ in range(count)]
    for row in order if count else []:
        load, number = loads[0]
        spread[number].append(row)
        heapq.heapreplace(loads, (load + int(lengths[row]), number))
    return spread


def _packed_tokens(rows: list[int], lengths: Sequence[int] | NDArray[np.integer]) -> int:
    return sum(int(lengths[row]) for row in rows)


def _padded_tokens(rows: list[int], longest: list[int], counts: Sequence[int]) -> int:
    return sum(counts[row] for row in rows) * max(longest[row] for row in rows)
