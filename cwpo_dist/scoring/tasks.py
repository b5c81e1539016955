"""A function of a number in; a Ray task for each number, and errors fit for the user, out.

A worker that is sent such a task imports this file and what the task itself needs, which is why no
stage and no model is imported here: torch and transformers would take longer than most tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ray.data

from cwpo_dist.pairs.readers import SourceError
from cwpo_dist.storage import StorageError


def run_tasks(task: Callable[[int], None], count: int, num_cpus: float) -> None:
    """Runs task(0) … task(count - 1) on the cluster, each as a Ray task of its own.

    Raises:
        StorageError: when storage refuses a write.
        SourceError: when a source cannot be read.
    """
    numbers = ray.data.from_items([{"index": i} for i in range(count)], override_num_blocks=count)
    done = numbers.map(partial(_outcome, task), num_cpus=num_cpus).take_all()
    for row in done:
        if row["storage_error"]:
            raise StorageError(row["storage_error"])
        if row["source_error"]:
            raise SourceError(row["source_error"])


def _outcome(task: Callable[[int], None], row: dict[str, Any]) -> dict[str, str]:
    """Runs a task; an error meant for the user comes back as it is, not wrapped in Ray's."""
    outcome = {"storage_error": "", "source_error": ""}
    try:
        task(int(row["index"]))
    except StorageError as error:
        outcome["storage_error"] = str(error)
    except SourceError as error:
        outcome["source_error"] = str(error)
    return outcome
