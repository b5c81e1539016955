"""Devices and the time of a shard in; what the real driver made of a fleet of fakes out.

All is real (run_shards: Ray Data's scheduling, shards handed out, commits, progress), but for the
work: a few actor processes each stand for many devices, every device a thread that waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import psutil
import pyarrow as pa
from ray.data import ActorPoolStrategy

from cwpo_dist.config import Pool, PoolConfig
from cwpo_dist.pairs.records import REJECT_SCHEMA
from cwpo_dist.scoring import driver, pool
from cwpo_dist.scoring.pipeline import ShardJob
from cwpo_dist.scoring.progress import Report
from cwpo_dist.scoring.retries import Input, ShardOutput
from cwpo_dist.scoring.tickets import Broken
from cwpo_dist.storage import Store

PROCESSES = 4
SECONDS = 8.0  # that are looked at
MOST_SHARDS_S = 150.0  # about what the driver can do here, while no better number is known
GOLDEN = (5**0.5 - 1) / 2  # its multiples lie evenly in [0, 1)


class FakeDevice:
    """Takes as long over a shard as a device would, from half the mean to one and a half."""

    def __init__(self, service_s: float) -> None:
        """One object serves all devices of a process: it holds nothing."""
        self.service_s = service_s

    def read(self, index: int) -> list[Input[None]]:
        """A row, as input is no part of the control path."""
        return [Input(str(index), 0, None)]

    def __call__(self, index: int, rows: Sequence[Input[None]]) -> ShardOutput:
        """Waits."""
        time.sleep(self.service_s * (0.5 + index * GOLDEN % 1))
        return done()


def done() -> ShardOutput:
    """A shard of a single row."""
    table = pa.table({"score": [0.0]})
    return ShardOutput(table, REJECT_SCHEMA.empty_table(), {"rows_in": 1, "rows": 1})


def many_devices(devices: int, tickets: int, _pool: Pool, _missing: int) -> ActorPoolStrategy:
    """In place of the pool's own: a process stands for many actors, with as many tickets."""
    return ActorPoolStrategy(
        size=PROCESSES,
        max_tasks_in_flight_per_actor=tickets // PROCESSES,
        max_concurrent_calls_per_actor=devices // PROCESSES,
        enable_true_multi_threading=True,
    )


class _EnoughError(Exception):
    """All that was to be looked at has been seen."""


@dataclass
class Watched:
    """In place of run_pools: the same reports up to the last mark, and what was seen of them.

    Attributes:
        marks: the numbers of reports between which we look: all devices have work.
        begun: set at the first of them.
        came: when each report came.
        used: the CPU time used by each mark.
    """

    marks: tuple[int, int]
    begun: threading.Event
    came: list[tuple[float, Report]] = field(default_factory=list)
    used: list[dict[str, float]] = field(default_factory=list)

    def __call__(
        self, job: ShardJob, missing: Sequence[int], pools: Sequence[Pool], broken: Broken
    ) -> Iterator[Report]:
        """Hands on what the pools report."""
        for report in pool.run_pools(job, missing, pools, broken):
            yield report
            self.came.append((time.time(), report))
            if len(self.came) in self.marks:
                self.used.append(cpu_seconds())
                self.begun.set()
            if len(self.came) == self.marks[1]:
                raise _EnoughError

    @property
    def span(self) -> float:
        """Seconds between the two marks."""
        first, last = self.marks
        return self.came[last - 1][0] - self.came[first - 1][0]

    @property
    def rate(self) -> float:
        """Shards a second between the two marks."""
        return (self.marks[1] - self.marks[0]) / self.span


def drive(
    folder: Path,
    devices: int,
    service_s: float,
    looked_at: int,
    tickets: int | None = None,
    begun: threading.Event | None = None,
) -> Watched:
    """The real driver over fake devices.

    Args:
        folder: where shards are committed.
        devices: in all processes.
        service_s: of a shard, on average.
        looked_at: shards, after those with which all begin.
        tickets: on their way at once; None: as in the real pool, one at work and one waiting.
        begun: set when we begin to look.
    """
    # Reports wait while the driver hands out so many tickets for the first time.
    first = 2 * devices + (tickets or 0) // 3
    tickets = tickets or 2 * devices
    watched = Watched((first, first + looked_at), begun or threading.Event())
    shards = first + looked_at + tickets  # so that none lacks a ticket while we look
    job = ShardJob("scores", Store(str(folder)), shards, partial(FakeDevice, service_s))
    with (
        patch.object(pool, "_strategy", partial(many_devices, devices, tickets)),
        patch.object(driver, "run_pools", watched),
        suppress(_EnoughError),
    ):
        driver.run_shards(job, PoolConfig(num_actors=PROCESSES, cpus_per_actor=0.1))
    return watched


@dataclass(frozen=True)
class Point:
    """One run of the fleet.

    Attributes:
        rate: shards a second.
        busy: the share of the devices' time in which they worked at a shard.
        cpu_ms: a shard, by who used them.
    """

    devices: int
    service_s: float
    rate: float
    busy: float
    cpu_ms: dict[str, float]


def measured(
    folder: Path,
    devices: int,
    service_s: float,
    tickets: int | None = None,
    limit: float = MOST_SHARDS_S,
    seconds: float = SECONDS,
) -> Point:
    """Looks at the fleet for so many seconds; `limit`: shards a second that the driver can do."""
    looked_at = round(seconds * min(limit, devices / service_s))
    name = f"{devices}-{service_s}-{tickets}"
    watched = drive(folder / name, devices, service_s, looked_at, tickets)
    before, after = watched.used
    cpu_ms = {who: 1e3 * (after[who] - before.get(who, 0.0)) / looked_at for who in after}
    return Point(devices, service_s, watched.rate, watched.rate * service_s / devices, cpu_ms)


def cpu_seconds() -> dict[str, float]:
    """Of the driver, Ray's own processes, and the fake devices' processes so far."""
    total: dict[str, float] = {}
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            name, times = _role(process, me), process.cpu_times()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended between the two calls
        total[name] = total.get(name, 0.0) + times.user + times.system
    return total


def _role(process: psutil.Process, me: psutil.Process) -> str:
    if process == me:
        return "driver"
    title = " ".join(process.cmdline())
    names = {
        "control store": "gcs_server",
        "raylet": "raylet/raylet",
        "shards handed out": "ray::TicketShards",
        "devices": "MapWorker",
    }
    return next((name for name, part in names.items() if part in title), "other")
