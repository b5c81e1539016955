"""How far one driver's control of annotation reaches: fake devices in, a tested model of it out.

Usage: python benchmarks/scale.py [--part start|kills|fleet|tickets|all] [--plot FOLDER] [--help]

start: what comes before the first shard and after the last: tickets, what is missing, the counts.
fleet: the real driver over fake devices (fake_fleet.py). A model is fitted on up to 64 devices and
    says what 128 and 256 will do before they run.
tickets: 64 devices, but as many tickets on their way as 4,096 have.
kills: processes that stand for devices are killed; what that cost, against the formula.

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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process, decided before torch

import measure
import numpy as np
import psutil
import ray
import typer
from fake_fleet import PROCESSES, FakeDevice, Point, done, drive, measured

from cwpo_dist.scoring import pool
from cwpo_dist.scoring.pipeline import ShardJob, commit, total_counts
from cwpo_dist.storage import Store

FITTED = ((8, 1.0), (32, 1.0), (64, 1.0), (64, 0.2))  # devices, s a shard
PREDICTED = ((128, 8.0), (256, 8.0), (256, 1.0))
ALLOWED = 0.15  # a prediction's relative error
LARGEST = 4096  # devices

PAIRS, PAIRS_S, BUSY = 1e9, 100.0, 0.9  # to annotate; of one device; share of its time to reach
PREEMPTIONS, RESTART_S = (0.1, 1.0), 180.0  # an hour and device; until another one works


def solve(devices: int, service_s: float, overhead_s: float, serial_s: float) -> float:
    """Shards a second of a closed queueing network: devices that work, one server in turn.

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
    overheads, serials = np.linspace(0.0, 0.3, 61), np.geomspace(5e-4, 5e-2, 93)

    def error(pair: tuple[float, float]) -> float:
        return sum((solve(p.devices, p.service_s, *pair) / p.rate - 1) ** 2 for p in points)

    best: tuple[float, float] = min(product(overheads, serials), key=error)
    return float(best[0]), float(best[1])


def fleet_part(folder: Path) -> dict[str, Any]:
    """Fits on few devices, says what many will do, and then runs them."""
    points = [measured(folder, *point) for point in FITTED]
    overhead, serial = fit(points)
    print(f"  fitted: {1e3 * overhead:.0f} ms a shard beside, {1e3 * serial:.2f} ms in turn")
    rows = [_compared(point, overhead, serial) for point in points]
    for devices, service_s in PREDICTED:
        expected = solve(devices, service_s, overhead, serial)
        print(f"  {devices} devices, {service_s:g} s: {expected:.1f} shards/s?", flush=True)
        point = measured(folder, devices, service_s, limit=expected)
        rows.append(_compared(point, overhead, serial))
    worst = max(abs(row["error"]) for row in rows[len(points) :])
    fitted = {"overhead_s": overhead, "serial_s": serial}
    return {
        **fitted,
        "points": rows,
        "worst_prediction": worst,
        "allowed": worst <= ALLOWED,
        "forecast": [forecast(service_s, fitted) for service_s in (15.0, 30.0, 60.0, 120.0, 300.0)],
    }


def tickets_part(folder: Path) -> dict[str, Any]:
    """As many tickets on their way as 4,096 devices have: what each costs the driver then."""
    points = [measured(folder, 64, 1.0, tickets) for tickets in (None, 2 * LARGEST)]
    for point in points:
        print(f"  {point}", flush=True)
    return {"tickets": [asdict(point) for point in points]}


def _compared(point: Point, overhead: float, serial: float) -> dict[str, Any]:
    expected = solve(point.devices, point.service_s, overhead, serial)
    row = asdict(point) | {"predicted": expected, "error": expected / point.rate - 1}
    print(f"  {row}", flush=True)
    return row


def share(devices: int, service_s: float, fitted: dict[str, Any]) -> float:
    """Of their time, the devices' at work."""
    rate = solve(devices, service_s, fitted["overhead_s"], fitted["serial_s"])
    return rate * service_s / devices


def forecast(service_s: float, fitted: dict[str, float]) -> dict[str, Any]:
    """A billion pairs on 4,096 devices, in shards of so many seconds: what share of time is work.

    The driver's share is the model's. Beside it, on average, a device waits for half of the first
    tickets of all, and for half a shard's time at the end, when no ticket is left; and at each
    preemption it loses half a shard, and the time until another one works in its place.
    """
    driver = share(LARGEST, service_s, fitted)
    work_s = PAIRS / PAIRS_S / LARGEST
    ends_s = (LARGEST * fitted["serial_s"] + service_s) / 2
    row: dict[str, Any] = {
        "service_s": service_s,
        "rows_per_shard": PAIRS_S * service_s,
        "shards": PAIRS / (PAIRS_S * service_s),
        "driver": driver,
        "with_ends": work_s / (work_s / driver + ends_s),
    }
    for rate in PREEMPTIONS:
        kept = driver * (1 - rate * lost(service_s, RESTART_S) / 3600)
        row[f"with_{rate:g}_preempted"] = work_s / (work_s / kept + ends_s)
    print(f"  {row}", flush=True)
    return row


