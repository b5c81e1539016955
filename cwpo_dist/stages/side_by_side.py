"""Stage outputs of many runs in; each made once, independent ones side by side where there is room.

Where two would fit on the cluster at once, each stage is driven from a Ray task of its own; else
one after the other from this process. A stage that fails, or a signal, ends the driver and with it
all its tasks: the next start resumes each from its last checkpoint.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from cwpo_dist.config import Config, PoolConfig, TrainingConfig
from cwpo_dist.stages.context import Context
from cwpo_dist.stages.graph import Node
from cwpo_dist.stages.run import connect, make, workers_of
from cwpo_dist.storage import Store

logger = logging.getLogger(__name__)

Room = dict[str, float]
SMALL = {"CPU": 0.5}  # a stage of few tasks


@dataclass(frozen=True)
class Job:
    """A stage output and the run that it belongs to."""

    config: Config
    node: Node

    @property
    def context(self) -> Context:
        """The run."""
        return Context(self.config, Store(self.config.output_dir))


def make_all(jobs: Sequence[Job]) -> None:
    """Makes every output that is not there yet.

    Args:
        jobs: each after those that it reads; an output that several runs share may stand in all.
    """
    first = {job.node.path: job for job in reversed(jobs)}
    todo = [job for job in dict.fromkeys(job.node.path for job in jobs) if not _done(first[job])]
    if not todo:
        return
    connect()
    logger.info("compare: %d stage outputs to make", len(todo))
    room = {name: ray.cluster_resources().get(name, 0.0) for name in ("CPU", "GPU")}
    waiting = [first[path] for path in todo]
    if not _fit_two(waiting, room):
        for job in waiting:
            make(job.context, job.node)
        return
    _side_by_side(waiting, room)


def _done(job: Job) -> bool:
    return job.context.done(job.node)


def _fit_two(jobs: Sequence[Job], room: Room) -> bool:
    """Whether any two trainings find room at once; what else there is, is short."""
    needs = [need(job, room) for job in jobs if job.node.stage in {"fit", "sft", "align"}]
    return any(_fits(_plus(a, b), room) for a, b in itertools.combinations(needs, 2))


def _side_by_side(waiting: list[Job], room: Room) -> None:
    to_come = {job.node.path for job in waiting}
    running: dict[Any, Job] = {}
    while waiting or running:
        for job in list(waiting):
            used = _plus(*(need(other, room) for other in running.values()))
            reads = {given.path for given in job.node.inputs.values()}
            fits = _fits(_plus(used, need(job, room)), room) or not running
            if not reads & to_come and fits:
                waiting.remove(job)
                running[_apart.options(name=job.node.path).remote(job)] = job
        (ended,), _ = ray.wait(list(running), num_returns=1)
        ray.get(ended)
        to_come.discard(running.pop(ended).node.path)


@ray.remote(num_cpus=0, max_retries=0)
def _apart(job: Job) -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("cwpo_dist").setLevel(logging.INFO)
    connect()
    make(job.context, job.node)


def need(job: Job, room: Room) -> Room:
    """What a stage takes of the cluster while it runs; at most all of it."""
    config = job.context.of(job.node).config
    pools: dict[str, PoolConfig] = {
        "annotate": config.annotate,
        "tokens": config.reference,
        "reference": config.reference,
        "generate": config.evaluate,
        "evaluate": config.evaluate,
    }
    section = workers_of(config, job.node) or pools.get(job.node.stage)
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


def _plus(*needs: Room) -> Room:
    return {name: sum(each.get(name, 0.0) for each in needs) for name in ("CPU", "GPU")}


def _fits(wanted: Room, room: Room) -> bool:
    return all(wanted[name] <= room[name] + 1e-9 for name in wanted)
