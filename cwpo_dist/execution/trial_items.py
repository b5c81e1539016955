"""Runs of a comparison in; what is known of each trial item by item, seed by seed, out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from cwpo_dist.config import Config
from cwpo_dist.evaluation.paired import Items, length_balanced
from cwpo_dist.graph import graph
from cwpo_dist.pairs.records import read_rows
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node
from cwpo_dist.runs.trials import Trial
from cwpo_dist.stages.evaluate import (
    ANSWERS,
    BASELINES,
    ITEM_SCHEMA,
    ITEMS,
    JUDGED_SCHEMA,
    JudgedAnswer,
    MeasuredPair,
)
from cwpo_dist.storage import Store

Runs = dict[tuple[Trial, int], Config]  # by trial and seed


def context_of(config: Config) -> Context:
    """Where a run's outputs lie."""
    return Context(Store(config.output_dir))


def evaluated(config: Config, arm: str) -> tuple[Store, Mapping[str, Node]]:
    """The place of an arm's figures, and all that it is made of."""
    nodes = graph(config, arm)
    return context_of(config).place(nodes["evaluate"]), nodes


def items_of(runs: Runs, trial: Trial) -> dict[str, dict[int, Items]]:
    """Figure → seed → its items."""
    found: dict[str, dict[int, Items]] = {}
    for (other, seed), run in runs.items():
        if other == trial:
            for figure, items in _figures(evaluated(run, trial.arm)[0]):
                found.setdefault(figure, {})[seed] = items
    return found


def _figures(store: Store) -> Iterator[tuple[str, Items]]:
    """What is known item by item: a tie counts a half, but in GRA, where it counts as a loss."""
    pairs = read_rows(store, ITEMS, MeasuredPair, ITEM_SCHEMA)
    accuracy = _of(pairs, [(1 + np.sign(pair.margin)) / 2 for pair in pairs])
    yield "accuracy", accuracy
    longer_by = np.array([pair.longer_by for pair in pairs])
    yield "length_balanced", length_balanced(accuracy, longer_by)
    if not store.exists(ANSWERS):
        return
    answers = read_rows(store, ANSWERS, JudgedAnswer, JUDGED_SCHEMA)
    for name in BASELINES:
        yield from _judged(name, [answer for answer in answers if answer.against == name])


def _judged(name: str, rows: Sequence[JudgedAnswer]) -> Iterator[tuple[str, Items]]:
    """Figures of answers held against those of one baseline."""
    if name == "common":
        yield "length", _of(rows, [row.length for row in rows])
    if rows and rows[0].gold is not None:
        ours = np.array([row.gold for row in rows], dtype=np.float64)
        theirs = np.array([row.baseline_gold for row in rows], dtype=np.float64)
        yield f"gra_{name}", _of(rows, ours > theirs)
        yield f"ties_{name}", _of(rows, ours == theirs)


def _of(rows: Sequence[MeasuredPair] | Sequence[JudgedAnswer], values: ArrayLike) -> Items:
    return Items(
        [row.pair_id for row in rows],
        [row.prompt for row in rows],
        np.array(values, dtype=np.float64),
    )
