"""Checkpoints: resumed equals uninterrupted, at any stage and world size; commits are atomic."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import zero_cases
import zero_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zero_cases import ACROSS_STAGES, BF16_CASE, RESUME_CASES, Case

from cwpo_dist.config import TrainingConfig
from cwpo_dist.storage import StorageError, Store
from cwpo_dist.training import checkpoint, shards
from cwpo_dist.training.checkpoint import Checkpoint, CheckpointError, RunIdentity, Saver
from cwpo_dist.training.lease import Lease, LeaseLost
from cwpo_dist.training.shards import DamagedShard
from cwpo_dist.training.torch_engine import TorchEngine

IDENTITY = RunIdentity("key", 0, "base")
CONFIG = TrainingConfig(learning_rate=0.1)

pytestmark = pytest.mark.usefixtures("rank_results")


def weights(case: Case, name: str) -> dict[str, Tensor]:
    return dict(load_file(zero_ranks.results() / f"{case.name}.{name}.safetensors"))


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.parametrize("case", [*RESUME_CASES, BF16_CASE], ids=lambda case: case.name)
def test_resume_equals_uninterrupted(case: Case) -> None:
    """Bit for bit, at the same world size and stage."""
    assert distance(weights(case, "2.whole"), weights(case, "2.from2")) == 0


@pytest.mark.parametrize("case", RESUME_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("world", "before"), [(1, 2), (2, 1)])
def test_resume_at_another_world_size(case: Case, world: int, before: int) -> None:
    """As if the world had never changed, but for the order of sums; with two parameter groups."""
    whole, resumed = weights(case, f"{before}.whole"), weights(case, f"{world}.from{before}")
    assert distance(whole, resumed) < 1e-5


@pytest.mark.parametrize(("name", "of"), ACROSS_STAGES)
def test_resume_at_another_zero_stage(name: str, of: str) -> None:
    cases = {case.name: case for case in RESUME_CASES}
    assert distance(weights(cases[of], "2.whole"), weights(cases[name], f"2.from2{of}")) < 1e-5


@pytest.mark.parametrize("case", RESUME_CASES, ids=lambda case: case.name)
def test_checkpoints_are_tried_on_decayed_and_undecayed_parameters(case: Case) -> None:
    """Full fine-tuning has two parameter groups, of unequal decay."""
    engine = zero_cases.oracle(case, zero_ranks.results())
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    assert decays == ([0.1] if case.lora else [0.1, 0.0])


def test_all_stages_end_alike() -> None:
    stages = [case for case in RESUME_CASES if case.task == "prompt" and not case.lora]
    first, *others = (weights(case, "2.whole") for case in stages)
    assert len(others) == 4, "ranks that share sequences among them"
    assert all(distance(first, other) < 1e-4 for other in others)


def test_a_checkpoint_holds_what_the_loss_has_learned() -> None:
    """Which is far from where it began, and the same for any number of ranks."""
    case = next(case for case in RESUME_CASES if case.task == "learning")
    held = []
    for world in (1, 2):
        found = checkpoint.newest(Store(str(zero_ranks.results() / f"{case.name}.{world}")))
        assert found is not None
        held += found.learned
    assert held == pytest.approx([held[0]] * 2, abs=1e-6)
    assert abs(held[0] - 0.4) > 0.02
    assert abs(float(weights(case, "2.whole")["learned"]) - held[0]) > 0.005


def test_lora_checkpoint_holds_the_adapter_alone() -> None:
    case = next(case for case in RESUME_CASES if case.lora)
    found = checkpoint.newest(Store(str(zero_ranks.results() / f"{case.name}.2")))
    assert found is not None
    assert found.files == ("shard-00000.safetensors", "shard-00001.safetensors")
    names = {name for file in found.shards() for name, *_ in file.stretches}
    assert names
    assert all(".lora_" in name for name in names)


def make_engine(seed: int = 0) -> TorchEngine:
    torch.manual_seed(seed)
    return TorchEngine(nn.Linear(3, 2), CONFIG)


def save(store: Store, step: int, attempt: str = "a", **changes: object) -> None:
    arguments = {"save_total_limit": 2, "fence": lambda: None} | changes
    saver = Saver(store, make_engine(step), IDENTITY, attempt, **arguments)
    saver.begin(step)
    saver.settle(wait=True)


def folders(store: Store) -> list[str]:
    return sorted({name.split("/")[1] for name in store.names("checkpoints")})


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is the state of its step, committed when it is written; one at a time."""
    gate = threading.Event()

    def slow(*arguments: Any, **options: Any) -> None:
        assert gate.wait(60)
        save_file(*arguments, **options)

    monkeypatch.setattr(shards, "save_file", slow)
    store, engine = Store(str(tmp_path)), make_engine(3)
    saver = Saver(store, engine, IDENTITY, "a", save_total_limit=2, fence=lambda: None)
    saver.begin(3)
    engine.module.weight.data.zero_()
    saver.settle()
    assert not saver.news
    assert checkpoint.newest(store) is None
    gate.set()
    saver.begin(4)  # waits for the one before
    found = checkpoint.newest(store)
    assert found is not None
    assert found.step == 3
    again = make_engine(seed=99)
    checkpoint.load(found, again, IDENTITY)
    assert torch.equal(again.module.weight, make_engine(3).module.weight)
    saver.settle(wait=True)
    assert folders(store) == ["step-000003-a", "step-000004-a"]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_write_parts_that_make_a_whole(tmp_path: Path, world: int) -> None:
    """Six weights and two biases, also by more ranks than there are numbers."""
    store = Store(str(tmp_path)).child("checkpoints", "step-000004-a")
    files = []
    for rank in range(world):
        engine = make_engine(4)
        engine.rank, engine.world_size = rank, world
        files.append(f"shard-{rank:05d}.safetensors")
        checkpoint._copied(engine).write(store, files[-1])
    store.create_json("commit.json", {"step": 4, "files": files, **vars(IDENTITY)})
    found = checkpoint.newest(Store(str(tmp_path)))
    assert found is not None
    assert sum(length for f in found.shards() for *_, length in f.stretches) == 8
    again = make_engine(seed=99)
    checkpoint.load(found, again, IDENTITY)
    assert torch.equal(again.module.weight, make_engine(4).module.weight)
    assert torch.equal(again.module.bias, make_engine(4).module.bias)
    if world > 1:
        missing = Checkpoint(found.store, 4, found.files[1:])
        with pytest.raises(CheckpointError, match=r"of the 6 numbers of weight \(parameters\)"):
            checkpoint.load(missing, make_engine(), IDENTITY)


