"""Bytes that a training step sends, by ZeRO stage: counted on a network interface, against theory.

Usage: python benchmarks/wire.py [--help]   (as root: for two network namespaces)

Two ranks of gloo, fp32, each in a namespace of its own, train a small random Llama through the
project's engine. The interface's own counters are read around each step, so headers and
acknowledgements count. --expect measures nothing: it prints what the formulas say of real clusters.
The last line is one JSON object with all figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process, decided before torch

import measure
import numpy as np
import torch
import torch.distributed as dist
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from cwpo_dist.config import LoraConfig, ModelConfig, TrainingConfig
from cwpo_dist.lm.loading import load_policy
from cwpo_dist.lm.modules import AnswerLogProbs
from cwpo_dist.lm.rows import Row
from cwpo_dist.training.loop import Run, gradients
from cwpo_dist.training.lora import add_lora
from cwpo_dist.training.tasks import Sft

RANKS = 2
NETWORK = "10.213.77"  # of the two namespaces
STEPS = 3  # after a first one, which is not counted
TOKENS = 32  # of a row


@dataclass(frozen=True)
class Case:
    """A set-up; a step has so many micro-batches on each rank."""

    stage: int
    micro_batches: int
    lora: bool = False


CASES = [
    *(Case(stage, micro) for stage in range(4) for micro in (1, 3)),
    *(Case(stage, 1, lora=True) for stage in (0, 3)),
]


def parts(stage: int, micro_batches: int, trained: int, frozen: int, scatter: int = 1) -> float:
    """Numbers that a rank sends in a step, over (R−1)/R for R ranks, by the ring algorithms.

    An all-gather or a reduce-scatter of n numbers sends (R−1)/R·n from each rank, an all-reduce
    twice as many. Stage 0 all-reduces the gradient once a step. Stage 1 reduce-scatters it once and
    gathers the weights. Stage 2 reduce-scatters it in every micro-batch, for it keeps its own part
    alone. Stage 3 also gathers all weights, frozen ones too, forward and backward.

    Args:
        stage: of ZeRO.
        micro_batches: of a step, on each rank.
        trained: parameters with gradients.
        frozen: those without.
        scatter: 2 where an all-reduce stands in for the reduce-scatter, as gloo has none.
    """
    sent: dict[int, float] = {
        0: 2 * trained,
        1: scatter * trained + trained,
        2: scatter * trained * micro_batches + trained,
        3: micro_batches * (scatter * trained + 2 * (trained + frozen)),
    }
    return sent[stage]


@dataclass(frozen=True)
class Setting:
    """A training whose efficiency is to be foretold; not one that was run.

    Attributes:
        parameters: of the policy.
        trained: of them, that learn.
        tokens: of a global batch.
        peak: FLOP/s of one GPU at work, so the rate of a matrix product × what training reaches.
    """

    name: str
    parameters: float
    trained: float
    tokens: float
    peak: float = 400e12


SETTINGS = [
    Setting("7B, full", 7e9, 7e9, 2**17),
    Setting("7B, LoRA of 20M", 7e9, 2e7, 2**17),
    Setting("70B, LoRA of 100M", 70e9, 1e8, 2**19),
]
# Bytes a second that a ring passes on, at 80 % of the line: from GPU to GPU within a node of eight,
# and from node to node, where it crosses once whatever the number of GPUs in a node.
NVLINK = 360e9
NETWORKS = {"8 × 400 Gb/s a node": 320e9, "100 Gb/s a node": 10e9}
GPUS = (8, 16, 32, 64, 128, 256, 512)
MICRO_TOKENS = 2**13


def expected(setting: Setting, stage: int, network: float, ranks: int) -> tuple[float, float]:
    """The share of compute in a step: nothing overlapped, and all that can be.

    compute = k·P·T / (R·peak), with k = 6 for full fine-tuning and 4 for LoRA;
    wire = 2 bytes · parts · (R−1)/R / bandwidth. The share lies between c / (c + w) and
    c / max(c, w).
    Latency, and waiting for the slowest rank, are left out.
    """
    work = 6 if setting.trained == setting.parameters else 4
    compute = work * setting.parameters * setting.tokens / (ranks * setting.peak)
    micro = max(1, round(setting.tokens / ranks / MICRO_TOKENS))
    frozen = setting.parameters - setting.trained
    numbers = parts(stage, micro, int(setting.trained), int(frozen))
    wire = 2 * numbers * (ranks - 1) / ranks / (NVLINK if ranks <= 8 else network)
    return compute / (compute + wire), compute / max(compute, wire)


def expectations() -> list[dict[str, Any]]:
    """A row a setting, stage and network, with a range of shares for each number of GPUs."""
    rows = []
    for setting in SETTINGS:
        for stage in (2, 3):
            for name, network in NETWORKS.items():
                shares = [expected(setting, stage, network, ranks) for ranks in GPUS]
                row = {"setting": setting.name, "stage": stage, "network": name}
                rows.append(row | {"shares": shares})
    return rows


def settings(case: Case) -> TrainingConfig:
    """One row a micro-batch; under ZeRO-3 every parameter is sharded and released after use."""
    zero3 = {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    return TrainingConfig(
        learning_rate=1e-3,
        max_steps=STEPS + 1,
        global_batch_size=RANKS * case.micro_batches,
        max_tokens_per_micro_batch=TOKENS,
        optim="sgd",
        lora=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0) if case.lora else None,
        zero_stage=case.stage,
        gradient_checkpointing=False,
        deepspeed={"zero_optimization": zero3} if case.stage == 3 else None,
    )


def sent() -> int:
    """Bytes that have left this namespace."""
    return int(Path("/sys/class/net/wire/statistics/tx_bytes").read_text())


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """Bytes that this rank sends a step, mean of some; and what theory says."""
    from cwpo_dist.training import deepspeed_engine as engine

    config = settings(case)
    ds_config = engine.deepspeed_config(config, torch.float32)
    with engine.sharded_loading(ds_config):
        model: Any = load_policy(ModelConfig(model_name_or_path=str(folder / "model")))
        if config.lora is None:
            model.requires_grad_(True)
        else:
            model = add_lora(model, config.lora, "logps", 0)
        module = AnswerLogProbs(model).train()
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
    trained = sum(size for size, learns in sizes if learns)
    frozen = sum(size for size, learns in sizes if not learns)
    ours = engine.DeepSpeedEngine(module, config, ds_config)
    draw = np.random.default_rng(0)
    rows = [
        Row(
            draw.integers(3, 99, TOKENS // 2).tolist(),
            (draw.integers(3, 99, TOKENS // 2).tolist(),),
        )
        for _ in range(64)
    ]
    task, run = Sft(rows, [str(i) for i in range(64)]), Run(config, 0, "shared", 2)
    counts = []
    for step in range(STEPS + 1):
        dist.barrier()
        before = sent()
        gradients(task, ours, run, step, list(range(config.global_batch_size)))
        ours.step(1e-3)
        dist.barrier()
        counts.append(sent() - before)
    ours.close()
    each = 4 * (RANKS - 1) / RANKS  # fp32
    ring, gloo = (each * parts(case.stage, case.micro_batches, trained, frozen, k) for k in (1, 2))
    mean = sum(counts[1:]) / STEPS
    return {
        "stage": case.stage,
        "micro_batches": case.micro_batches,
        "lora": case.lora,
        "trained": trained,
        "frozen": frozen,
        "sent_mb": mean / 1e6,
        "ring_mb": ring / 1e6,
        "gloo_mb": gloo / 1e6,
        "ratio_to_gloo": mean / gloo,
    }


def rank_main(rank: int, folder: Path) -> None:
    """All cases in one process group; rank 0 writes what it sent."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=120),
    )
    figures = []
    for case in CASES:
        figures.append(run_case(case, folder))
        if rank == 0:
            print(f"  {figures[-1]}", flush=True)
    if rank == 0:
        (folder / "figures.json").write_text(json.dumps(figures))


