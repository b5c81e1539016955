"""Ranks of one process group in; whether they compute what one process does, and how fast, out.

Each ZeRO stage trains four steps of weighted preferences; its losses, which know all updates before
them, are held against plain torch in one process.
"""

from __future__ import annotations

import os
import socket
import statistics
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import ray
import torch
import torch.distributed as dist

from cwpo_dist.check import tiny_models
from cwpo_dist.check.finding import Finding, Outcome, found
from cwpo_dist.config import TrainingConfig
from cwpo_dist.lm.load_settings import native_dtype
from cwpo_dist.lm.modules import AnswerLogProbs
from cwpo_dist.lm.probe import choose_layout
from cwpo_dist.planning.costs import timed
from cwpo_dist.scoring.devices import assigned_device, hide_other_gpus
from cwpo_dist.storage import Store
from cwpo_dist.training.loop import Engine, Run, gradients
from cwpo_dist.training.torch_engine import TorchEngine

if TYPE_CHECKING:
    from cwpo_dist.training.deepspeed_engine import DeepSpeedEngine

Stage = Literal[0, 1, 2, 3]

STEPS = 4
_PAIRS = 12
_RATE = 1e-3  # of learning: enough for losses to tell of it
# Relative error of a loss; in bf16 of what single precision says.
_LOSSES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_MIB = {"cpu": 16, "cuda": 256}  # of what is exchanged
_GIBI = 2**30
_TIMEOUT = timedelta(minutes=10)


class Rank:
    """One rank; lives in a Ray actor with the device that training would have."""

    def __init__(self) -> None:
        hide_other_gpus()

    def address(self) -> str:
        """Where the others meet, when this one is the first."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def check(self, rank: int, world: int, meet: str, shared: str | None) -> list[Finding]:
        """All parts; every rank runs them, and all find the same.

        Args:
            rank: of this one.
            world: how many there are.
            meet: the first one's address.
            shared: a folder that all of them see, for checkpoints; None: there is none.
        """
        device = assigned_device()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=meet, rank=rank, world_size=world, timeout=_TIMEOUT
        )
        parts: dict[str, Callable[[], Outcome]] = {"exchange": lambda: exchange(device)}
        for dtype in dict.fromkeys([torch.float32, native_dtype(device)]):
            parts |= {
                f"ZeRO {stage}, {_name(dtype)}": _zero(stage, dtype, device)
                for stage in _stages(dtype)
            }
        parts["resume"] = lambda: resume(device, shared)
        findings = [found(name, check) for name, check in parts.items()]
        dist.destroy_process_group()
        return findings


def exchange(device: torch.device) -> Outcome:
    """The sum of a tensor over all ranks: that it is one, and its bandwidth.

    Of n ranks each sends and receives 2 (n − 1) / n of a tensor in a ring: the formula by which a
    step's exchange of gradients can be told beforehand.
    """
    world, n_bytes = dist.get_world_size(), _MIB[device.type] * 2**20
    ours = torch.full((n_bytes // 4,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(ours)
    right = bool((ours == world * (world + 1) / 2).all())
    seconds = statistics.median(timed(device, lambda: dist.all_reduce(ours)) for _ in range(5))
    bandwidth = 2 * (world - 1) / world * n_bytes / seconds
    figures = {"ranks": world, "mib": _MIB[device.type], "gib_per_s": bandwidth / _GIBI}
    billion = 2 * (world - 1) / world * 4e9 / bandwidth if world > 1 else 0.0
    said = (
        f"{bandwidth / _GIBI:.2f} GiB/s over {world} ranks; gradients of a billion weights in "
        f"{billion:.1f} s"
    )
    return right, said, figures


def _zero(stage: Stage, dtype: torch.dtype, device: torch.device) -> Callable[[], Outcome]:
    def check() -> Outcome:
        engine = sharded(stage, dtype, device)
        ours, oracle = trained(engine), trained(alone(device))
        engine.close()
        error = max(abs(a - b) / abs(b) for a, b in zip(ours, oracle, strict=True))
        moved = abs(oracle[-1] - oracle[0]) / abs(oracle[0])
        right = error <= _LOSSES[dtype] and error < moved / 3
        said = f"losses off by {error:.1e}, which training moved by {moved:.1e}"
        return right, said, {"largest_error": error, "moved": moved, "losses": ours}

    return check


def resume(device: torch.device, shared: str | None) -> Outcome:
    """A checkpoint after two steps of ZeRO 2: what follows has the bits that it had without."""
    if shared is None:
        return None, "not checked: the ranks share no disk; give --storage", {}
    from cwpo_dist.training import checkpoint

    identity = checkpoint.RunIdentity("check", 0, "base")
    dtype = native_dtype(device)
    store = Store(shared)
    engine = sharded(2, dtype, device)
    trained(engine, 0, 2)
    saver = checkpoint.Saver(
        store, engine, identity, "check", save_total_limit=1, fence=lambda: None
    )
    saver.begin(2)
    saver.settle(wait=True)
    whole = trained(engine, 2)
    engine.close()
    dist.barrier()
    again = sharded(2, dtype, device)
    newest = checkpoint.newest(store)
    assert newest is not None, "it was committed above"
    checkpoint.load(newest, again, identity)
    after = trained(again, 2)
    again.close()
    error = max(abs(a - b) for a, b in zip(whole, after, strict=True))
    said = "the same bits" if error == 0.0 else f"losses off by {error:.1e}"
    return error <= 1e-6 * abs(whole[0]), said, {"largest_error": error}


def sharded(stage: Stage, dtype: torch.dtype, device: torch.device) -> DeepSpeedEngine:
    """A fresh model under DeepSpeed."""
    from cwpo_dist.training import deepspeed_engine as engine  # not above: it imports deepspeed

    config = _config(stage)
    module = AnswerLogProbs(tiny_models.policy(dtype, device))
    return engine.DeepSpeedEngine(module, config, engine.deepspeed_config(config, dtype))


def alone(device: torch.device) -> TorchEngine:
    """The same model in single precision, in this process."""
    module = AnswerLogProbs(tiny_models.policy(torch.float32, device))
    return TorchEngine(module, _config(0), device)


def trained(engine: Engine, first: int = 0, end: int = STEPS) -> list[float]:
    """The loss of each step of a training, from one step on."""
    given = tiny_models.rows(_PAIRS, (20, 60), (10, 50))
    task = tiny_models.preferences(given)
    module = engine.module
    assert isinstance(module, AnswerLogProbs), "as `sharded` and `alone` make it"
    layout = choose_layout(module, longest=128).layout
    run = Run(_config(0), 0, layout, 2)
    losses = []
    for step in range(first, end):
        result = gradients(task, engine, run, step, list(range(len(given))))
        engine.step(_RATE)
        losses.append(result.loss)
    return losses


def _config(stage: Stage) -> TrainingConfig:
    return TrainingConfig(
        learning_rate=_RATE,
        zero_stage=stage,
        global_batch_size=_PAIRS,
        max_tokens_per_micro_batch=512,
    )


def _stages(dtype: torch.dtype) -> list[Stage]:
    """Those that there are: without ZeRO gradients of bf16 cannot be summed in fp32."""
    return [0, 1, 2, 3] if dtype == torch.float32 else [1, 2, 3]


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
