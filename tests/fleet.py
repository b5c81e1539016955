"""Several Ray nodes on this machine for test_pools.py: `python fleet.py FOLDER`.

FOLDER/found.json says what each node did: several pools, a node that is lost, one that comes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.cluster_utils import Cluster

from cwpo_dist.config import ConfigError, PoolConfig
from cwpo_dist.pairs.records import REJECT_SCHEMA
from cwpo_dist.scoring.driver import run_shards
from cwpo_dist.scoring.pipeline import ShardJob
from cwpo_dist.scoring.retries import Input, ShardOutput
from cwpo_dist.storage import Store

SHARDS = 14


@dataclass
class Where:
    """Says on which node a shard was done, after some seconds there."""

    seconds: dict[str, float]
    marks: Path

    def read(self, index: int) -> list[Input[None]]:
        return [Input(str(index), 0, None)]

    def __call__(self, index: int, rows: list[Input[None]]) -> ShardOutput:
        node = ray.get_runtime_context().get_node_labels()["kind"]
        (self.marks / f"{index}-{node}").touch()
        time.sleep(self.seconds[node])
        counts = {"rows_in": len(rows), "rows": len(rows)}
        return ShardOutput(pa.table({"node": [node]}), REJECT_SCHEMA.empty_table(), counts)


def job(folder: Path, name: str, seconds: dict[str, float]) -> ShardJob:
    marks = folder / f"{name}-marks"
    marks.mkdir()
    return ShardJob(name, Store(str(folder)), SHARDS, partial(Where, seconds, marks))


def done_by(work: ShardJob) -> list[str]:
    tables = [work.output.read_table(work.file(index)) for index in range(SHARDS)]
    return [table["node"][0].as_py() for table in tables]


def run_with(work: ShardJob, config: PoolConfig, *events: tuple[str, Callable[[], Any]]) -> float:
    """Runs a job and does something, in turn, when a node has a shard under way; seconds it took.

    Ray starts nodes in the main thread only, so the job has the other one.
    """
    started = time.monotonic()
    marks = Path(work.output.uri) / f"{work.name}-marks"
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(run_shards, work, config)
        for node, happens in events:
            while not list(marks.glob(f"*-{node}")):
                if running.done():
                    return -1.0
                time.sleep(0.05)
            happens()
        running.result()
    return time.monotonic() - started


def pools(*kinds: tuple[str, Any]) -> PoolConfig:
    made = [
        {"num_actors": number, "cpus_per_actor": 0.5, "labels": {"kind": kind}}
        for kind, number in kinds
    ]
    return PoolConfig.model_validate({"pools": made})


def scenarios(cluster: Cluster, folder: Path) -> dict[str, Any]:
    def add(kind: str) -> Any:
        return cluster.add_node(num_cpus=1, labels={"kind": kind}, resources={kind: 1.0})

    found: dict[str, Any] = {}
    slow, _ = add("slow"), add("fast")
    first = job(folder, "mixed", {"slow": 0.5, "fast": 0.15})
    made = run_shards(first, pools(("slow", 1), ("fast", 1)))
    found["mixed"] = done_by(first)
    found["throughput"] = made["throughput"]

    custom = job(folder, "custom", {"slow": 0.0, "fast": 0.0})
    config = {"resources": {"fast": 0.5}, "num_actors": [1, 2], "cpus_per_actor": 0.5}
    run_shards(custom, PoolConfig.model_validate(config))
    found["custom"] = done_by(custom)
    try:
        run_shards(job(folder, "never", {}), pools(("fast", 1), ("purple", 1)))
    except ConfigError as error:
        found["refused"] = str(error)

    lost = job(folder, "lost", {"slow": 60.0, "fast": 1.5, "late": 0.1})
    late: list[Any] = []
    found["lost_s"] = run_with(
        lost,
        pools(("slow", 1), ("fast", 1), ("late", (0, 1))),
        ("slow", lambda: cluster.remove_node(slow, allow_graceful=False)),
        ("fast", lambda: late.append(add("late"))),
    )
    found["lost"] = done_by(lost)

    alone = job(folder, "alone", {"fast": 0.7, "late": 60.0})
    one_pool = {"labels": {"kind": "in(fast,late)"}, "num_actors": 2, "cpus_per_actor": 1}
    found["alone_s"] = run_with(
        alone,
        PoolConfig.model_validate(one_pool),
        ("late", lambda: cluster.remove_node(late[0], allow_graceful=False)),
    )
    found["alone"] = done_by(alone)
    return found


if __name__ == "__main__":
    made_by = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        ray.init(address=made_by.address, logging_level="ERROR")
        place = Path(sys.argv[1])
        (place / "found.json").write_text(json.dumps(scenarios(made_by, place)))
    finally:
        ray.shutdown()
        made_by.shutdown()
