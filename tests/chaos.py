"""Blows to a job on the local cluster, each with work provably in flight; what became of it.

`python tests/chaos.py FOLDER [FAULT:STAGE …]` does cells of the table fault × stage (all by
default), one after another, and adds a line to FOLDER/cells.jsonl for each.
`--blows N --seed S` instead draws N blows: which fault, which stage, and when.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chaos_drawn import FAULTS, STAGES, Blow, drawn, table
from safetensors.torch import load_file
from small_run import small_config, write_config
from tiny import save_tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cluster" / "local"))
import nodes

ALL = [Blow(fault, stage) for stage in STAGES for fault in FAULTS]
SCORING = {"annotate": "scores", "reference": "reference"}
WORKERS = 3  # nodes of one CPU each; a stage takes two of them
STEPS = 30  # of a training
MISSED_S = 20.0  # a cut lasts longer than it takes Ray to give a node up
PATIENCE_S = 600.0
# How Ray titles the processes that work.
TITLES = {"annotate": "MapWorker", "reference": "MapWorker", "fit": "RayTrainWorker"}
TITLES["align"] = TITLES["fit"]


class TooLate(AssertionError):
    """The stage was over before the blow fell."""


class LocalCluster:
    """A cluster of cluster/local, and jobs on it."""

    def __init__(self, workers: int, cpus: float) -> None:
        # Short, as Ray's sockets lie below it; and no cluster of anybody else's.
        self.state = Path(tempfile.gettempdir()) / f"cwpo-{os.getpid()}"
        made = nodes.bring_up(self.state, workers, cpus, loopback=False)
        self.workers = [node.name for node in made.nodes[1:]]
        self.client = nodes.client(made)

    @property
    def now(self) -> nodes.Cluster:
        """Its state."""
        return nodes.Cluster.load(self.state)

    def processes(self, node: str, title: str) -> list[int]:
        """The processes of a node whose title contains this."""
        pids = nodes.members(self.now, self.now.node(node))
        return [pid for pid in pids if title in _title(pid)]

    def at_work(self, title: str) -> dict[str, int]:
        """Node → a process of this title there."""
        found = {node: self.processes(node, title) for node in self.workers}
        return {node: pids[0] for node, pids in found.items() if pids}

    @property
    def driver(self) -> int:
        """The process of the job that runs; its shell has the same words in its title."""
        command = f"{sys.executable} -m cwpo_dist.cli"
        pids = nodes.members(self.now, self.now.head)
        found = [pid for pid in pids if _title(pid).startswith(command)]
        if not found:
            raise TooLate("the driver has ended")
        (driver,) = found
        return driver

    def submit(self, stage: str, config: Path, log: Path, **env: str) -> subprocess.Popen[bytes]:
        """`cwpo submit STAGE CONFIG`, followed."""
        command = [sys.executable, "-m", "cwpo_dist.cli", "submit", stage, str(config)]
        command += ["--python", sys.executable]
        with log.open("ab") as output:
            return subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | self.client | env
            )

    def finish(self, stage: str, config: Path, log: Path, **env: str) -> None:
        """The same, to its good end."""
        done = self.submit(stage, config, log, **env).wait(3 * PATIENCE_S)
        assert done == 0, log.read_text()[-4000:]

    def mend(self) -> None:
        """All nodes, as at the beginning."""
        try:
            nodes.mend(self.now)
        except nodes.ClusterError:  # Ray gives a node half a minute to start, a busy machine less
            nodes.mend(self.now)

    def renew(self) -> None:
        """The same, and no job runs any more."""
        nodes.mend(self.now)
        nodes.kill(self.now, "head", raylet_only=False)
        nodes.start(self.now, "head")

    def down(self) -> None:
        """All that it started has ended."""
        nodes.take_down(self.now)


@dataclass(frozen=True)
class Cell:
    """What became of one blow.

    Attributes:
        fault, stage: which.
        outcome: `finished` by itself, or `resumed` by the same command.
        recovery_s: from the blow on, the longest time without a commit of the stage.
        seconds: from the blow to the job's end.
        done, all: shards, or steps of the newest checkpoint, when it fell; of how many.
        lost, twice: files, steps and weights that the output lacks or has otherwise than the
            undisturbed run's, and that it has twice or too much.
    """

    fault: str
    stage: str
    outcome: str
    recovery_s: float
    seconds: float
    done: int
    all: int
    lost: list[object]
    twice: list[object]


def write_small(folder: Path, run: Path, actors: int) -> Path:
    """A run whose stages each take some seconds on two CPUs; its configuration file."""
    training = {"num_workers": 2, "cpus_per_worker": 1.0, "num_train_epochs": 30, "save_steps": 3}
    pool = {"num_actors": actors, "cpus_per_actor": 2 / actors}
    config = small_config(folder, str(run), sft=None, annotate=pool, reference=pool)
    if not (folder / "wide").exists():
        wide = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
        save_tiny(folder / "wide", "llama", **wide)
    config["prepare"] |= {"rows_per_shard": 1, "labelled_fraction": 0.5}
    for model in (config["weak"], config["policy"]):
        model["model_name_or_path"] = str(folder / "wide")
    config["weak"].pop("num_hidden_layers")
    for section in (config["fit"], config["align"]):
        section |= training | {"max_steps": STEPS, "learning_rate": 1e-4}
    return write_config(folder / f"{run.name}.yaml", config)


def undisturbed(cluster: LocalCluster, folder: Path, blow: Blow) -> Path:
    """The run that nothing befalls, made once, with this stage done."""
    quiet = folder / "quiet"
    config = write_small(folder, quiet, blow.actors)
    if not list(quiet.glob(f"{blow.stage}/*/manifest.json")):
        job = cluster.submit("align", config, folder / "quiet.log")
        assert job.wait(4 * PATIENCE_S) == 0, (folder / "quiet.log").read_text()[-4000:]
    return quiet


def disturbed(cluster: LocalCluster, folder: Path, blow: Blow) -> Cell:
    """Does one stage of the undisturbed run again, and lets the fault befall it."""
    quiet, run = undisturbed(cluster, folder, blow), folder / blow.name
    fault, stage = blow.fault, blow.stage
    log = folder / f"{run.name}.log"
    shutil.rmtree(run, ignore_errors=True)
    log.unlink(missing_ok=True)
    shutil.copytree(quiet, run, ignore=shutil.ignore_patterns("checkpoints"))
    shutil.rmtree(run / stage)
    config = write_small(folder, run, blow.actors)
    job = cluster.submit(stage, config, log)
    total = _progress(quiet, stage) if stage in SCORING else STEPS
    commits = 3 if blow.moment is None else int(blow.moment * total)
    victim = in_flight(cluster, run, stage, job, log, commits)
    started = time.monotonic()
    repair = strike(cluster, fault, victim, TITLES[stage])
    done = _progress(run, stage)
    if done == total or list(run.glob(f"{stage}/*/manifest.json")):
        raise TooLate("nothing was in flight")
    pause, since, last, outcome = 0.0, started, done, "finished"
    while True:
        if (now := _progress(run, stage)) > last:
            pause, since, last = max(pause, time.monotonic() - since), time.monotonic(), now
        if repair is not None and time.monotonic() - started > MISSED_S:
            repair = repair()
        code = job.poll()
        if code is not None and repair is None:
            if code == 0:
                break
            assert outcome == "finished", log.read_text()[-4000:]
            outcome, job = "resumed", cluster.submit(stage, config, log)
        assert time.monotonic() - started < PATIENCE_S, log.read_text()[-4000:]
        time.sleep(0.05)
    seconds = time.monotonic() - started
    lost, twice = differences(quiet, run, stage)
    if fault == "cut":  # Ray ends on it as soon as it hears that it was given up
        nodes.kill(cluster.now, victim[0], raylet_only=False)
    cluster.mend()
    took = round(pause, 1), round(seconds, 1)
    return Cell(fault, stage, outcome, *took, done, total, lost, twice)


def strike(
    cluster: LocalCluster, fault: str, victim: tuple[str, int], title: str
) -> Callable[[], None] | None:
    """Lets a fault befall the cluster; what undoes it later, if anything must."""
    node, pid = victim
    if fault == "worker":
        os.kill(pid, signal.SIGKILL)
    elif fault == "many":
        pids = [pid for each in cluster.workers for pid in cluster.processes(each, title)]
        for each in pids[: math.ceil(0.3 * len(pids))]:
            os.kill(each, signal.SIGKILL)
    elif fault == "stop":
        os.kill(pid, signal.SIGSTOP)

        def wake() -> None:
            with suppress(ProcessLookupError):  # Ray may have ended it meanwhile
                os.kill(pid, signal.SIGCONT)

        return wake
    elif fault == "raylet":
        nodes.kill(cluster.now, node, raylet_only=True)
    elif fault == "driver":
        os.kill(cluster.driver, signal.SIGKILL)
    elif fault == "cut":
        nodes.set_link(cluster.now, node, "down")

        def heal() -> None:
            assert pid in cluster.processes(node, title), "no zombie was left to come back"
            nodes.set_link(cluster.now, node, "up")

        return heal
    else:
        nodes.kill(cluster.now, "head", raylet_only=False)
        nodes.start(cluster.now, "head")
    return None


def differences(quiet: Path, run: Path, stage: str) -> tuple[list[object], list[object]]:
    """What a stage's output lacks or has otherwise, and what twice or too much."""
    (expected,), (found,) = (list(r.glob(f"{stage}/*/manifest.json")) for r in (quiet, run))
    expected, found = expected.parent, found.parent
    if stage in SCORING:
        before, after = (files(place / SCORING[stage]) for place in (expected, found))
        lost = [name for name in before if after.get(name) != before[name]]
        return lost, sorted(after.keys() - before.keys())
    lines = (found / "metrics.jsonl").read_text().splitlines()
    steps = Counter(json.loads(line)["step"] for line in lines)
    before, after = (load_file(p / "model" / "model.safetensors") for p in (expected, found))
    lost = [step for step in range(1, STEPS + 1) if step not in steps]
    lost += [n for n in before if n not in after or not after[n].equal(before[n])]
    twice = [step for step, times in steps.items() if times > 1 or step > STEPS]
    return lost, twice + sorted(after.keys() - before.keys())


