"""Pairs in; the numbers that a worker of the pipeline gives both answers of each, out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cwpo_dist.pairs.answers import read_compared
from cwpo_dist.pairs.stored import Pair, write_pairs
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.storage import Store

Numbers = dict[str, list[float]]  # by pair id: of a, of b


def store_of(folder: Path, pairs: Sequence[Pair]) -> Store:
    """A folder like that of `prepare`, with one shard; written anew each time."""
    store = Store(str(folder))
    for name in store.names():
        store.remove(name)
    write_pairs(store, 0, pairs)
    return store


def numbers_of(store: Store, table: Any, column: str) -> Numbers:
    """Of the pairs both of whose answers have a number, by the shard's ids."""
    found = dict(zip(table["answer_id"].to_pylist(), table[column].to_pylist(), strict=True))
    return {
        pair.pair_id: [found[pair.answer_a], found[pair.answer_b]]
        for pair in read_compared(store, 0)
        if pair.answer_a in found and pair.answer_b in found
    }


def scores_of(
    folder: Path, pairs: Sequence[Pair], make_worker: Callable[[AnswersIn], Any]
) -> Numbers:
    """What a worker that reads the shard gives."""
    store = store_of(folder, pairs)
    worker = make_worker(AnswersIn(store))
    return numbers_of(store, worker(0, worker.read(0)).rows, "score")
