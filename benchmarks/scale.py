"""What annotation costs the driver for each shard, before the first begins and after the last.

Usage: python benchmarks/scale.py [--help]

Tickets, the list of what is missing, and the counts that are read back, at growing numbers of
shards on local disk. The last line is one JSON object with all figures.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process, decided before torch

import measure
import psutil
import pyarrow as pa
import ray
import typer

from cwpo_dist.pairs.records import REJECT_SCHEMA
from cwpo_dist.scoring import pool as pipeline_pool
from cwpo_dist.scoring.attempts import ShardOutput, ShardWorker
from cwpo_dist.scoring.pipeline import ShardJob, commit, total_counts
from cwpo_dist.storage import Store


def no_worker() -> ShardWorker:
    """No shard is run here."""
    raise NotImplementedError


def start_part(folder: Path, numbers: Sequence[int] = (1_000, 4_000, 16_000)) -> dict[str, Any]:
    """Seconds and memory of what grows with the number of shards, and of nothing else."""
    rows = []
    for number in numbers:
        before = psutil.Process().memory_info().rss
        seconds = {}
        started = time.perf_counter()
        tickets = pipeline_pool._tickets(number)
        seconds["tickets"] = time.perf_counter() - started
        grown = psutil.Process().memory_info().rss - before
        output = Store(str(folder / f"start-{number}"))
        job = ShardJob("scores", output, number, no_worker)
        nothing = ShardOutput(
            pa.table({"x": [0]}), REJECT_SCHEMA.empty_table(), {"rows_in": 1, "rows": 1}
        )
        for index in range(number):
            commit(job, index, nothing)
        for name, run in (("missing", job.missing), ("counts", partial(total_counts, job))):
            started = time.perf_counter()
            run()
            seconds[name] = time.perf_counter() - started
        del tickets
        rows.append({"shards": number, "driver_mib": grown / 2**20, "seconds": seconds})
        print(f"  {rows[-1]}", flush=True)
    return {"start": rows}


def main() -> None:
    """Measures and prints; see the head of this file."""
    figures: dict[str, Any] = {"benchmark": "scale", "environment": measure.environment()}
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures |= start_part(Path(folder))
    finally:
        ray.shutdown()
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