def test_newest_counts_whole_commits_only(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert checkpoint.newest(store) is None
    for step in (3, 6, 9):
        save(store, step, save_total_limit=5)
    store.remove("checkpoints/step-000009-a/commit.json")
    store.remove("checkpoints/step-000006-a/shard-00000.safetensors")
    found = checkpoint.newest(store)
    assert found is not None
    assert found.step == 3
    engine = make_engine(seed=99)
    checkpoint.load(found, engine, IDENTITY)
    assert torch.equal(engine.module.weight, make_engine(3).module.weight)
    assert all(float(state["step"]) == 3 for state in engine.optimizer.state.values())


@pytest.mark.parametrize("left", [0, 4, 20, -36, -8, -4, 4096])
def test_a_damaged_file_is_refused_by_name_whatever_is_left_of_it(
    tmp_path: Path, left: int
) -> None:
    """Of all its bytes, or of its end; one number that is left would fill a whole bias."""
    store = Store(str(tmp_path))
    save(store, 4)
    found = checkpoint.newest(store)
    assert found is not None
    file = Path(found.store.path(found.files[0]))
    whole = file.read_bytes()
    file.write_bytes(whole[:left] if left < 4096 else whole.ljust(left, b" "))
    with pytest.raises(DamagedShard, match=r"shard-00000\.safetensors is damaged.*older one"):
        checkpoint.load(found, make_engine(), IDENTITY)


def test_keeps_the_newest_and_no_litter(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write("checkpoints/step-000002-dead/shard-00000.safetensors", b"half")
    for step in (1, 2, 3):
        save(store, step)
    assert folders(store) == ["step-000002-a", "step-000003-a"]


def test_what_is_left_beside_a_committed_output_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """But not while a driver is at work there, and what storage keeps is no fault of the run."""
    store = Store(str(tmp_path))
    checkpoint.clear(store)
    assert store.names() == [], "nothing to do, and no trace"
    save(store, 4)
    with Lease.acquire(store):
        checkpoint.clear(store)
    assert folders(store) == ["step-000004-a"]
    with monkeypatch.context() as patch:
        patch.setattr(Store, "remove", Mock(side_effect=PermissionError("it is not yours")))
        checkpoint.clear(store)
    assert "is of no more use, but stays: it is not yours" in caplog.text
    checkpoint.clear(store)
    assert folders(store) == []


def test_training_goes_on_where_nobody_may_remove_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a key that may write alone: each checkpoint is committed, and the oldest stay."""
    store = Store(str(tmp_path))
    monkeypatch.setattr(Store, "remove", Mock(side_effect=StorageError("access is denied")))
    for step in (1, 2, 3, 4):
        save(store, step)
    found = checkpoint.newest(store)
    assert found is not None
    assert found.step == 4
    assert len(folders(store)) == 4
    assert caplog.text.count("but stays: access is denied") == 2, "once a checkpoint"


def test_attempts_never_mix(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    save(store, 4, "a", save_total_limit=5)
    save(store, 4, "b", save_total_limit=5)
    assert folders(store) == ["step-000004-a", "step-000004-b"]


def test_a_zombie_commits_nothing(tmp_path: Path) -> None:
    def lost() -> None:
        raise LeaseLost("taken over")

    store = Store(str(tmp_path))
    save(store, 1)
    with pytest.raises(LeaseLost):
        save(store, 2, fence=lost)
    found = checkpoint.newest(store)
    assert found is not None
    assert found.step == 1


def test_refused_writes_leave_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    save(store, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    saver = Saver(store, make_engine(), IDENTITY, "a", save_total_limit=2, fence=lambda: None)
    saver.begin(2)
    while not saver.news:
        time.sleep(0.01)
    with pytest.raises(StorageError, match="No space left"):
        saver.settle()
    found = checkpoint.newest(store)
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize("call", ["mkdir", "open", "fsync"])
def test_a_folder_that_another_driver_removes_meanwhile_is_said_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Who was stopped, and followed, wakes where the one that followed tidies up."""
    store = Store(str(tmp_path))

    def gone(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    begun = checkpoint._copied(make_engine())
    monkeypatch.setattr(os, call, gone)
    with pytest.raises(StorageError, match="No such file"):
        begun.write(store.child("checkpoints", "step-000001-a"), "shard-00000.safetensors")


@pytest.mark.parametrize("changed", ["key", "seed", "base"])
def test_another_run_is_refused(tmp_path: Path, changed: str) -> None:
    store = Store(str(tmp_path))
    save(store, 1)
    found = checkpoint.newest(store)
    assert found is not None
    other = RunIdentity(**(vars(IDENTITY) | {changed: 7}))
    with pytest.raises(CheckpointError, match=changed):
        checkpoint.load(found, make_engine(), other)


def test_on_object_storage(s3_store: Store) -> None:
    save(s3_store, 5)
    found = checkpoint.newest(s3_store)
    assert found is not None
    engine = make_engine(seed=99)
    checkpoint.load(found, engine, IDENTITY)
    assert torch.equal(engine.module.weight, make_engine(5).module.weight)
