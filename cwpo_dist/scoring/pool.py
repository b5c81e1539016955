"""A job's missing shards in; committed by one or several pools of Ray Data actors; reports out.

Each pool is a Ray Data pipeline of tickets. A ticket stands for a shard from the moment that an
actor begins it, so a fast pool takes more of them, and none waits behind a long one. A lost actor's
ticket is run again on the actor's next incarnation and stands for the same shard.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from functools import cached_property
from types import FrameType
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, DataContext
from ray.util import metrics
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cwpo_dist.config import Pool
from cwpo_dist.placement import actor_takes, in_words
from cwpo_dist.ray_internals import end_pipelines, one_block_each
from cwpo_dist.scoring.devices import hide_other_gpus, use_own_processors
from cwpo_dist.scoring.pipeline import ShardJob, commit
from cwpo_dist.scoring.progress import Report
from cwpo_dist.scoring.retries import SUSPICIOUS, ShardWorker, attempt
from cwpo_dist.scoring.tickets import (
    SPARE,
    Broken,
    BrokenDeviceError,
    Later,
    ShardError,
    TicketShards,
)
from cwpo_dist.waiting import told_while_waiting

logger = logging.getLogger(__name__)

POLL_S = 2.0  # how often we look for lost nodes while no shard is reported
BROKEN = 86  # the exit code of an actor whose device broke
END_S = 3.0  # how long a pool may take to wind up when nothing is left to do


class _ShardActor:
    """An actor of a pool, as Ray Data sees it: a ticket in, the report of its shard out.

    Its process holds one shard worker, which knows neither tickets nor pools.

    Metrics:
        cwpo_rows, cwpo_tokens, cwpo_rejects: what was scored, read and set aside so far.
        cwpo_rows_per_second: of the last shard.
    """

    def __init__(self, job: ShardJob, pool: int, shards: ActorHandle[TicketShards]) -> None:
        hide_other_gpus()
        use_own_processors()
        self.job, self.pool, self.shards = job, pool, shards
        self.came_up = time.monotonic()
        context = ray.get_runtime_context()
        self.node = context.get_node_id()
        self.name = f"{context.get_actor_id()}-{os.getpid()}"
        # One that has no GPU is a device of its own, whatever processes it goes through.
        gpus = ",".join(map(str, ray.get_gpu_ids())) or context.get_actor_id()
        self.device = f"{gpus} of node {self.node}"
        tags = {"stage": job.name}
        self.counters = {
            kind: metrics.Counter(f"cwpo_{kind}", f"{kind} done", tag_keys=("stage",))
            for kind in ("rows", "tokens", "rejects")
        }
        self.rate = metrics.Gauge("cwpo_rows_per_second", "of the last shard", tag_keys=("stage",))
        for metric in (*self.counters.values(), self.rate):
            metric.set_default_tags(tags)

    @cached_property
    def worker(self) -> ShardWorker[Any]:
        """Made for the first shard: an actor that comes up when all is done loads no model."""
        return self.job.make_worker()

    def __call__(self, _batch: object) -> dict[str, list[str]]:
        ticket = ray.get_runtime_context().get_task_id()  # the same when Ray runs it again
        while True:
            taken: ray.ObjectRef[int | Later | None] = self.shards.take.remote(
                self.pool, ticket, self.node, self.device
            )
            if (index := ray.get(taken)) != "later":
                break
            time.sleep(POLL_S)
        if index is None:
            return {"report": [""]}
        try:
            return {"report": [json.dumps(asdict(self._do(index)))]}
        except BrokenDeviceError as error:
            self._leave(ticket, error)
            raise  # not reached: the process is gone, and Ray runs the ticket again in another

    def _leave(self, ticket: str, error: BrokenDeviceError) -> None:
        """Ends this process, in which the device will compute nothing more.

        Raises:
            ShardError: when a new process or another device would not help either.
        """
        told: ray.ObjectRef[None] = self.shards.broke.remote(
            self.pool, ticket, self.device, str(error)
        )
        ray.get(told)
        logger.warning("%s; another process does it (device %s)", error, self.device)
        sys.stderr.flush()
        # A broken CUDA context lasts as long as its process, and nothing shorter ends it; Ray makes
        # another actor and runs the ticket again.
        os._exit(BROKEN)

    def _do(self, index: int) -> Report:
        worker, started, counts = self.worker, time.monotonic(), {}
        if not self.job.output.exists(self.job.file(index)):
            suspicious = math.inf if self.job.retry else SUSPICIOUS  # these all failed before
            output = attempt(worker, index, self.job.source(index), suspicious)
            if commit(self.job, index, output):
                counts = dict(output.counts)
        now = time.monotonic()
        self._measure(counts, now - started)
        return Report(index, self.name, self.pool, now - started, now - self.came_up, counts)

    def _measure(self, counts: dict[str, int], seconds: float) -> None:
        done = Counter(counts)
        done["rows"] -= done["reused"]  # copied from earlier scores, not done
        for kind, counter in self.counters.items():
            if done[kind]:
                counter.inc(done[kind])
        self.rate.set(done["rows"] / max(seconds, 1e-6))


def run_pools(
    job: ShardJob, missing: Sequence[int], pools: Sequence[Pool], broken: Broken
) -> Iterator[Report]:
    """Does shards over pools of actors, and yields a report of each.

    It ends early when what is left lies with actors that were on lost nodes, or with broken
    devices: the caller comes again with what is still missing, and other actors do it.

    Args:
        job: the stage's sharded work.
        missing: the shards to do.
        pools: who does them, all at the same time.
        broken: what is known of broken devices, and will be.

    Raises:
        ShardError: when a shard cannot be done.
    """
    settings = DataContext.get_current()
    settings.execution_no_progress_timeout_s = -1  # nodes may be long in coming
    settings.raise_original_map_exception = True  # ours are written for the user
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    make: Any = ray.remote(num_cpus=0)(TicketShards)
    tickets = sum(len(missing) + SPARE * pool.max_actors for pool in pools)
    shards = make.options(scheduling_strategy=here).remote(job.name, list(missing), tickets, broken)
    inbox: queue.Queue[Report | Exception | None] = queue.Queue()
    streams = [
        threading.Thread(
            target=_stream, args=(job, len(missing), pool, number, shards, inbox), daemon=True
        )
        for number, pool in enumerate(pools)
    ]
    left, before = set(missing), set(threading.enumerate())
    failed: Exception | None = None
    for stream in streams:
        stream.start()
    try:
        with _told_while_waiting(job, pools, shards):
            yield from _reports(left, shards, inbox, len(streams))
    except Exception as error:  # whatever it was: its traceback is let go, and it goes on
        failed = error
        raise
    finally:
        learned: Broken = ray.get(shards.close.remote())
        broken.breaks, broken.over = learned.breaks, learned.over
        _end(streams, before, failed)
        ray.kill(shards)  # else it lives as long as anything of the pipelines that it was given to
    if left and learned.all_that_came:
        raise ShardError(
            f"{job.name}: {len(left)} shards are left, and each device that came up is broken "
            f"({', '.join(broken.breaks)}); reset or replace it, then run the same command again"
        )


def _told_while_waiting(
    job: ShardJob, pools: Sequence[Pool], shards: ActorHandle[TicketShards]
) -> AbstractContextManager[None]:
    """Of the first pool's actors, where no pool has one yet."""
    need = actor_takes(pools[0])
    return told_while_waiting(
        f"{job.name}.num_actors: actors of {in_words(need)} each",
        need,
        "lower cpus_per_actor",
        lambda: bool(ray.get(shards.has_begun.remote())),
    )


