"""Models go to the device that Ray reserved, and to no other; the GPUs here are faked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from tiny import save_tiny

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.load_settings import dtype_of
from cwpo_dist.scoring import scorers
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.devices import use_own_processors
from cwpo_dist.scoring.scorers import AnswerWorker, ReferenceWorker, RewardWorker
from cwpo_dist.storage import Store
from cwpo_dist.training.meter import named_peak

# A Ray of its own with eight GPUs that are none, once as if CUDA worked and once as it is.
SCRIPT = """
import json, os, sys
import ray, torch
from cwpo_dist.scoring.devices import assigned_device, hide_other_gpus

def seen(works):
    hide_other_gpus()
    torch.cuda.is_available = lambda: works
    try:
        found = str(assigned_device())
    except RuntimeError as error:
        found = f"{type(error).__name__}: {error}"
    return found, os.environ.get("CUDA_VISIBLE_DEVICES")

def found(works):
    torch.cuda.is_available = lambda: works
    return str(assigned_device())

told = {works: [found(works)] for works in (True, False)}
ray.init(num_cpus=4, num_gpus=8, include_dashboard=False, log_to_driver=False)
for works, lines in told.items():
    asked = [ray.remote(num_gpus=gpus)(seen).remote(works) for gpus in (0, 1, 0.5, 2)]
    lines += [found(works), *ray.get(asked)]
print(json.dumps([told[True], told[False]]))
"""


def test_an_actor_uses_what_ray_reserved_for_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    works, is_broken = json.loads(done.stdout.splitlines()[-1])
    check(works, cuda_works=True)
    check(is_broken, cuda_works=False)


def check(told: list[Any], *, cuda_works: bool) -> None:
    without_ray, driver, none, one, half, two = told
    assert without_ray == ("cuda" if cuda_works else "cpu")
    assert driver == "cpu", "nothing is reserved for a driver"
    assert none == ["cpu", ""], "it sees none, whatever the node has"
    for device, visible in (one, half, two):
        assert len(visible.split(",")) == (2 if [device, visible] == two else 1)
        if cuda_works:
            assert device == "cuda"
            continue
        assert device.startswith("DeviceError: Ray reserved GPU ")
        assert f"torch {torch.__version__}" in device
        assert "NVIDIA driver" in device
        assert device.endswith("or set gpus_per_actor to 0")


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(("processors", "own"), [(1, ["false", None]), (2, ["true", "2"])])
def test_an_actors_tokenizer_uses_its_own_processors(processors: int, own: list[Any]) -> None:
    def seen() -> list[str | None]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as cluster/ sets it
        os.environ.pop("RAYON_NUM_THREADS", None)
        use_own_processors()
        return [os.environ.get(name) for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS")]

    task: Any = ray.remote(num_cpus=processors, max_calls=1)(seen)
    assert ray.get(task.remote()) == own


class Loaded(Exception):
    """Says where a model was to go."""


@pytest.mark.parametrize("worker", ["reward", "reference", "answers"])
def test_every_worker_loads_its_model_to_that_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: str
) -> None:
    save_tiny(tmp_path, "llama")
    model, store = ModelConfig(model_name_or_path=str(tmp_path)), Store(str(tmp_path / "none"))
    device = torch.device("cuda")

    def load(model: ModelConfig, *, device: torch.device) -> Any:
        raise Loaded(device, dtype_of(model, device))

    monkeypatch.setattr(scorers, "assigned_device", lambda: device)
    monkeypatch.setattr(scorers, "load_policy", load)
    monkeypatch.setattr(scorers, "load_reward_model", load)
    make = {
        "reward": lambda: RewardWorker(AnswersIn(store), model, "rm", 512),
        "reference": lambda: ReferenceWorker(AnswersIn(store), store, model, 512),
        "answers": lambda: AnswerWorker(store, model, {}, together=4),
    }[worker]
    with pytest.raises(Loaded) as said:
        make()
    assert said.value.args == (device, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_gpus_peak_is_its_own(name: str, peak: float | None) -> None:
    assert named_peak(name) == peak
