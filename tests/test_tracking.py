"""Trackers: what was logged is read back by TensorBoard itself, over restarts and on S3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cwpo_dist.config import ConfigError, TrainingConfig
from cwpo_dist.config_file import parse_config
from cwpo_dist.storage import Store
from cwpo_dist.training import tracking
from cwpo_dist.training.worker import _progress

RECORD = {"step": 1, "loss": 0.5, "rewards/accuracies": 0.25, "eval_loss": 0.75}


def scalars(folder: str, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(folder)
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def open_runs(trackers: list[Any], stage: Store, start: int = 0) -> list[tracking.TrackedRun]:
    return tracking.open_runs(trackers, stage, "align-k", "identity", {"beta": 0.1}, start)


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path) -> None:
    """Steps after the last checkpoint come twice; TensorBoard keeps the later ones."""
    stage = Store(str(tmp_path))
    (first,) = open_runs(["tensorboard"], stage)
    for step in (1, 2, 3):
        first.log(RECORD | {"step": step, "loss": float(step)})
    first.flush()  # and never closed: it was killed
    (second,) = open_runs(["tensorboard"], stage, start=2)
    second.log(RECORD | {"step": 3, "loss": 30.0})
    second.close()
    folder = str(tmp_path / "tensorboard")
    assert scalars(folder, "train/loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert scalars(folder, "eval/loss")[-1] == (3, 0.75)
    assert scalars(folder, "train/rewards/accuracies")[0] == (1, 0.25)


def test_event_files_reach_object_storage(s3_store: Store, tmp_path: Path) -> None:
    (run,) = open_runs(["tensorboard"], s3_store)
    run.log(RECORD)
    run.flush()
    (name,) = s3_store.names("tensorboard")
    (tmp_path / Path(name).name).write_bytes(s3_store.read(name))
    assert scalars(str(tmp_path), "train/loss") == [(1, 0.5)]
    run.log(RECORD | {"step": 2})
    run.close()
    (tmp_path / Path(name).name).write_bytes(s3_store.read(name))
    assert len(scalars(str(tmp_path), "train/loss")) == 2


def test_a_tracker_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.PACKAGES, "wandb", "no_such_package")
    with pytest.raises(ConfigError, match=r"report_to: 'wandb' is not installed here; pip"):
        open_runs(["wandb"], Store("unused"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="mlflow needs MLFLOW_TRACKING_URI"):
        open_runs(["mlflow"], Store("unused"))


def test_report_to_as_people_write_it() -> None:
    given = {"learning_rate": 1.0}
    assert TrainingConfig(**given).report_to == ["tensorboard"]
    assert TrainingConfig(**given, report_to="wandb").report_to == ["wandb"]
    assert TrainingConfig(**given, report_to="none").report_to == []
    with pytest.raises(ValueError, match="tensorboard"):
        TrainingConfig(**given, report_to="comet")


def test_credentials_in_a_models_uri_are_refused() -> None:
    """Trackers are shown the model's name."""
    config = {
        "output_dir": "x",
        "prepare": {"sources": [{"path": "x"}]},
        "policy": {"model_name_or_path": "s3://key:secret@bucket/model"},
    }
    with pytest.raises(ConfigError, match=r"policy\.model_name_or_path: the URI carries cred") as e:
        parse_config(config)
    assert "secret" not in str(e.value)


def test_a_line_says_what_one_watches() -> None:
    record = RECORD | {"step": 5, "total_steps": 20, "grad_norm": 1.0, "learning_rate": 1e-5}
    record |= {"pairs_per_step": 8, "pairs_per_second": 2.0, "tokens_per_second": 1234.5}
    line = _progress(record | {"eval_rewards/accuracies": 0.625})
    assert line.startswith(
        "[=====               ] step 5/20  loss 0.5000  accuracy 25%  held out 62%"
    )
    assert line.endswith("1,234 tokens/s  0:01:00 left")