def _end(
    streams: Sequence[threading.Thread], before: set[threading.Thread], failed: Exception | None
) -> None:
    """Waits for the pools to wind up, and ends those that do not.

    Their actors wait for nodes that are lost, or are busy with what another pool has done.
    """
    deadline = time.monotonic() + END_S
    for stream in streams:
        stream.join(max(0.0, deadline - time.monotonic()))
    if failed or any(stream.is_alive() for stream in streams):
        end_pipelines(set(threading.enumerate()) - before)
    for stream in streams:
        stream.join(END_S)
    if failed:
        _let_go(failed)


def _let_go(error: BaseException) -> None:
    """Frees Ray Data's actors, which live as long as anybody keeps the error that ended them.

    They would keep their devices while others of this process, another arm say, wait for them.
    What leads to them are the variables of the frames in its traceback, which log records keep too,
    and of their callers, which are in no traceback where the error was caught below them.
    """
    links: list[BaseException | None] = [error]
    while links:
        if link := links.pop():
            for frame, _ in traceback.walk_tb(link.__traceback__):
                _forget(frame)
            links += [link.__cause__, link.__context__]
    gc.collect()  # Ray Data's own objects name each other


def _forget(frame: FrameType | None) -> None:
    """Drops the variables of a frame and of its callers, where they have ended."""
    while frame is not None:
        with suppress(RuntimeError):  # it has not ended
            frame.clear()
        frame = frame.f_back


