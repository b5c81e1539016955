"""What fits on which node: one answer for the plan, for the checks before a run, and for the run.

Ray itself would wait for ever, and silently, for room that no node will ever have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import ray

from cwpo_dist.autoscaling import grows
from cwpo_dist.config import Pool, PoolConfig, TrainingConfig
from cwpo_dist.ray_internals import resources_of_this_machine


@dataclass(frozen=True)
class Machine:
    """One node; a cluster is a sequence of them.

    Attributes:
        resources: what Ray counts there beside CPUs and GPUs.
        labels: the node's.
        here: it is this machine, on which no Ray runs yet.
    """

    cpus: float
    gpus: float
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    here: bool = False

    @classmethod
    def of(
        cls, resources: Mapping[str, float], labels: Mapping[str, str], *, here: bool = False
    ) -> Machine:
        """As Ray tells it, which counts CPUs and GPUs among the resources."""
        others = {name: float(n) for name, n in resources.items() if name not in {"CPU", "GPU"}}
        cpus, gpus = (float(resources.get(name, 0)) for name in ("CPU", "GPU"))
        return cls(cpus, gpus, others, labels, here)

    def has(self, name: str) -> float:
        """How much of a resource, by Ray's name."""
        return {"CPU": self.cpus, "GPU": self.gpus, **self.resources}.get(name, 0.0)


@dataclass(frozen=True)
class Need:
    """Tasks, actors or workers of one kind, each of which takes its place on one node.

    Attributes:
        one: what one of them is called, with its article.
        section: of the configuration, with a dot at its end.
        each: what one takes, by Ray's names of resources; nothing of which it takes 0.
        asked: `field: value` that says so, by the same names.
        count: the field that says how many they are.
        least: so many must find a place.
        labels: of the nodes, as Ray's selectors.
    """

    one: str
    section: str
    each: Mapping[str, float]
    asked: Mapping[str, str]
    count: str = ""
    least: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)


def alive_machines() -> list[Machine]:
    """The nodes of the cluster that we are connected to."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [Machine.of(node["Resources"], node.get("Labels", {})) for node in nodes]


def this_machine() -> Machine:
    """The one node of a Ray that is started here."""
    return Machine.of(*resources_of_this_machine(), here=True)


def total(machines: Sequence[Machine]) -> dict[str, float]:
    """What all nodes have together, by Ray's names of resources."""
    names = {"CPU", "GPU"}.union(*(machine.resources for machine in machines))
    return {name: sum(machine.has(name) for machine in machines) for name in names}


def gpus(machines: Sequence[Machine]) -> float:
    """GPUs of all nodes."""
    return sum(machine.gpus for machine in machines)


def uses_gpu(training: TrainingConfig, gpus_there: float) -> bool:
    """Whether workers compute on GPUs, in a cluster that has so many."""
    return training.use_gpu is True or (training.use_gpu == "auto" and gpus_there > 0)


def worker_takes(training: TrainingConfig, gpus_there: float) -> dict[str, float]:
    """What one worker reserves, by Ray's names of resources."""
    gpu = {"GPU": 1.0} if uses_gpu(training, gpus_there) else {}
    wanted = {"CPU": training.cpus_per_worker, **gpu, **training.resources_per_worker}
    return {name: amount for name, amount in wanted.items() if amount > 0}


def actor_takes(pool: Pool) -> dict[str, float]:
    """What one actor reserves, by Ray's names of resources."""
    wanted = {"CPU": pool.cpus_per_actor, "GPU": pool.gpus_per_actor, **pool.resources}
    if pool.accelerator_type:
        wanted[f"accelerator_type:{pool.accelerator_type}"] = 0.001  # as Ray asks for it
    return {name: amount for name, amount in wanted.items() if amount > 0}


def in_words(amounts: Mapping[str, float]) -> str:
    """`1 CPU, 0.5 GPU`, of what one worker or actor takes."""
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())


def task_faults(
    section: str, field_name: str, cpus: float, machines: Sequence[Machine]
) -> Iterator[str]:
    """Tasks that fit on no node, of a field that says how many CPUs one takes."""
    asked = {"CPU": f"{field_name}: {cpus:g}"}
    yield from _faults(Need("a task", section, {"CPU": cpus}, asked), machines)


def training_faults(
    name: str, training: TrainingConfig, machines: Sequence[Machine]
) -> Iterator[str]:
    """Workers of which the fewest that train do not all find a place.

    Args:
        name: of the section.
        training: the section.
        machines: the nodes that there are.
    """
    each, own = worker_takes(training, gpus(machines)), training.resources_per_worker
    use_gpu = str(training.use_gpu).lower()
    if ("GPU" in each) != uses_gpu(training, gpus(machines)):  # which Ray Train refuses, too late
        devices = "the CPU" if "GPU" in each else "GPUs"
        yield (
            f"{name}.resources_per_worker.GPU: {own['GPU']:g}, but with use_gpu: {use_gpu} workers "
            f"on {described(machines)} compute on {devices}; change one of the two"
        )
    elif not each:
        yield f"{name}.resources_per_worker.CPU: 0, so that a worker takes nothing; give 0.01"
    else:
        asked = {"CPU": f"cpus_per_worker: {training.cpus_per_worker:g}"}
        asked |= {"GPU": f"use_gpu: {use_gpu}"}
        asked |= {key: f"resources_per_worker.{key}: {amount:g}" for key, amount in own.items()}
        least = training.min_workers
        need = Need("a worker", f"{name}.", each, asked, "num_workers", least)
        yield from _faults(need, machines)


