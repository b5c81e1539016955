"""Stage outputs in; what of the cluster each takes while it is made, and which fit at once, out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from cwpo_dist.config import Config, PoolConfig, TrainingConfig
from cwpo_dist.runs.graph import TRAINING_STAGES, Node, teacher_config

Room = dict[str, float]
SMALL = {"CPU": 0.5}  # a stage of few tasks


def workers_of(config: Config, node: Node) -> TrainingConfig | None:
    """The section whose workers make an output; None where actors or tasks do."""
    sharded = config.align if config.reference.sharded else None
    trainings = {"fit": config.fit, "sft": config.sft, "align": config.align, "reference": sharded}
    return trainings.get(node.stage)


def need(config: Config, node: Node, room: Room) -> Room:
    """What a stage takes of the cluster while it runs; at most all of it."""
    config = config if node.of == "policy" else teacher_config(config)
    pools: dict[str, PoolConfig] = {
        "annotate": config.annotate,
        "tokens": config.reference,
        "reference": config.reference,
        "generate": config.evaluate,
        "evaluate": config.evaluate,
    }
    section = workers_of(config, node) or pools.get(node.stage)
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


def fit_two(outputs: Sequence[tuple[Config, Node]], room: Room) -> bool:
    """Whether any two trainings find room at once; what else there is, is short."""
    trained = [given for given in outputs if given[1].stage in TRAINING_STAGES]
    needs = [need(config, node, room) for config, node in trained]
    return any(fits(plus(a, b), room) for a, b in itertools.combinations(needs, 2))


def share(needed: Room, room: Room) -> float:
    """Of the cluster, by what it has least of; all of one that has nothing yet, but grows."""
    return max((amount / room[name] for name, amount in needed.items() if room[name]), default=1.0)


def plus(*needs: Room) -> Room:
    """All of them at once."""
    return {name: sum(each.get(name, 0.0) for each in needs) for name in ("CPU", "GPU")}


def fits(wanted: Room, room: Room) -> bool:
    """Whether the cluster has that much."""
    return all(wanted[name] <= room[name] + 1e-9 for name in wanted)
