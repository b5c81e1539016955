"""A model and a number of ranks in; what each rank's host memory grows by while it loads, out.

    python benchmarks/loading.py [runs/models/SmolLM2-135M-Instruct] --ranks 2

Without a folder, a random Llama of 12 layers of width 2048 is made, whose largest tensor is 2 % of
it. Each rank is a process on this machine, on the CPU, as training starts it. Anonymous memory
alone counts: pages of the model's files, which rank 0 maps, are the system's to drop.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from cwpo_dist.config import ModelConfig, TrainingConfig
from cwpo_dist.lm.loading import load_policy

MEBIBYTE = 2**20
SAMPLE_S = 0.005


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def growth(work: Callable[[], Any]) -> tuple[int, int, int]:
    """Bytes that anonymous memory grows by: at the most, afterwards, and once free memory is back.

    glibc keeps what is freed between two live blocks, until it is told to give it back.
    """
    gc.collect()
    before, seen, over = anonymous(), [0], threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_S):
            seen.append(anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    kept = work()
    over.set()
    sampler.join()
    gc.collect()
    after = anonymous()
    ctypes.CDLL(None).malloc_trim(0)
    live = anonymous()
    del kept
    return max(*seen, after) - before, after - before, live - before


def rank(model: str, stage: int, number: int, ranks: int, meeting: str) -> None:
    """Loads as a training worker does, then says what it took."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=number, world_size=ranks)
    from cwpo_dist.training import deepspeed_engine as engine

    training = TrainingConfig(learning_rate=1e-5, zero_stage=stage)
    settings = engine.deepspeed_config(training, torch.float32)
    given = ModelConfig(model_name_or_path=model)

    def load() -> Any:
        with engine.sharded_loading(settings):
            return load_policy(given)

    grown = " | ".join(f"{size / MEBIBYTE:,.0f}" for size in growth(load))
    time.sleep(0.2 * number)
    print(f"| {stage} | {number} | {grown} |", flush=True)


def random_llama(folder: str) -> str:
    """Writes 838 million random numbers as a Hugging Face folder, in several files."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=12,
        num_attention_heads=16,
        vocab_size=8000,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")
    return folder


def main() -> None:
    """Starts the ranks of one ZeRO stage after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        number, meeting = given.rank.split(":", 1)
        rank(given.model, given.stages[0], int(number), given.ranks, meeting)
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = given.model or random_llama(scratch)
        measure(model, given.ranks, given.stages)


def measure(model: str, ranks: int, stages: list[int]) -> None:
    """Prints a line a rank for each ZeRO stage."""
    size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    print(f"{model}: {size / MEBIBYTE:,.0f} MiB of safetensors, {ranks} ranks")
    print("| ZeRO | rank | peak MiB | afterwards | live |\n|---|---|---|---|---|", flush=True)
    for stage in stages:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, model, "--ranks", str(ranks)]
            command += ["--stages", str(stage), "--rank"]
            processes = [
                subprocess.Popen(
                    [*command, f"{number}:{folder}/meeting"],
                    env=os.environ
                    | {"RANK": str(number), "LOCAL_RANK": str(number)}
                    | {"WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"},
                )
                for number in range(ranks)
            ]
            if any([process.wait() for process in processes]):
                sys.exit("a rank failed")


if __name__ == "__main__":
    main()