def lost(service_s: float, restart_s: float) -> float:
    """Seconds that a preemption costs a device, on average."""
    return service_s / 2 + restart_s


def kills_part(
    folder: Path, devices: int = 32, service_s: float = 2.0, kills: int = 3
) -> dict[str, Any]:
    """What killing processes costs the devices that they stand for, measured and expected."""
    looked_at, ended = round(devices * 32 / service_s), threading.Event()
    begun, blows = threading.Event(), list[float]()
    killer = threading.Thread(target=_kill, args=(kills, blows, begun, ended), daemon=True)
    killer.start()
    watched = drive(folder / "kills", devices, service_s, looked_at, begun=begun)
    ended.set()
    killer.join()
    first: dict[str, float] = {}  # when each actor process came up
    for came, report in watched.came:
        first.setdefault(report.actor, came - report.up_s)
    away = [min(up for up in first.values() if up > blow) - blow for blow in blows]
    each = devices / PROCESSES
    gone = sum(each * lost(service_s, seconds) for seconds in away) / (devices * watched.span)
    found = {
        "devices": devices,
        "blows": len(blows),
        "away_s": away,
        "busy": watched.rate * service_s / devices,
        "expected_loss": gone,
    }
    print(f"  {found}", flush=True)
    return {"kills": found}


def _kill(kills: int, blows: list[float], begun: threading.Event, ended: threading.Event) -> None:
    """Ends one of this session's device processes every nine seconds."""
    begun.wait()
    for number in range(kills):
        if ended.wait(9.0 if number else 1.0):
            return
        _device_processes()[number % PROCESSES].send_signal(signal.SIGKILL)
        blows.append(time.time())


def _device_processes() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [process for process in children if "MapWorker" in " ".join(process.cmdline())]


def start_part(folder: Path, numbers: Sequence[int] = (1_000, 4_000, 16_000)) -> dict[str, Any]:
    """Seconds and memory of what grows with the number of shards, and of nothing else."""
    rows = []
    for number in numbers:
        before = psutil.Process().memory_info().rss
        seconds = {}
        started = time.perf_counter()
        tickets = pool._tickets(number)
        seconds["tickets"] = time.perf_counter() - started
        grown = psutil.Process().memory_info().rss - before
        job = ShardJob(
            "scores", Store(str(folder / f"start-{number}")), number, partial(FakeDevice, 0)
        )
        for index in range(number):
            commit(job, index, done())
        for name, call in (("missing", job.missing), ("counts", partial(total_counts, job))):
            started = time.perf_counter()
            call()
            seconds[name] = time.perf_counter() - started
        del tickets
        rows.append({"shards": number, "driver_mib": grown / 2**20, "seconds": seconds})
        print(f"  {rows[-1]}", flush=True)
    return {"start": rows}


def draw(figures: dict[str, Any], to: Path) -> None:
    """The model's curves with the measured points, filled where it was fitted on them."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot

    chart, axes = pyplot.subplots(figsize=(6.0, 3.2), layout="constrained")
    devices = np.unique(np.geomspace(8, LARGEST, 25).astype(int))
    for number, service_s in enumerate((0.2, 1.0, 8.0, 15.0, 60.0)):
        colour = f"C{number}"
        busy = [share(int(n), service_s, figures) for n in devices]
        axes.plot(devices, busy, color=colour, label=f"{service_s:g} s a shard")
        for row in figures["points"]:
            if row["service_s"] == service_s:
                filled = colour if row["devices"] <= 64 else "white"
                axes.plot(row["devices"], row["busy"], "o", mec=colour, mfc=filled, ms=5)
    axes.axhline(BUSY, color="grey", lw=0.8, ls=":")
    axes.set(xscale="log", xlabel="devices", ylabel="share of their time at work", ylim=(0, 1.05))
    axes.legend(fontsize=8)
    chart.savefig(to / "fleet.svg")


def main(
    part: Annotated[Literal["start", "kills", "fleet", "tickets", "all"], typer.Option()] = "all",
    plot: Annotated[Path | None, typer.Option(help="the folder for the fleet's picture")] = None,
) -> None:
    """Measures and prints; see the head of this file."""
    figures: dict[str, Any] = {"benchmark": "scale", "environment": measure.environment()}
    # Ray's workers give way to other processes by default; here those are the driver.
    fair = {"worker_niceness": 0}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        logging_level=logging.WARNING,
        _system_config=fair,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "start": start_part,
        "kills": kills_part,
        "fleet": fleet_part,
        "tickets": tickets_part,
    }
    try:
        with tempfile.TemporaryDirectory() as name:
            for each, measures in parts.items():
                if part in {each, "all"}:
                    figures |= measures(Path(name))
    finally:
        ray.shutdown()
    if plot is not None and "points" in figures:
        draw(figures, plot)
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