def _reports(
    left: set[int],
    shards: ActorHandle[TicketShards],
    inbox: queue.Queue[Report | Exception | None],
    streams: int,
) -> Iterator[Report]:
    while left and streams:
        try:
            report = inbox.get(timeout=POLL_S)
        except queue.Empty:
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            if ray.get(shards.stranded.remote(alive)):
                logger.warning(
                    "%d shards lie with lost nodes or broken devices; other actors do them",
                    len(left),
                )
                return
            continue
        if report is None:
            streams -= 1
        elif isinstance(report, Exception):
            raise report
        elif report.shard in left:
            shards.done.remote(report.shard)
            left.discard(report.shard)
            yield report


def _stream(
    job: ShardJob,
    tickets: int,
    pool: Pool,
    number: int,
    shards: ActorHandle[TicketShards],
    inbox: queue.Queue[Report | Exception | None],
) -> None:
    """Runs one pool's pipeline in a thread of its own; its end, or its error, is a message too."""
    try:
        results = _tickets(tickets + SPARE * pool.max_actors).map_batches(
            _ShardActor,
            fn_constructor_args=(job, number, shards),
            batch_size=1,
            compute=_strategy(pool, tickets),
            num_cpus=pool.cpus_per_actor,
            num_gpus=pool.gpus_per_actor or None,
            **_selection(pool),
        )
        for row in results.iter_rows():
            (report,) = row.values()
            if report:
                inbox.put(Report(**json.loads(report)))
        inbox.put(None)
    except Exception as error:  # noqa: BLE001 (raised again in the thread that waits for it)
        inbox.put(error)


def _tickets(number: int) -> ray.data.Dataset:
    """One block a ticket, as Ray Data hands out blocks; nobody reads what is in them.

    Ray Data must not know shards: it would tie each to an actor before that one is free, and a
    pool could take none from another. What it hands out is only the right to ask for a shard.
    """
    return one_block_each(pa.table({"ticket": [True]}), number)


def _strategy(pool: Pool, tickets: int) -> ActorPoolStrategy:
    most = min(pool.max_actors, tickets)
    # A fixed number is not scaled down where several pools share the cluster by Ray Data's rules.
    least = most if isinstance(pool.num_actors, int) else max(1, min(pool.min_actors, most))
    return ActorPoolStrategy(
        min_size=least,
        max_size=most,
        initial_size=most,  # all are asked for at once; work begins with those that fit
        # One ticket at work and one waiting: it stands for no shard yet, so nothing waits with it.
        max_tasks_in_flight_per_actor=SPARE,
        # Calls come in the task's own thread, which knows its id; there is one at a time.
        enable_true_multi_threading=True,
    )


def _selection(pool: Pool) -> dict[str, Any]:
    """Where a pool's actors may run, as Ray's remote arguments; only what is asked for."""
    asked = {
        "accelerator_type": pool.accelerator_type,
        "label_selector": pool.labels,
        "resources": pool.resources,
    }
    return {name: value for name, value in asked.items() if value}
