"""Stage outputs in; what of the cluster each takes while it is made, and which fit at once, out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from cwpo_dist.config import TrainingConfig
from cwpo_dist.placement import actor_takes, worker_takes
from cwpo_dist.runs.output_key import Node

Room = dict[str, float]
SMALL = {"CPU": 0.5}  # a stage of few tasks


def need(node: Node, room: Room) -> Room:
    """What a stage takes of the cluster while it runs; at most all of it."""
    section = node.settings.place
    if section is None:
        return SMALL
    if isinstance(section, TrainingConfig):
        each = worker_takes(section, room["GPU"])
        wanted = _times(section.max_workers, each)
    else:
        pools = section.actor_pools()
        wanted = plus(*(_times(pool.max_actors, actor_takes(pool)) for pool in pools))
    return {name: min(amount, room.get(name, 0.0)) for name, amount in wanted.items()}


def _times(number: int, each: Room) -> Room:
    return {name: number * amount for name, amount in each.items()}


def fit_two(outputs: Sequence[Node], room: Room) -> bool:
    """Whether any two trainings find room at once; what else there is, is short."""
    needs = [need(node, room) for node in outputs if node.settings.trains]
    return any(fits(plus(a, b), room) for a, b in itertools.combinations(needs, 2))


def share(needed: Room, room: Room) -> float:
    """Of the cluster, by what it has least of; all of one that has nothing yet, but grows."""
    there = {name: amount / room[name] for name, amount in needed.items() if room.get(name)}
    return max(there.values(), default=1.0)


def plus(*needs: Room) -> Room:
    """All of them at once."""
    names = dict.fromkeys(name for each in needs for name in each)
    return {name: sum(each.get(name, 0.0) for each in needs) for name in names}


def fits(needed: Room, room: Room) -> bool:
    """Whether the cluster has that much."""
    return all(amount <= room.get(name, 0.0) + 1e-9 for name, amount in needed.items())
