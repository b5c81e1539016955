"""The driver is SIGKILLed with work provably in flight; the same command then finishes the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_run import small_config, write_config

from cwpo_dist.config.load import load_config
from cwpo_dist.graph import graph
from cwpo_dist.planning.plan import plan

COMMAND = [sys.executable, "-m", "cwpo_dist.cli"]
PATIENCE_S = 240


def start(config: Path, log: Path, command: str = "run") -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen([*COMMAND, command, str(config)], stdout=output, stderr=output)


def finish(config: Path, log: Path, command: str = "run") -> None:
    """Runs a command of `cwpo` to its end."""
    process = start(config, log, command)
    assert process.wait(PATIENCE_S) == 0, log.read_text()[-4000:]


def kill_when(config: Path, log: Path, in_flight: Callable[[], bool]) -> None:
    """Starts the run and SIGKILLs its driver as soon as `in_flight` says so."""
    process = start(config, log)
    deadline = time.monotonic() + PATIENCE_S
    while not in_flight():
        assert process.poll() is None, f"it ended first: {log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def scores(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("annotate/*/scores/part-*.parquet")}


def curve(align: Path) -> dict[int, float]:
    """The loss of each step."""
    lines = map(json.loads, (align / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_driver_killed_in_three_places_ends_as_if_undisturbed(tmp_path: Path) -> None:
    changes = {"align__num_train_epochs": 6, "evaluate__num_prompts": 0}
    pool = {"num_actors": 1, "cpus_per_actor": 0.5}
    quiet_run, rough_run = tmp_path / "quiet", tmp_path / "rough"
    configs = []
    for run in (quiet_run, rough_run):
        config = small_config(tmp_path / "in", str(run), annotate=pool, **changes)
        config["prepare"]["rows_per_shard"] = 4
        configs.append(write_config(tmp_path / f"{run.name}.yaml", config))
    quiet, rough = configs
    planned = {stage.stage: stage for stage in plan(load_config(rough)).stages}
    nodes = graph(load_config(rough), "cw")
    log, quiet_log = tmp_path / "log", tmp_path / "quiet.log"
    # Beside the other one, as each waits a good deal; and to the last stage that is compared.
    with start(quiet, quiet_log, "align") as undisturbed:
        kill_when(rough, log, lambda: len(scores(rough_run)) >= 3)
        shards = len(list((rough_run / nodes["prepare"].path).glob("pairs/*.parquet")))
        assert 3 <= len(scores(rough_run)) < shards, "annotate was not in flight"
        assert not (rough_run / nodes["annotate"].path / "manifest.json").exists()

        kill_when(rough, log, (rough_run / nodes["weigh"].path / "manifest.json").exists)
        assert not (rough_run / nodes["align"].path / "manifest.json").exists()
        assert len(scores(rough_run)) == shards

        align, sizes = rough_run / nodes["align"].path, list[int]()

        def has_checkpoint() -> bool:
            commits = sorted(align.glob("checkpoints/*/commit.json"))
            newest = commits[-1].parent.iterdir() if commits else ()
            sizes.append(sum(file.stat().st_size for file in newest))
            return bool(commits)

        kill_when(rough, log, has_checkpoint)
        assert not (align / "manifest.json").exists(), "align was not in flight"
        held = load_config(rough).align.save_total_limit + 1
        assert sizes[-1] == pytest.approx(planned["align"].checkpoints / held, rel=0.2)

        finish(rough, log)
        assert "resuming" in log.read_text()
        assert (rough_run / "report.html").exists()
        assert not (align / "checkpoints").exists(), "only a training under way has a use for them"
        assert undisturbed.wait(PATIENCE_S) == 0, quiet_log.read_text()[-4000:]
    assert scores(rough_run) == scores(quiet_run), "byte for byte"
    ours, theirs = (run / nodes["align"].path for run in (rough_run, quiet_run))
    assert curve(ours) == pytest.approx(curve(theirs), abs=1e-6), "another order of data"
    after, before = (load_file(align / "model/model.safetensors") for align in (ours, theirs))
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert (tensor - before[name]).abs().max() < 1e-5, name
