"""Stage outputs in; what of the cluster each takes while it is made, and which fit at once, out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from cwpo_dist.config import TrainingConfig
from cwpo_dist.runs.node import Node

Room = dict[str, float]
SMALL = {"CPU": 0.5}  # a stage of few tasks


def need(node: Node, room: Room) -> Room:
    """What a stage takes of the cluster while it runs; at most all of it."""
    section = node.settings.place
    if section is None:
        return SMALL
    if isinstance(section, TrainingConfig):
        on_gpu = section.use_gpu is not False and room["GPU"] > 0
        workers = section.max_workers
        wanted = {"CPU": workers * section.cpus_per_worker, "GPU": float(workers * on_gpu)}
    else:
        actors = section.actor_pools()
        wanted = {
            "CPU": sum(pool.max_actors * pool.cpus_per_actor for pool in actors),
            "GPU": sum(pool.max_actors * pool.gpus_per_actor for pool in actors),
        }
    return {name: min(amount, room[name]) for name, amount in wanted.items()}


def fit_two(outputs: Sequence[Node], room: Room) -> bool:
    """Whether any two trainings find room at once; what else there is, is short."""
    needs = [need(node, room) for node in outputs if node.settings.trains]
    return any(fits(plus(a, b), room) for a, b in itertools.combinations(needs, 2))


def share(needed: Room, room: Room) -> float:
    """Of the cluster, by what it has least of; all of one that has nothing yet, but grows."""
    return max((amount / room[name] for name, amount in needed.items() if room[name]), default=1.0)


def plus(*needs: Room) -> Room:
    """All of them at once."""
    return {name: sum(each.get(name, 0.0) for each in needs) for name in ("CPU", "GPU")}


def fits(needed: Room, room: Room) -> bool:
    """Whether the cluster has that much."""
    return all(needed[name] <= room[name] + 1e-9 for name in needed)
