"""Stage outputs of many runs in; each made once, independent ones side by side where there is room.

Where two would fit on the cluster at once, each stage is driven from a Ray task of its own; else
one after the other from this process. A stage that fails ends the driver and with it all its
tasks: the next start resumes each from its last checkpoint. A stop signal does so too, once those
that train have made one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import ray

from cwpo_dist.execution.run import clear, make
from cwpo_dist.graph import STAGES
from cwpo_dist.placement import alive_machines, total
from cwpo_dist.runs.cluster import connect
from cwpo_dist.runs.cluster_share import Room, fit_two, fits, need, plus
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node
from cwpo_dist.stop_signals import Preempted, on_stop
from cwpo_dist.storage import Store
from cwpo_dist.training.lease import ask_holder_to_stop

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # how often a stop signal is looked for: Ray waits outside Python


@dataclass(frozen=True)
class Job:
    """A stage output and the run directory that it belongs to."""

    context: Context
    node: Node

    @cached_property
    def who(self) -> str | None:
        """Which model it is of, where others copy that model's numbers; its inputs are there."""
        who = STAGES[self.node.stage].who
        return None if who is None else who(self.context, self.node)


def make_all(jobs: Sequence[Job]) -> None:
    """Makes every output that is not there yet.

    Args:
        jobs: each after those that it reads; an output that several runs share may stand in all.
    """
    for root in {job.context.root.uri: job.context.root for job in jobs}.values():
        root.sweep()
    waiting = list(_left(jobs))
    if not waiting:
        return
    connect()
    logger.info("compare: %d stage outputs to make", len(waiting))
    room = total(alive_machines())
    if not fit_two([job.node for job in waiting], room):
        for made, job in enumerate(waiting, 1):
            make(job.context, job.node)
            _tell(job, made, len(waiting))
        return
    _side_by_side(waiting, room)


def _left(jobs: Sequence[Job]) -> Iterator[Job]:
    """Each output that is not there yet, once; clears those that are."""
    first = {job.node.path: job for job in reversed(jobs)}
    for path in dict.fromkeys(job.node.path for job in jobs):
        job = first[path]
        if job.context.done(job.node):
            clear(job.context, job.node)
        else:
            yield job


def _side_by_side(waiting: list[Job], room: Room) -> None:
    told = threading.Event()

    def note(_: str) -> bool:
        told.set()
        return True

    with on_stop(note):
        _until_made(waiting, room, told)


def _until_made(waiting: list[Job], room: Room, told_to_stop: threading.Event) -> None:
    to_come, number = {job.node.path for job in waiting}, len(waiting)
    running: dict[ray.ObjectRef[None], Job] = {}
    while (waiting or running) and not told_to_stop.is_set():
        for job in list(waiting):
            if _can_start(job, running.values(), to_come, room):
                waiting.remove(job)
                running[_apart.options(name=job.node.path).remote(job)] = job
        ended, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_S)
        for task in ended:
            ray.get(task)
            job = running.pop(task)
            to_come.discard(job.node.path)
            _tell(job, number - len(to_come), number)
    if told_to_stop.is_set():
        _stop(running)


def _can_start(job: Job, running: Collection[Job], to_come: Set[str], room: Room) -> bool:
    """Whether its inputs are there, it finds room, and nothing is under way that it would copy."""
    if {given.path for given in job.node.inputs.values()} & to_come:
        return False
    used = plus(*(need(other.node, room) for other in running))
    if running and not fits(plus(used, need(job.node, room)), room):
        return False
    alike = [other for other in running if other.node.stage == job.node.stage]
    return not any(job.who is not None and other.who == job.who for other in alike)


def _stop(running: dict[ray.ObjectRef[None], Job]) -> NoReturn:
    """Waits for the checkpoints of trainings; what else runs loses a shard at most.

    Raises:
        Preempted: always.
    """
    logger.warning("compare: told to stop: trainings checkpoint and end")
    left = dict(running)
    while held := [task for task, job in left.items() if ask_holder_to_stop(_folder(job))]:
        # Some driver may have died without a word: its task has ended, whatever its lease says.
        ended, _ = ray.wait(held, num_returns=len(held), timeout=LOOK_S)
        left = {task: job for task, job in left.items() if task not in ended}
    raise Preempted("compare: told to stop; the same command resumes")


def _folder(job: Job) -> Store:
    return job.context.place(job.node)


def _tell(job: Job, made: int, number: int) -> None:
    logger.info("compare: %s made, %d of %d", job.node.path, made, number)


@ray.remote(num_cpus=0, max_retries=0)
def _apart(job: Job) -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("cwpo_dist").setLevel(logging.INFO)
    connect()
    make(job.context, job.node)
