"""How far one driver's control of annotation reaches: fake devices, a fitted model, 4,096 devices.

Usage: python benchmarks/scale.py [--part fleet|start|kills|all] [--help]

fleet: the real pipeline (tickets through Ray Data, shards handed out, commits, progress), but for
    its worker: a few actor processes that each stand for many devices, every device a thread that
    waits for the service time and commits. On 8 to 64 devices a model is fitted, which then
    predicts 128 and 256 before they run.
start: what comes before and after the shards: tickets, the list of what is missing, the counts.
kills: a process is killed every few seconds; what the devices in it lost.

The last line is one JSON object with all figures.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process, decided before torch

import measure
import numpy as np
import psutil
import pyarrow as pa
import ray
import typer
from ray.data import ActorPoolStrategy

from cwpo_dist.config import PoolConfig
from cwpo_dist.pairs.records import REJECT_SCHEMA
from cwpo_dist.scoring import pool as pipeline_pool
from cwpo_dist.scoring.attempts import Rows, ShardOutput
from cwpo_dist.scoring.pipeline import ShardJob, commit, total_counts
from cwpo_dist.scoring.run import run_shards
from cwpo_dist.storage import Store

PROCESSES = 4
SERVICE_S = (4.0, 1.0)  # of one shard on one device
FITTED, PREDICTED = (8, 16, 32, 64), (128, 256)  # devices
SECONDS = 12.0  # of work that each device is given
ALLOWED = 0.15  # a prediction's relative error
LARGEST, BUSY = 4096, 0.9  # devices, and the share of their time that they should work


class FakeDevice:
    """Takes as long over a shard as a device would, and leaves a row of when."""

    def __init__(self, service_s: float) -> None:
        """One object serves all devices of a process: it holds nothing."""
        self.service_s = service_s

    def read(self, index: int) -> Rows:
        """A row, as input is no part of the control path."""
        return [{"pair_id": str(index), "position": 0}]

    def __call__(self, index: int, rows: Rows) -> ShardOutput:
        """Waits."""
        began = time.time()
        time.sleep(self.service_s)
        table = pa.table({"began": [began], "ended": [time.time()], "process": [os.getpid()]})
        return ShardOutput(table, REJECT_SCHEMA.empty_table(), {"rows_in": 1, "rows": 1})


def many_devices(each: int, _pool: Any, _tickets: int) -> ActorPoolStrategy:
    """In place of the pipeline's own: a process works at many tickets, and one more waits."""
    return ActorPoolStrategy(
        size=PROCESSES,
        max_tasks_in_flight_per_actor=each + 1,
        max_concurrent_calls_per_actor=each,
        enable_true_multi_threading=True,
    )


@dataclass(frozen=True)
class Point:
    """One run of the fleet.

    Attributes:
        busy: the share of the devices' time, between the first shard and the last but the tail, in
            which they worked.
        rate: shards a second over the same time.
        cpu_s: CPU seconds a shard, by who used them.
    """

    devices: int
    service_s: float
    rate: float
    busy: float
    cpu_s: dict[str, float]


