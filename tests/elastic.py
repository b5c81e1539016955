"""A training driver of its own for test_training_kills.py: `python elastic.py FOLDER [alone]`.

It trains FOLDER/model with one or two workers on several Ray nodes of this machine, of which one is
killed and one comes; or, `alone`, with two workers on a Ray of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray_task
import zero_cases
from ray.cluster_utils import Cluster
from zero_cases import Case

from cwpo_dist.training import group
from cwpo_dist.training.train_rank import TrainSpec

CASE = Case("elastic", 3, steps=60)
PATIENCE_S = 200


def make_spec(folder: Path, **changes: Any) -> TrainSpec:
    spec = zero_cases.make_spec(CASE, folder, save_steps=5, step_timeout_s=60, **changes)
    return replace(spec, make_task=partial(ray_task.watched, folder=folder))


def steps_of(folder: Path, world: int) -> Callable[[], int]:
    """Counts the steps that a group of so many workers has begun, from now on."""
    before = len(list(folder.glob(f"world-{world}-*")))
    return lambda: len(list(folder.glob(f"world-{world}-*"))) - before


def wait_for(running: Any, steps: Callable[[], int]) -> None:
    """Until a group has done some steps, a checkpoint among them."""
    deadline = time.monotonic() + PATIENCE_S
    while steps() < 7:
        assert not running.done(), running.result()
        assert time.monotonic() < deadline, "no such group within the time"
        time.sleep(0.1)


def shrink_and_grow(cluster: Cluster, folder: Path) -> None:
    """Ray starts nodes in the main thread only, so the training has the other one."""
    group.RESIZE_CHECK_S = 5.0
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    spec = make_spec(folder, num_workers=(1, 2), cpus_per_worker=1.0)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(group.train, spec)
        try:
            wait_for(running, steps_of(folder, 2))
            few = steps_of(folder, 1)
            cluster.remove_node(nodes[1], allow_graceful=False)
            wait_for(running, few)
            many = steps_of(folder, 2)
            cluster.add_node(num_cpus=1)
            wait_for(running, many)
        finally:
            (folder / "hurry").touch()
        running.result()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if "alone" in sys.argv:
        ray.init(num_cpus=2, include_dashboard=False)
        group.train(make_spec(place, cpus_per_worker=0.5))
        sys.exit()
    quick = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quick})
    try:
        ray.init(address=made.address, logging_level="ERROR")
        shrink_and_grow(made, place)
    finally:
        ray.shutdown()
        made.shutdown()
