"""Trackers: what was logged is read back by TensorBoard itself, over restarts and on S3."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cwpo_dist.config import TrainingConfig
from cwpo_dist.storage import Store
from cwpo_dist.training import tracking
from cwpo_dist.training.courier import Courier
from cwpo_dist.training.metrics_log import progress

RECORD = {"step": 1, "loss": 0.5, "rewards/accuracies": 0.25, "eval_loss": 0.75}


def scalars(folder: str, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(folder)
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def open_runs(trackers: list[Any], stage: Store, start: int = 0) -> list[Courier]:
    return tracking.open_runs(trackers, stage, "align-k", "identity", {"beta": 0.1}, start)


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path) -> None:
    """Steps after the last checkpoint come twice; TensorBoard keeps the later ones."""
    stage = Store(str(tmp_path))
    (first,) = open_runs(["tensorboard"], stage)
    for step in (1, 2, 3):
        first.log(RECORD | {"step": step, "loss": float(step)})
    first.flush()  # and never closed: it was killed
    folder = str(tmp_path / "tensorboard")
    wait_for(lambda: Path(folder).exists() and len(scalars(folder, "train/loss")) == 3)
    (second,) = open_runs(["tensorboard"], stage, start=2)
    second.log(RECORD | {"step": 3, "loss": 30.0})
    second.close()
    assert scalars(folder, "train/loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert scalars(folder, "eval/loss")[-1] == (3, 0.75)
    assert scalars(folder, "train/rewards/accuracies")[0] == (1, 0.25)


def test_event_files_reach_object_storage(s3_store: Store, tmp_path: Path) -> None:
    (run,) = open_runs(["tensorboard"], s3_store)
    run.log(RECORD)
    run.flush()
    wait_for(lambda: len(s3_store.names()) == 1)
    (name,) = s3_store.names("tensorboard")
    (tmp_path / Path(name).name).write_bytes(s3_store.read(name))
    assert scalars(str(tmp_path), "train/loss") == [(1, 0.5)]
    run.log(RECORD | {"step": 2})
    run.close()
    (tmp_path / Path(name).name).write_bytes(s3_store.read(name))
    assert len(scalars(str(tmp_path), "train/loss")) == 2


def test_what_a_tracker_lacks_is_known_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    mlflow, wandb = tracking.missing(["tensorboard", "mlflow", "wandb"])
    assert mlflow.startswith("'mlflow' needs MLFLOW_TRACKING_URI, which is not set")
    assert wandb.startswith("'wandb' needs WANDB_API_KEY, or `wandb login`")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking.missing(["mlflow"]) == []
    monkeypatch.setitem(tracking.PACKAGES, "wandb", "no_such_package")
    (absent,) = tracking.missing(["wandb"])
    assert absent.startswith("'wandb' is not installed here; pip install 'cwpo_dist[wandb]'")


@pytest.mark.parametrize(
    "given", ["key", "token", "offline", "netrc", "its own host", "wandb offline", "wandb login"]
)
def test_what_wandb_can_start_with(
    given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine example.org login user password 1234")
    netrc.chmod(0o600)
    assert tracking.missing(["wandb"])
    if given == "key":
        monkeypatch.setenv("WANDB_API_KEY", "k")
    if given == "token":
        monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", "file")
    if given == "offline":
        monkeypatch.setenv("WANDB_MODE", "offline")
    if given == "netrc":
        netrc.write_text("machine api.wandb.ai login user password 1234")
    if given == "its own host":
        monkeypatch.setenv("WANDB_BASE_URL", "https://example.org/")
    if given.startswith("wandb "):
        home = tmp_path / ("wandb" if given == "wandb offline" else ".config/wandb")
        home.mkdir(parents=True)
        line = "mode = offline" if given == "wandb offline" else "api_key = %1"
        (home / "settings").write_text(f"[default]\n{line}\n")
    assert tracking.missing(["wandb"]) == []


def test_a_node_without_a_tracker_trains_without_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(tracking.PACKAGES, "wandb", "no_such_package")
    assert open_runs(["wandb"], Store("unused")) == []
    assert "report_to: 'wandb' is not installed on this node: left out" in caplog.text


def test_report_to_as_people_write_it() -> None:
    given = {"learning_rate": 1.0}
    assert TrainingConfig(**given).report_to == ["tensorboard"]
    assert TrainingConfig(**given, report_to="wandb").report_to == ["wandb"]
    assert TrainingConfig(**given, report_to="none").report_to == []
    with pytest.raises(ValueError, match="tensorboard"):
        TrainingConfig(**given, report_to="comet")


def test_a_line_says_what_one_watches() -> None:
    record = RECORD | {"step": 5, "total_steps": 20, "grad_norm": 1.0, "learning_rate": 1e-5}
    record |= {"pairs_per_step": 8, "pairs_per_second": 2.0, "tokens_per_second": 1234.5}
    line = progress(record | {"eval_rewards/accuracies": 0.625})
    assert line.startswith(
        "[=====               ] step 5/20  loss 0.5000  accuracy 25%  held out 62%"
    )
    assert line.endswith("1,234 tokens/s  0:01:00 left")
