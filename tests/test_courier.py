"""Trackers whose servers hang, refuse, die and return cost a training nothing and lose nothing."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlflow  # noqa: F401, as it takes seconds, which no courier of these tests shall need
import pytest
from conftest import ROOT
from mlflow_server import MlflowServer, running

from cwpo_dist.storage import Store
from cwpo_dist.training import courier, tracking
from cwpo_dist.training.courier import Courier, Stamped

RECORD = {"step": 1, "loss": 0.5, "rewards/accuracies": 0.25}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier, "RETRY_S", 0.2)
    monkeypatch.setattr(courier, "CLOSE_S", 30.0)
    monkeypatch.setattr(courier, "AWAY_S", 2.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    for name, value in tracking.MLFLOW_DEFAULTS.items():
        if name != "MLFLOW_HTTP_REQUEST_TIMEOUT":
            monkeypatch.setenv(name, value)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    with running(MlflowServer()) as started:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", started.url)
        yield started


def open_mlflow() -> Courier:
    (run,) = tracking.open_runs(["mlflow"], Store("unused"), "align-k", "id", {"beta": 0.1}, 0)
    return run


def log(run: Courier, *steps: int) -> None:
    """Logging never waits."""
    started = time.monotonic()
    for step in steps:
        run.log(RECORD | {"step": step, "loss": float(step)})
    assert time.monotonic() - started < 1.5


def steps(server: MlflowServer) -> list[int]:
    return sorted(step for key, step in server.metrics if key == "loss")


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_all_arrives_where_nothing_fails(
    server: MlflowServer, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_mlflow()
    log(run, *range(1, 121))  # more than a call takes
    run.close()
    assert steps(server) == list(range(1, 121))
    assert server.metrics["loss", 7] == 7.0
    assert server.metrics["rewards/accuracies", 7] == 0.25
    assert server.status == "FINISHED"
    assert warnings(caplog) == []


def test_a_resumed_run_goes_on_where_it_was(server: MlflowServer) -> None:
    first = open_mlflow()
    log(first, 1, 2, 3)
    first.close()
    second = open_mlflow()
    log(second, 3, 4)
    second.close()
    assert steps(server) == [1, 2, 3, 4]
    assert len(server.runs) == 1


@pytest.mark.parametrize("mood", ["hangs", "refuses"])
def test_a_server_that_is_unwell_is_said_once_and_gets_what_it_missed(
    mood: str, server: MlflowServer, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_mlflow()
    log(run, 1)
    wait_for(lambda: steps(server) == [1])
    server.mood = mood
    log(run, 2)
    asked = len(server.calls)
    wait_for(lambda: len(server.calls) > asked + 1)  # it was tried again
    log(run, 3)
    (said,) = warnings(caplog)
    assert said.startswith("mlflow: MlflowException: ")
    assert "training goes on, and it is tried again" in said
    server.mood = "well"
    wait_for(lambda: steps(server) == [1, 2, 3])
    run.close()
    assert warnings(caplog)[1:] == ["mlflow is back, and has what it missed"]


def test_a_server_that_dies_and_returns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even where it forgot the run."""
    with running(MlflowServer()) as first:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", first.url)
        run = open_mlflow()
        log(run, 1)
        wait_for(lambda: steps(first) == [1])
    log(run, 2, 3)
    wait_for(lambda: len(warnings(caplog)) == 1)
    with running(MlflowServer(first.server_port)) as second:
        wait_for(lambda: steps(second) == [2, 3])
        run.close()
    assert second.status == "FINISHED"


def test_closing_waits_a_few_seconds_at_most(
    server: MlflowServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "CLOSE_S", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    server.mood = "hangs"
    run = open_mlflow()
    log(run, 1, 2)
    started = time.monotonic()
    run.close()
    assert time.monotonic() - started < 4
    assert "mlflow: its last 2 records were not taken within" in warnings(caplog)[-1]
    server.gone.set()
    wait_for(lambda: all(t.name != "courier-mlflow" for t in threading.enumerate()))


def test_a_server_that_was_never_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    started = time.monotonic()
    run = open_mlflow()
    log(run, 1)
    wait_for(lambda: bool(warnings(caplog)))
    run.close()
    assert time.monotonic() - started < 30
    assert len(warnings(caplog)) == 2


class Stubborn:
    """Takes nothing until it is let; then it tells what it got."""

    def __init__(self) -> None:
        self.let, self.taken = threading.Event(), []

    def connect(self) -> None:
        if not self.let.is_set():
            raise SystemError("none of the kinds that clients announce\nand a page of text")

    def log(self, records: Sequence[Stamped]) -> None:
        self.taken += [(moment, record["step"]) for moment, record in records]

    def flush(self) -> None: ...

    def close(self) -> None:
        raise OSError("even this")


def test_what_waits_is_bounded_and_the_oldest_go(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(courier, "KEPT", 10)
    stubborn = Stubborn()
    run = Courier("some", stubborn)
    log(run, *range(25))
    last = time.time()
    time.sleep(0.3)
    stubborn.let.set()
    wait_for(lambda: len(stubborn.taken) == 10)
    assert [step for _, step in stubborn.taken] == list(range(15, 25))
    assert max(moment for moment, _ in stubborn.taken) <= last, "as it was logged, not as taken"
    run.close()
    assert "none of the kinds" in warnings(caplog)[0]
    assert "page of text" not in warnings(caplog)[0]
    assert "its last 15 records were not taken" in warnings(caplog)[-1]


def test_a_disk_that_takes_no_events_ends_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    (run,) = tracking.open_runs(["tensorboard"], Store(str(tmp_path)), "n", "id", {}, 0)
    log(run, 1)
    run.flush()
    run.close()
    assert "tensorboard: FileExistsError" in warnings(caplog)[0]


WANDB = """
import logging, os, sys, time
logging.basicConfig(format="%(message)s")
from cwpo_dist.storage import Store
from cwpo_dist.training import courier, tracking
courier.RETRY_S = 0.5
import wandb
(run,) = tracking.open_runs(["wandb"], Store("unused"), "align-k", "id", {"beta": 0.1}, 0)
for step in range(1, 4):
    started = time.monotonic()
    run.log({"step": step, "loss": 0.5})
    assert time.monotonic() - started < 1
    time.sleep(float(sys.argv[1]))
started = time.monotonic()
run.close()
print(f"closed in {time.monotonic() - started:.1f}", flush=True)
os._exit(0)  # as Ray ends a worker
"""


def wandb_run(folder: Path, pause: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, as W&B stays in one for good."""
    mine = {"WANDB_DIR": str(folder), "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WANDB, str(pause)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        env={**os.environ, **mine, **environment},
        timeout=200,
    )


def test_wandb_offline_keeps_all(tmp_path: Path) -> None:
    done = wandb_run(tmp_path, 0.1, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert "not taken" not in done.stderr
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-id.wandb")
    assert file.read_bytes().count(b"train/loss") >= 3


def test_wandb_whose_server_is_not_there(tmp_path: Path) -> None:
    key = "0123456789" * 4
    done = wandb_run(tmp_path, 5.0, WANDB_API_KEY=key, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("wandb: ")]
    assert sum("training goes on" in line for line in told) == 1, done.stderr
    assert float(done.stdout.rpartition("closed in ")[2]) < courier.CLOSE_S + 5
    assert key not in done.stdout + done.stderr