def run_fleet(folder: Path, devices: int, service_s: float) -> Point:
    """The real pipeline over fake devices."""
    shards = max(3 * devices, round(devices * SECONDS / service_s))
    output = Store(str(folder / f"{devices}-{service_s}"))
    job = ShardJob("scores", output, shards, partial(FakeDevice, service_s))
    pipeline_pool._strategy = partial(many_devices, devices // PROCESSES)
    cpu = CpuTime()
    run_shards(job, PoolConfig(num_actors=PROCESSES, cpus_per_actor=0.1))
    used = cpu.since(shards)
    return Point(devices, service_s, *_steady(_times(job), devices), used)


def _times(job: ShardJob) -> Any:
    """When each shard began and ended, and in which process: [shards, 3]."""
    tables = [job.output.read_table(job.file(index)) for index in job.indices]
    return np.array([[t[name][0].as_py() for name in t.column_names] for t in tables])


def _steady(times: Any, devices: int) -> tuple[float, float]:
    """Shards a second, and busy share, from when all devices have begun until the first is idle."""
    began, ended = np.sort(times[:, 0]), np.sort(times[:, 1])
    first, last = began[devices - 1], ended[-devices]  # afterwards no ticket waits for some
    inside = np.clip(times, first, last)
    span = last - first
    done = ((times[:, 1] > first) & (times[:, 1] <= last)).sum()
    return float(done / span), float((inside[:, 1] - inside[:, 0]).sum() / (devices * span))


class CpuTime:
    """Who uses the processor: the driver, Ray's own processes, the fake devices' processes."""

    def __init__(self) -> None:
        """Starts to count."""
        self.before = self._now()

    def since(self, shards: int) -> dict[str, float]:
        """CPU seconds a shard since the start."""
        now = self._now()
        return {name: (now[name] - self.before.get(name, 0.0)) / shards for name in now}

    def _now(self) -> dict[str, float]:
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
    for name, part in (
        ("control store", "gcs_server"),
        ("raylet", "raylet/raylet"),
        ("who has which shard", "ray::_Shards"),
        ("devices", "MapWorker"),
    ):
        if part in title:
            return name
    return "other"


def solve(devices: int, service_s: float, overhead_s: float, serial_s: float) -> float:
    """Shards a second of a closed queueing network: devices that think, one server.

    Exact mean value analysis: R_n = c·(1 + Q_{n−1}), X_n = n / (s + o + R_n), Q_n = X_n·R_n.
    """
    queue = rate = 0.0
    for number in range(1, devices + 1):
        waits = serial_s * (1 + queue)
        rate = number / (service_s + overhead_s + waits)
        queue = rate * waits
    return rate


def fit(points: Sequence[Point]) -> tuple[float, float]:
    """Overhead o and serial time c, in seconds a shard, of least squared relative errors."""
    overheads, serials = np.linspace(0.0, 0.3, 61), np.geomspace(5e-4, 5e-2, 81)

    def error(pair: tuple[float, float]) -> float:
        return sum((solve(p.devices, p.service_s, *pair) / p.rate - 1) ** 2 for p in points)

    best: tuple[float, float] = min(product(overheads, serials), key=error)
    return float(best[0]), float(best[1])


def fleet_part(folder: Path) -> dict[str, Any]:
    """Fits on few devices, says what many will do, and then runs them."""
    run_fleet(folder / "warm", 8, 0.1)
    points = [run_fleet(folder, n, s) for s in SERVICE_S for n in FITTED]
    overhead, serial = fit(points)
    print(f"  fitted: {1e3 * overhead:.0f} ms a shard beside, {1e3 * serial:.2f} ms in turn")
    rows = [_compared(point, overhead, serial) for point in points]
    for service_s, devices in product(SERVICE_S, PREDICTED):
        expected = solve(devices, service_s, overhead, serial)
        print(
            f"  {devices} devices, {service_s:g} s: expecting {expected:.1f} shards/s", flush=True
        )
        rows.append(_compared(run_fleet(folder, devices, service_s), overhead, serial))
    worst = max(abs(row["error"]) for row in rows[len(points) :])
    return {
        "overhead_s": overhead,
        "serial_s": serial,
        "points": rows,
        "worst_prediction": worst,
        "allowed": worst <= ALLOWED,
    }


def _compared(point: Point, overhead: float, serial: float) -> dict[str, Any]:
    expected = solve(point.devices, point.service_s, overhead, serial)
    row = {
        "devices": point.devices,
        "service_s": point.service_s,
        "shards_s": point.rate,
        "busy": point.busy,
        "predicted_shards_s": expected,
        "error": expected / point.rate - 1,
        "cpu_ms": {name: 1e3 * seconds for name, seconds in point.cpu_s.items()},
    }
    print(f"  {row}", flush=True)
    return row


def start_part(folder: Path, numbers: Sequence[int] = (1_000, 4_000, 16_000)) -> dict[str, Any]:
    """Seconds and memory of what grows with the number of shards, and of nothing else."""
    rows = []
    for number in numbers:
        before = psutil.Process().memory_info().rss
        seconds = {}
        started = time.perf_counter()
        tickets = pipeline_pool._tickets(number)
        seconds["tickets"] = time.perf_counter() - started
        grown = psutil.Process().memory_info().rss - before
        output = Store(str(folder / f"start-{number}"))
        job = ShardJob("scores", output, number, partial(FakeDevice, 0.0))
        nothing = ShardOutput(
            pa.table({"x": [0]}), REJECT_SCHEMA.empty_table(), {"rows_in": 1, "rows": 1}
        )
        for index in range(number):
            commit(job, index, nothing)
        for name, run in (("missing", job.missing), ("counts", partial(total_counts, job))):
            started = time.perf_counter()
            run()
            seconds[name] = time.perf_counter() - started
        del tickets
        rows.append({"shards": number, "driver_mib": grown / 2**20, "seconds": seconds})
        print(f"  {rows[-1]}", flush=True)
    return {"start": rows}


def kills_part(
    folder: Path, devices: int = 32, service_s: float = 2.0, kills: int = 3
) -> dict[str, Any]:
    """What killing a process costs the devices that it stands for, measured and expected."""
    output, each = Store(str(folder / "kills")), devices // PROCESSES
    shards = round(devices * 36 / service_s)
    job = ShardJob("scores", output, shards, partial(FakeDevice, service_s))
    pipeline_pool._strategy = partial(many_devices, each)
    blows: list[float] = []
    ended = threading.Event()
    killer = threading.Thread(target=_kill, args=(kills, blows, ended), daemon=True)
    killer.start()
    run_shards(job, PoolConfig(num_actors=PROCESSES, cpus_per_actor=0.1))
    ended.set()
    killer.join()
    times = _times(job)
    first, last = np.sort(times[:, 0])[devices - 1], np.sort(times[:, 1])[-devices]
    _, busy = _steady(times, devices)
    seen: set[float] = set(times[times[:, 0] < blows[0], 2])
    away = []
    for blow in blows:
        fresh = set(times[times[:, 0] > blow, 2]) - seen
        back = min((times[times[:, 2] == pid, 0].min() for pid in fresh), default=last)
        seen |= fresh
        away.append(float(back - blow))
    lost = sum(each * (service_s / 2 + seconds) for seconds in away)
    return {
        "devices": devices,
        "kills": len(blows),
        "away_s": away,
        "busy": busy,
        "expected_busy": 1 - lost / (devices * (last - first)),
    }


def _kill(kills: int, blows: list[float], ended: threading.Event) -> None:
    """Ends one of this session's actor processes every eight seconds, once all are at work."""
    if ended.wait(12.0):
        return
    for _ in range(kills):
        workers = [
            process
            for process in psutil.Process().children(recursive=True)
            if "MapWorker" in " ".join(process.cmdline())
        ]
        workers[0].send_signal(signal.SIGKILL)
        blows.append(time.time())
        if ended.wait(8.0):
            return


def draw(figures: dict[str, Any], to: Path) -> None:
    """The model's curves, and the measured points on them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 3.2), layout="constrained")
    devices = np.unique(np.geomspace(8, LARGEST, 25).astype(int))
    for number, service_s in enumerate((1.0, 4.0, 15.0, 60.0)):
        busy = [share(int(n), service_s, figures) for n in devices]
        axes.plot(devices, busy, color=f"C{number}", label=f"{service_s:g} s a shard")
        points = [row for row in figures["points"] if row["service_s"] == service_s]
        for row in points:
            filled = f"C{number}" if row["devices"] in FITTED else "white"
            axes.plot(row["devices"], row["busy"], "o", mec=f"C{number}", mfc=filled, ms=5)
    axes.set(xscale="log", xlabel="devices", ylabel="busy share of their time", ylim=(0, 1.05))
    axes.axhline(0.9, color="grey", lw=0.8, ls=":")
    axes.legend(fontsize=8)
    figure.savefig(to, dpi=90)


def share(devices: int, service_s: float, figures: dict[str, Any]) -> float:
    """The devices' busy share by the model."""
    rate = solve(devices, service_s, figures["overhead_s"], figures["serial_s"])
    return rate * service_s / devices


def least_service(devices: int, figures: dict[str, Any]) -> float:
    """The shortest shard, in seconds, that keeps so many devices 90 % busy."""
    candidates = np.geomspace(0.1, 1000, 400)
    return float(next(s for s in candidates if share(devices, float(s), figures) >= BUSY))


def main(
    part: Annotated[Literal["fleet", "start", "kills", "all"], typer.Option()] = "all",
    plot: Annotated[Path | None, typer.Option(help="where the fleet's picture goes")] = None,
) -> None:
    """Measures and prints; see the head of this file."""
    figures: dict[str, Any] = {"benchmark": "scale", "environment": measure.environment()}
    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if part in {"start", "all"}:
                figures |= start_part(Path(folder))
            if part in {"fleet", "all"}:
                figures |= fleet_part(Path(folder))
                needed = {n: least_service(n, figures) for n in (256, 1024, LARGEST)}
                figures["least_service_s"] = needed
            if part in {"kills", "all"}:
                figures["preemption"] = kills_part(Path(folder))
    finally:
        ray.shutdown()
    if plot is not None and "points" in figures:
        draw(figures, plot)
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