def in_flight(
    cluster: LocalCluster,
    run: Path,
    stage: str,
    job: subprocess.Popen[bytes],
    log: Path,
    commits: int = 3,
) -> tuple[str, int]:
    """Waits for so many commits of a stage; a node that works on it, and a process there."""
    deadline = time.monotonic() + PATIENCE_S
    working: dict[str, int] = {}
    while not working:
        assert job.poll() in (None, 0), f"it ended first: {log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        if job.poll() == 0:
            raise TooLate("the job has ended")
        if _progress(run, stage) < commits:
            time.sleep(0.01)
            continue
        working = cluster.at_work(TITLES[stage])
    return max(working.items())


def _progress(run: Path, stage: str) -> int:
    """Committed shards, or the steps of the newest committed checkpoint."""
    if stage in SCORING:
        return len(list(run.glob(f"{stage}/*/{SCORING[stage]}/part-*.parquet")))
    commits = [p.parent.name for p in run.glob(f"{stage}/*/checkpoints/*/commit.json")]
    return max((int(name.split("-")[1]) for name in commits), default=0)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def main(folder: Path, blows: list[Blow]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cluster = LocalCluster(WORKERS, cpus=1)
    try:
        for blow in blows:
            cell: dict[str, Any] = asdict(blow)
            try:
                cell |= asdict(disturbed(cluster, folder, blow))
            except AssertionError as error:
                outcome = "too late" if isinstance(error, TooLate) else "failed"
                cell |= {"outcome": outcome, "why": str(error)[-3000:]}
                cluster.renew()
            with (folder / "cells.jsonl").open("a") as lines:
                lines.write(json.dumps(cell) + "\n")
    finally:
        cluster.down()
    sys.stdout.write(table([json.loads(line) for line in (folder / "cells.jsonl").open()]))


def asked() -> tuple[Path, list[Blow]]:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("cells", nargs="*", metavar="FAULT:STAGE")
    parser.add_argument("--blows", type=int, default=0, help="draw so many")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chosen = [Blow(*cell.split(":")) for cell in given.cells] or ALL
    return given.folder.absolute(), drawn(given.blows, given.seed) or chosen


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is taken down
    main(*asked())
