"""Groups of ranks that are stopped, killed, hang, or meet bad data, a full disk or no room."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import ray_task
import tiny
import torch
import torch.distributed as dist
import zero_cases
from mlflow.tracking import MlflowClient
from ray_task import Mishap
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cwpo_dist.config import ConfigError, ModelConfig
from cwpo_dist.lm.loading import load_policy
from cwpo_dist.stop_signals import Preempted
from cwpo_dist.storage import MANIFEST, StorageError, Store
from cwpo_dist.training import checkpoint, group, rank
from cwpo_dist.training.lease import Lease, LeaseHeld
from cwpo_dist.training.loop import NonFiniteLoss
from cwpo_dist.training.saving import NoRoom
from cwpo_dist.training.train_rank import TrainSpec

HANGING = """
import sys, time
from cwpo_dist.training.rank import Watchdog
dog = Watchdog(0.5)
dog.beat()
time.sleep(0.3)
dog.beat()
time.sleep(0.3)
print("alive", flush=True)
def stuck_in_a_collective():
    time.sleep(60)
stuck_in_a_collective()
"""


def test_a_hang_dumps_stacks_and_ends_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stdout == "alive\n"
    assert "stuck_in_a_collective" in done.stderr


@pytest.fixture(scope="module")
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this very process; DeepSpeed bears but one in a process's life."""
    folder = tmp_path_factory.mktemp("group")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)  # as Ray sets them
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture
def alone(group_of_one: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainSpec:
    """A stage that `run_rank` can run in this process."""
    tiny.save_tiny(tmp_path / "model", "llama")
    monkeypatch.setattr(rank, "get_device", lambda: torch.device("cpu"))
    # There is no Ray to ask, however slow the machine is.
    monkeypatch.setattr("cwpo_dist.training.rank_hooks.ASK_RAY_S", float("inf"))
    return zero_cases.make_spec("align-lora", tmp_path, num_workers=1)


def with_task(spec: TrainSpec, make_task: Any) -> TrainSpec:
    return replace(spec, make_task=make_task)


def test_bad_data_end_the_group_once(alone: TrainSpec) -> None:
    """The next group, which Ray starts unasked, ends at once and says why."""
    spec = with_task(alone, ray_task.nothing)
    with Lease.acquire(spec.store) as lease:
        with pytest.raises(ValueError, match="no pairs"):
            rank.run_rank(spec, lease.token)
        outcome = rank.run_rank(spec, lease.token)
    assert outcome["message"] == "TaskError: no pairs to train on: the test wants it so"
    with Lease.acquire(spec.store) as lease:  # a new driver tries anew
        assert rank.refusal(lease.token) is None


def test_what_another_driver_has_finished_is_left_alone(
    alone: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may commit after this one has looked, and before this one has the lease."""
    monkeypatch.setattr(group, "check_placement", lambda *_: None)
    alone.store.create_json(MANIFEST, {"counts": {"steps": 6}})
    summary = group.train(alone)
    assert summary["steps"] == 6
    assert not alone.store.names("checkpoints")
    with Lease.acquire(alone.store):
        pass  # it was given back


def test_a_training_is_done_though_its_scratch_may_not_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray Train's folder in an object store where a key may write alone."""
    trainer = Mock(return_value=Mock())
    trainer().fit().return_value = {"summary": {"steps": 6}}
    monkeypatch.setattr(group, "_trainer", trainer)
    monkeypatch.setattr(group, "check_placement", lambda *_: None)
    monkeypatch.setattr(group, "_told_while_waiting", lambda *_: nullcontext())
    monkeypatch.setattr(Store, "remove", Mock(side_effect=StorageError("access is denied")))
    spec = replace(zero_cases.make_spec("align-lora", tmp_path), known=Mock())
    monkeypatch.setattr(group, "model_fingerprint", lambda *_: "unread")
    assert group.train(spec)["steps"] == 6
    assert "stays: access is denied" in caplog.text


def test_a_full_disk_ends_the_export_once(
    alone: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line at the driver; the next command goes on where training was done."""

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("cwpo_dist.training.merge.save_file", full)
        with Lease.acquire(alone.store) as lease:
            with pytest.raises(NoRoom):
                rank.run_rank(alone, lease.token)
            message = rank.run_rank(alone, lease.token)["message"]
    assert re.match(
        r"NoRoom: output_dir: no room left in \S*/model .*os error 28.* same command", message
    )
    assert "\n" not in message
    found = checkpoint.newest(alone.store)
    assert found is not None
    assert found.step == 6
    with Lease.acquire(alone.store) as lease:
        outcome = rank.run_rank(alone, lease.token)
    assert outcome["summary"]["steps"] == 6
    exported = ModelConfig(model_name_or_path=alone.store.path("model"), max_length=64)
    assert load_policy(exported)


def test_non_finite_loss_needs_no_retry(alone: TrainSpec) -> None:
    with Lease.acquire(alone.store) as lease:
        outcome = rank.run_rank(with_task(alone, ray_task.poisoned), lease.token)
    assert outcome["error"] == NonFiniteLoss.__name__
    assert "step 4" in outcome["message"]
    found = checkpoint.newest(alone.store)
    assert found is not None
    assert found.step == 2, "the last good one, which was under way, is committed"


def test_checkpoints_by_the_clock(alone: TrainSpec) -> None:
    """With `save_minutes` they come between the steps of `save_steps`, too."""
    changes = {"save_steps": 1000, "save_minutes": 1e-6, "save_total_limit": 10}
    spec = replace(alone, config=alone.config.model_copy(update=changes))
    with Lease.acquire(spec.store) as lease:
        rank.run_rank(spec, lease.token)
    steps = {name.split("/")[1][:11] for name in spec.store.names("checkpoints")}
    assert {"step-000001", "step-000006"} < steps


def test_the_drivers_word_stops_workers(alone: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cwpo_dist.training.rank_hooks.ASK_DRIVER_S", 0.0)
    monkeypatch.setattr("cwpo_dist.training.rank_hooks.told_to_stop", threading.Event())
    with Lease.acquire(alone.store) as lease, group._stop_on_signal(lease.token):
        with pytest.raises(SystemExit):  # no rank has started: whoever answered before does
            os.kill(os.getpid(), signal.SIGTERM)  # to the driver
        assert not lease.token.asked_to_stop()
        lease.token.for_new_group(1.0)
        os.kill(os.getpid(), signal.SIGTERM)
        outcome = rank.run_rank(alone, lease.token)
    assert outcome["error"] == Preempted.__name__
    found = checkpoint.newest(alone.store)
    assert found is not None
    assert found.step == 1


def test_trackers_follow_a_run_over_its_restart(
    alone: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run in each tracker with every step once, held-out numbers among them, and no secret."""
    secret = "5ecret" * 7
    settings = {
        "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlflow",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_API_KEY": secret,
        "AWS_SECRET_ACCESS_KEY": secret,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    changes = {"report_to": ["tensorboard", "mlflow", "wandb"], "eval_steps": 3}
    config = alone.config.model_copy(update=changes)
    held_out = partial(zero_cases.load_task, "none")
    spec = replace(alone, config=config, make_held_out=held_out)
    monkeypatch.setattr("cwpo_dist.training.rank_hooks.ASK_DRIVER_S", 0.0)
    for stops in (True, False):
        stop = threading.Event()
        monkeypatch.setattr("cwpo_dist.training.rank_hooks.told_to_stop", stop)
        with Lease.acquire(spec.store) as lease:
            if stops:
                stop.set()
            outcome = rank.run_rank(spec, lease.token)
        assert ("error" in outcome) == stops
    records = [json.loads(line) for line in spec.store.read("metrics.jsonl").splitlines()]
    assert [record["step"] for record in records] == list(range(1, 7))
    assert [r["step"] for r in records if "eval_rewards/accuracies" in r] == [3, 6]
    losses = [(record["step"], pytest.approx(record["loss"])) for record in records]
    events = EventAccumulator(spec.store.path("tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == losses
    assert [event.step for event in events.Scalars("eval/kl")] == [3, 6]
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("cwpo_dist").experiment_id])
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in points] == losses
    assert run.data.params["learning_rate"] == str(config.learning_rate)
    offline = [path.name.split("-")[-1] for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(set(offline)) == 1, "one identity for both attempts"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_stopped_killed_and_finished(ray_local: Any, tmp_path: Path) -> None:
    """SIGTERM to one rank, a rerun, SIGKILL of the other: the same weights as one plain process.

    Both befall a rank in the middle of a step, its forward pass done and its backward not.
    """
    tiny.save_tiny(tmp_path / "model", "llama", tie_word_embeddings=True)
    spec = zero_cases.make_spec("align-lora", tmp_path, cpus_per_worker=0.5)
    mishaps = (Mishap("SIGTERM", 1, 1, tmp_path), Mishap("SIGKILL", 0, 3, tmp_path))
    spec = with_task(spec, partial(ray_task.preferences, mishaps=mishaps))
    watched = spec.config.model_copy(update={"eval_steps": 3})
    spec = replace(spec, config=watched, make_held_out=partial(zero_cases.load_task, "none"))
    with Lease.acquire(spec.store), pytest.raises(LeaseHeld):
        group.train(spec)
    with pytest.raises(Preempted, match="checkpoint at step 2 of 6"):
        group.train(spec)
    summary = group.train(spec)
    assert (summary["steps"], summary["rows"]) == (6, zero_cases.N_ROWS)
    assert {path.name for path in tmp_path.glob("SIG*")} == {"SIGTERM-1-1", "SIGKILL-0-3"}
    records = [json.loads(line) for line in spec.store.read("metrics.jsonl").splitlines()]
    assert [record["step"] for record in records] == list(range(1, 7))
    assert ["eval_loss" in record for record in records] == [False, False, True] * 2
    events = EventAccumulator(spec.store.path("tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 7))
    adapter = load_file(spec.store.path("adapter/adapter_model.safetensors"))
    ours = {name.replace(".weight", ".default.weight"): value for name, value in adapter.items()}
    zero_cases.assert_close(ours, zero_cases.oracle_weights("align-lora", tmp_path))


def test_what_can_never_be_placed_is_refused(ray_local: Any, tmp_path: Path) -> None:
    tiny.save_tiny(tmp_path / "model", "llama")
    spec = zero_cases.make_spec("align", tmp_path, num_workers=3, cpus_per_worker=2.0)
    with pytest.raises(ConfigError, match=r"align\.num_workers: at least 3, .* room for 2"):
        group.train(spec)
    assert not Store(str(tmp_path)).names("stages")
