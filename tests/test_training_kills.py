"""Training under blows at random moments ends with the weights of an undisturbed run. Long forms.

The short ones, each at one moment: test_ranks.py (a rank told to stop, a rank killed, a hang, a
loss that is not finite), test_kills.py (the driver), test_lease.py (a second driver).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import elastic
import pytest
import ray_task
import tiny
import zero_cases
from ray_task import Mishap
from torch import Tensor
from zero_cases import Case

from cwpo_dist.lm.loading import load_policy
from cwpo_dist.stop_signals import Preempted
from cwpo_dist.training import group
from cwpo_dist.training.loop import Hooks, train
from cwpo_dist.training.train_rank import TrainSpec

pytestmark = pytest.mark.long
FULL = Case("full", 3, optim="adamw", steps=12)


def by_one_process(folder: Path, case: Case) -> dict[str, Tensor]:
    engine = zero_cases.oracle(case, folder)
    train(zero_cases.make_task(case.task), engine, zero_cases.make_run(case), Hooks())
    return {n.removeprefix("model."): p.detach() for n, p in engine.module.named_parameters()}


def undisturbed(folder: Path, case: Case) -> dict[str, Tensor]:
    """By as many workers: AdamW makes much of how sums are split where a gradient is near 0."""
    tiny.save_tiny(folder / "model", "llama")
    spec = zero_cases.make_spec(case, folder, cpus_per_worker=0.5)
    group.train(spec)
    return exported(spec)


def exported(spec: TrainSpec) -> dict[str, Tensor]:
    model = spec.model.model_copy(update={"model_name_or_path": spec.store.path("model")})
    return {name: p.detach() for name, p in load_policy(model).named_parameters()}


def assert_ends_alike(folder: Path, case: Case, wanted: dict[str, Tensor]) -> None:
    spec = zero_cases.make_spec(case, folder)
    for name, parameter in exported(spec).items():
        assert float((parameter - wanted[name]).abs().max()) < 1e-5, name
    records = [json.loads(line) for line in spec.store.read("metrics.jsonl").splitlines()]
    assert [record["step"] for record in records] == list(range(1, case.steps + 1))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(3))
def test_ranks_killed_stopped_and_frozen(ray_local: Any, tmp_path: Path, seed: int) -> None:
    """SIGKILL, SIGSTOP (which the watchdogs of the others end) and SIGTERM, in any order."""
    tiny.save_tiny(tmp_path / "model", "llama")
    draw = random.Random(seed)
    kinds = ["SIGKILL", "SIGSTOP", "SIGTERM"]
    mishaps = tuple(
        Mishap(kind, draw.randrange(2), draw.randrange(4), tmp_path)
        for kind in draw.sample(kinds, 3)
    )
    spec = zero_cases.make_spec(FULL, tmp_path, cpus_per_worker=0.5, step_timeout_s=60)
    spec = replace(spec, make_task=partial(ray_task.preferences, mishaps=mishaps))
    for _ in kinds:
        try:
            group.train(spec)
            break
        except Preempted:
            continue
    assert {path.name.split("-")[0] for path in tmp_path.glob("SIG*")} == set(kinds)
    assert_ends_alike(tmp_path, FULL, undisturbed(tmp_path / "quiet", FULL))


@pytest.mark.timeout(600)
def test_a_lost_node_shrinks_the_group_and_a_new_one_grows_it(tmp_path: Path) -> None:
    """`num_workers: [1, 2]`: a raylet is killed; steps 2, then 1, then 2 workers wide."""
    tiny.save_tiny(tmp_path / "model", "llama")
    log = (tmp_path / "log").open("w")
    script = [sys.executable, elastic.__file__, str(tmp_path)]
    done = subprocess.run(script, stdout=log, stderr=log, timeout=540, check=False)
    assert done.returncode == 0, (tmp_path / "log").read_text()[-4000:]
    marks = sorted(tmp_path.glob("world-*"), key=lambda path: int(path.name.split("-")[2]))
    worlds = [path.name.split("-")[1] for path in marks]
    changes = [world for i, world in enumerate(worlds) if i == 0 or worlds[i - 1] != world]
    assert changes == ["2", "1", "2"]
    assert_ends_alike(tmp_path, elastic.CASE, by_one_process(tmp_path, elastic.CASE))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2))
def test_a_driver_killed_at_random_moments(tmp_path: Path, seed: int) -> None:
    """SIGKILL after some seconds, three times; the next driver follows at once."""
    tiny.save_tiny(tmp_path / "model", "llama")
    draw = random.Random(seed)
    script = [sys.executable, elastic.__file__, str(tmp_path), "alone"]
    with (tmp_path / "log").open("w") as log:
        for _ in range(3):
            driver = subprocess.Popen(script, stdout=log, stderr=log)
            time.sleep(draw.uniform(12, 30))
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
        (tmp_path / "hurry").touch()
        assert (
            subprocess.run(script, stdout=log, stderr=log, timeout=300, check=False).returncode == 0
        )
    assert_ends_alike(tmp_path, elastic.CASE, by_one_process(tmp_path, elastic.CASE))
