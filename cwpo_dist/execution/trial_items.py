"""Runs of a comparison in; what is known of each trial item by item, seed by seed, out."""

from __future__ import annotations

from collections.abc import Mapping

from cwpo_dist.config import Config
from cwpo_dist.evaluation.paired import Items
from cwpo_dist.graph import graph
from cwpo_dist.results.items import by_item
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node
from cwpo_dist.runs.trials import Trial
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
            for figure, items in by_item(evaluated(run, trial.arm)[0]):
                found.setdefault(figure, {})[seed] = items
    return found
