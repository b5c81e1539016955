"""A pool of actors and a cluster's nodes in; why the pool can never be placed there, if so, out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import ray

from cwpo_dist.config import Pool, PoolConfig


@dataclass(frozen=True)
class Machine:
    """One node; a cluster is a sequence of them.

    Attributes:
        resources: all that Ray counts there but CPUs and GPUs; None: not known before Ray runs.
        labels: the node's.
    """

    cpus: float
    gpus: float
    resources: Mapping[str, float] | None = None
    labels: Mapping[str, str] | None = None


def alive_machines() -> list[Machine]:
    """The nodes of the cluster that we are connected to."""
    return [
        Machine(
            float(node["Resources"].get("CPU", 0)),
            float(node["Resources"].get("GPU", 0)),
            node["Resources"],
            node.get("Labels", {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def pool_faults(prefix: str, config: PoolConfig, machines: Sequence[Machine]) -> Iterator[str]:
    """Actors that fit on no node: Ray would wait for them for ever, silently.

    A pool whose num_actors begins at 0 may have no node yet, but not every pool of a stage.

    Args:
        prefix: of the fields' names: the section with a dot at its end.
        config: the stage's pools.
        machines: the nodes that there are.
    """
    pools = config.actor_pools()
    for number, pool in enumerate(pools):
        field = f"{prefix}pools.{number}." if config.pools else prefix
        room = _room_for(pool, machines)
        if room < (pool.min_actors if len(pools) > 1 else max(1, pool.min_actors)):
            yield _fault(field, pool, machines, room)
    if len(pools) > 1 and not any(pool.min_actors or _room_for(pool, machines) for pool in pools):
        yield f"{prefix}pools: none of them has a node now; start with one that has"


def task_faults(field: str, cpus: float, machines: Sequence[Machine]) -> Iterator[str]:
    """Tasks that fit on no node, of a field that says how many CPUs one takes."""
    largest = max((machine.cpus for machine in machines), default=0.0)
    if cpus > largest:
        yield (
            f"{field}: {cpus:g}, but the largest node of {described(machines)} has {largest:g} "
            "CPUs: such a task can never be placed; lower it, or add a larger node"
        )


def gpus_taken(config: PoolConfig, machines: Sequence[Machine]) -> float:
    """How many of a cluster's GPUs a stage's actors take, all of them up; at most."""
    pools = [pool for pool in config.actor_pools() if pool.gpus_per_actor]
    actors = [min(pool.max_actors, _room_for(pool, machines)) for pool in pools]
    taken = sum(n * pool.gpus_per_actor for n, pool in zip(actors, pools, strict=True))
    return min(taken, sum(machine.gpus for machine in machines))


def _room_for(pool: Pool, machines: Sequence[Machine]) -> int:
    """How many actors of a pool fit on a cluster side by side."""
    return sum(places(machine, pool) for machine in machines)


def places(machine: Machine, pool: Pool) -> int:
    """How many actors of a pool fit on a node side by side."""
    if not all(_has_label(machine, key, selector) for key, selector in pool.labels.items()):
        return 0
    rooms = [_rooms(machine, name, amount) for name, amount in _needs(pool).items()]
    return int(min(rooms) + 1e-9)  # 2 / 0.4 must not become 4.999…


def _needs(pool: Pool) -> dict[str, float]:
    """What one actor takes, by the field of the configuration."""
    needs = {"cpus_per_actor": pool.cpus_per_actor}
    if pool.gpus_per_actor:
        needs["gpus_per_actor"] = pool.gpus_per_actor
    if pool.accelerator_type:
        needs[f"accelerator_type:{pool.accelerator_type}"] = 0.001  # as Ray asks for it
    return needs | {f"resources.{name}": amount for name, amount in pool.resources.items()}


def _rooms(machine: Machine, field: str, amount: float) -> float:
    return _amount(machine, field) / amount


def _amount(machine: Machine, field: str) -> float:
    if field in {"cpus_per_actor", "gpus_per_actor"}:
        return machine.cpus if field == "cpus_per_actor" else machine.gpus
    if machine.resources is None:
        return float("inf")
    return float(machine.resources.get(field.removeprefix("resources."), 0.0))


def _has_label(machine: Machine, key: str, selector: str) -> bool:
    """Ray's label selectors: `value`, `!value`, `in(a,b)`, `!in(a,b)`."""
    if machine.labels is None:
        return True
    rest = selector.removeprefix("!")
    values = rest[3:-1].split(",") if rest.startswith("in(") else [rest]
    found = machine.labels.get(key) in {value.strip() for value in values}
    return found != selector.startswith("!")


def _fault(field: str, pool: Pool, machines: Sequence[Machine], room: int) -> str:
    where = described(machines)
    for key, selector in pool.labels.items():
        if not any(_has_label(machine, key, selector) for machine in machines):
            return f"{field}labels: no node of {where} has {key}={selector}; start one, or drop it"
    for name, amount in _needs(pool).items():
        most = max((_amount(machine, name) for machine in machines), default=0.0)
        if most < amount:
            key, _, kind = name.partition(":")
            value = kind or f"{amount:g}"
            return (
                f"{field}{key}: {value}, but the largest node of {where} has {most:g}: such an "
                "actor can never be placed; lower it, or add a node that has it"
            )
    if room == 0:
        asked = ", ".join([*_needs(pool), *(f"labels.{key}" for key in pool.labels)])
        return (
            f"{field}cpus_per_actor: {pool.cpus_per_actor:g}, but no single node of {where} has "
            f"all of {asked}; lower them, or add a node"
        )
    return (
        f"{field}num_actors: at least {pool.min_actors}, but {where} has room for {room}; lower "
        "the minimum, or add nodes"
    )


def described(machines: Sequence[Machine]) -> str:
    """`this machine (2 CPUs, 0 GPUs)` before Ray runs, else `a cluster of 2 nodes (16 CPUs, …)`."""
    cpus, gpus = sum(m.cpus for m in machines), sum(m.gpus for m in machines)
    here = len(machines) == 1 and machines[0].resources is None
    count = "one node" if len(machines) == 1 else f"{len(machines)} nodes"
    nodes = "this machine" if here else f"a cluster of {count}"
    return f"{nodes} ({cpus:g} CPUs, {gpus:g} GPUs)"