def pool_faults(prefix: str, config: PoolConfig, machines: Sequence[Machine]) -> Iterator[str]:
    """Actors of which the fewest do not all find a place.

    A pool whose num_actors begins at 0 may have no node yet, but not every pool of a stage.

    Args:
        prefix: of the fields' names: the section with a dot at its end.
        config: the stage's pools.
        machines: the nodes that there are.
    """
    pools = config.actor_pools()
    for number, pool in enumerate(pools):
        least = pool.min_actors if len(pools) > 1 else max(1, pool.min_actors)
        section = f"{prefix}pools.{number}." if config.pools else prefix
        yield from _faults(_actors(section, pool, least), machines)
    if len(pools) > 1 and not any(pool.min_actors or _room_for(pool, machines) for pool in pools):
        yield f"{prefix}pools: none of them has a node now; start with one that has"


def _actors(section: str, pool: Pool, least: int) -> Need:
    kind = pool.accelerator_type
    asked = {
        "CPU": f"cpus_per_actor: {pool.cpus_per_actor:g}",
        "GPU": f"gpus_per_actor: {pool.gpus_per_actor:g}",
        f"accelerator_type:{kind}": f"accelerator_type: {kind}",
    }
    asked |= {name: f"resources.{name}: {amount:g}" for name, amount in pool.resources.items()}
    each = actor_takes(pool)
    return Need("an actor", section, each, asked, "num_actors", least, pool.labels)


def gpus_taken(config: PoolConfig, machines: Sequence[Machine]) -> float:
    """How many of a cluster's GPUs a stage's actors take, all of them up; at most."""
    pools = [pool for pool in config.actor_pools() if pool.gpus_per_actor]
    actors = [min(pool.max_actors, _room_for(pool, machines)) for pool in pools]
    taken = sum(n * pool.gpus_per_actor for n, pool in zip(actors, pools, strict=True))
    return min(taken, gpus(machines))


def _room_for(pool: Pool, machines: Sequence[Machine]) -> float:
    """How many actors of a pool fit on a cluster side by side."""
    return _room(actor_takes(pool), pool.labels, machines)


def _room(
    each: Mapping[str, float], labels: Mapping[str, str], machines: Sequence[Machine]
) -> float:
    """How many fit side by side; without end where the cluster brings nodes as they are needed."""
    return math.inf if grows() else sum(_places(machine, each, labels) for machine in machines)


def _places(machine: Machine, each: Mapping[str, float], labels: Mapping[str, str]) -> int:
    """How many fit on one node side by side."""
    if not all(_has_label(machine, key, selector) for key, selector in labels.items()):
        return 0
    rooms = (machine.has(name) / amount for name, amount in each.items())
    return int(min(rooms) + 1e-9)  # 2 / 0.4 must not become 4.999…


def _has_label(machine: Machine, key: str, selector: str) -> bool:
    """Ray's label selectors: `value`, `!value`, `in(a,b)`, `!in(a,b)`."""
    rest = selector.removeprefix("!")
    values = rest[3:-1].split(",") if rest.startswith("in(") else [rest]
    found = machine.labels.get(key) in {value.strip() for value in values}
    return found != selector.startswith("!")


def _faults(need: Need, machines: Sequence[Machine]) -> Iterator[str]:
    """At most one: why not enough of them find a place."""
    room = _room(need.each, need.labels, machines)
    if room < need.least:
        yield _lacking_on_all(need, machines) or _lacking_together(need, machines, int(room))


def _lacking_on_all(need: Need, machines: Sequence[Machine]) -> str | None:
    """What not even one of them finds on any node."""
    where = described(machines)
    for key, selector in need.labels.items():
        if not any(_has_label(machine, key, selector) for machine in machines):
            return (
                f"{need.section}labels: no node of {where} has {key}={selector}; start one, or "
                "drop it"
            )
    for name, amount in need.each.items():
        most = max((machine.has(name) for machine in machines), default=0.0)
        if most < amount:
            return (
                f"{need.section}{need.asked[name]}, but the largest node of {where} has {most:g}: "
                f"such {need.one} can never be placed; lower it, or add a node that has it"
            )
    return None


def _lacking_together(need: Need, machines: Sequence[Machine], room: int) -> str:
    where = described(machines)
    asked = [need.asked[name] for name in need.each]
    if room == 0:
        fields = [text.split(": ")[0] for text in asked] + [f"labels.{key}" for key in need.labels]
        return (
            f"{need.section}{asked[0]}, but no single node of {where} has all of "
            f"{', '.join(fields)}; lower them, or add a node"
        )
    return (
        f"{need.section}{need.count}: at least {need.least}, each of {in_words(need.each)}, but "
        f"{where} has room for {room}; lower one of these, or add nodes"
    )


def described(machines: Sequence[Machine]) -> str:
    """`this machine (2 CPUs, 0 GPUs)` before Ray runs, else `a cluster of 2 nodes (16 CPUs, …)`."""
    count = "one node" if len(machines) == 1 else f"{len(machines)} nodes"
    here = any(machine.here for machine in machines)
    nodes = "this machine" if here else f"a cluster of {count}"
    cpus = sum(machine.cpus for machine in machines)
    return f"{nodes} ({cpus:g} CPUs, {gpus(machines):g} GPUs)"
