"""What the benchmarks share: the machine and its matrix-product rate, pairs, memory, a Ray."""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from cwpo_dist.config import ModelConfig, PrepareConfig, Source
from cwpo_dist.lm.encoder import Asked, Encoder, load_tokenizer
from cwpo_dist.lm.fitting import encode_pairs
from cwpo_dist.lm.generation import generate
from cwpo_dist.lm.loading import load_policy
from cwpo_dist.lm.rows import Row
from cwpo_dist.pairs.stored import read_pairs
from cwpo_dist.storage import Store

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "pyarrow", "trl")
SIZE = 2048  # of the square fp32 matrices whose product sets the machine's rate

# Real human preferences (see README, "Tests"); without them the demo's own pairs.
DATA = {"hh": "hh_harmless.jsonl.gz", "ukp": "ukp_convincing.jsonl.gz"}
DEMO = Path(__file__).resolve().parents[1] / "cwpo_dist" / "demo" / "pairs.jsonl"


def environment() -> dict[str, Any]:
    """Hardware and versions, as BENCHMARKS.md quotes them."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def matmul_rate(seconds: float = 2.0) -> float:
    """FLOP/s of the best 2048³ fp32 product within so many seconds, on torch's threads."""
    left, right = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2 * SIZE**3 / best


def peak_resident() -> int:
    """Bytes of resident memory that this process has had at the most.

    Not `ru_maxrss`, which a new program takes over from the process that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def source(data: str) -> Source:
    """Where a benchmark's pairs come from.

    Raises:
        SystemExit: for real data when CWPO_DATA names no folder with it.
    """
    if data == "demo":
        return Source(path=str(DEMO))
    folder = os.environ.get("CWPO_DATA")
    path = Path(folder or "") / DATA[data]
    if folder is None or not path.is_file():
        raise SystemExit(f"--data {data}: set CWPO_DATA to a folder with {DATA[data]}")
    return Source(path=str(path))


def prepared(folder: Path, data: str, pairs: int | None, rows_per_shard: int) -> tuple[Store, int]:
    """Pairs as `prepare` writes them (a real one, on a Ray that must be up), and their shards."""
    from cwpo_dist.stages.prepare import prepare

    store = Store(str(folder))
    given = source(data)
    counts = prepare(
        store,
        PrepareConfig(
            sources=[given.model_copy(update={"limit": pairs})],
            rows_per_shard=rows_per_shard,
            max_reject_fraction=0.5,
        ),
        seed=0,
    )
    return store, int(counts["shards"])


def encoded(store: Store, shards: int, encoder: Encoder, model: ModelConfig) -> list[Row]:
    """The token rows of all pairs that fit, in the order of the shards."""
    pairs = [pair for index in range(shards) for pair in read_pairs(store, index)]
    asked = [Asked(pair.prompt, pair.answers, pair.tools) for pair in pairs]
    return [row for row in encode_pairs(encoder, model, asked) if isinstance(row, Row)]


def sampled(model: Path, prompts: list[list[int]], answers: int) -> list[tuple[str, ...]]:
    """So many answers of a model to each prompt; what is drawn depends on seed and prompt alone."""
    given = ModelConfig(model_name_or_path=str(model))
    policy, tokenizer = load_policy(given), load_tokenizer(given)
    how: dict[str, Any] = {"max_new_tokens": 96, "temperature": 1.0, "batch_size": 16}
    each = [generate(policy, tokenizer, prompts, seed=seed, **how) for seed in range(answers)]
    return list(zip(*each, strict=True))


class PeakMemory:
    """The most resident bytes that this process and its descendants held together."""

    def __init__(self, every_s: float = 0.2) -> None:
        """Samples in a thread, every so many seconds, while the `with` block runs."""
        self.peak = 0
        self._every, self._stop = every_s, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        """Starts sampling."""
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Ends it."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(self._every):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_full_info().uss
                except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
                    continue  # it ended between the two calls
            self.peak = max(self.peak, total)


def with_ray(work: Callable[[], Any]) -> Any:
    """Runs on a Ray of two CPUs that is started for it and ended, its start apart."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        return work()
    finally:
        ray.shutdown()