@contextmanager
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces with an interface `wire` each, joined by a cable."""
    names = [f"cwpo-wire-{os.getpid()}-{rank}" for rank in range(RANKS)]
    made: list[str] = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        peer = ("peer", "name", "wire", "netns", names[1])
        _ip("link", "add", "wire", "netns", names[0], "type", "veth", *peer)
        for number, name in enumerate(names, 1):
            _ip("-n", name, "address", "add", f"{NETWORK}.{number}/24", "dev", "wire")
            _ip("-n", name, "link", "set", "wire", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            _ip("netns", "delete", name)  # and its interface with it


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def main(
    hidden: Annotated[int, typer.Option(help="width of the random Llama")] = 256,
    layers: Annotated[int, typer.Option(help="of it")] = 4,
    expect: Annotated[bool, typer.Option("--expect", help="the formulas alone")] = False,
    rank: Annotated[int, typer.Option(hidden=True)] = -1,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measures and prints; see the head of this file."""
    if folder is not None:
        rank_main(rank, folder)
        os._exit(0)  # past the interpreter's end, where torch's file store aborts now and then
    if expect:
        for row in expectations():
            cells = [f"{low:.0%}–{high:.0%}" for low, high in row["shares"]]
            print(" | ".join([row["setting"], str(row["stage"]), row["network"], *cells]))
        return
    with tempfile.TemporaryDirectory() as scratch, namespaces() as names:
        shape = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=1024,
        )
        LlamaForCausalLM(shape).save_pretrained(Path(scratch) / "model")
        command = [sys.executable, __file__, "--folder", scratch, "--rank"]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "wire"}
        ranks = [
            subprocess.Popen(["ip", "netns", "exec", name, *command, str(number)], env=environment)
            for number, name in enumerate(names)
        ]
        try:
            failed = [process.wait() for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        if any(failed):
            raise SystemExit("a rank failed; see above")
        cases = json.loads((Path(scratch) / "figures.json").read_text())
    figures = {"benchmark": "wire", "environment": measure.environment(), "cases": cases}
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
