"""A function of a number in; a Ray task for each number, and errors fit for the user, out.

A process that is sent such a task imports this file and what the task itself needs, which is why no
stage and no model is imported here: torch and transformers would take longer than most tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import ray.data

from cwpo_dist.pairs.readers import SourceError
from cwpo_dist.storage import FileMissing, StorageError

_FOR_USERS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (StorageError, FileMissing, SourceError)
}


@dataclass(frozen=True)
class _Outcome:
    """How a task ended: with an error meant for the user, or with none."""

    error: str = ""
    message: str = ""


def run_tasks(task: Callable[[int], None], count: int, num_cpus: float) -> None:
    """Runs task(0) … task(count - 1) on the cluster, each as a Ray task of its own.

    Args:
        task: must be picklable.
        count: how many numbers there are.
        num_cpus: that each task reserves.

    Raises:
        StorageError: when storage refuses a read or write; FileMissing among them.
        SourceError: when a source cannot be read.
    """
    numbers = ray.data.from_items([{"index": i} for i in range(count)], override_num_blocks=count)
    done = numbers.map(partial(_outcome, task), num_cpus=num_cpus).take_all()
    for outcome in (_Outcome(**row) for row in done):
        if outcome.error:
            raise _FOR_USERS[outcome.error](outcome.message)


def _outcome(task: Callable[[int], None], row: dict[str, int]) -> dict[str, str]:
    """Runs a task; an error meant for the user comes back as it is, not wrapped in Ray's."""
    (index,) = row.values()
    try:
        task(int(index))
    except tuple(_FOR_USERS.values()) as error:
        return asdict(_Outcome(type(error).__name__, str(error)))
    return asdict(_Outcome())
