"""Ray's notices that say nothing of a run in; a terminal without them out.

Whatever goes wrong is still told: only bars, progress and the lines of `NOT_OURS` are left out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.data

from cwpo_dist.ray_internals import PROGRESS_LOGGER, worker_lines

# Of actors that Ray Data and Ray Train make for themselves: their arguments are owned by the driver
# or the controller, without which the actors would not live on either, so the advice is void.
NOT_OURS = ("has constructor arguments in the object store and max_restarts > 0",)
# Ray Train's own, which ends with a traceback where another Ray runs on this machine: it then does
# not free the room of a controller that dies, which ends with our driver anyway.
HELPERS = ("PlacementGroupCleaner",)


def quieten_ray() -> None:
    """Every stage says how far it is; Ray's own bars and notices would drown that."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger(PROGRESS_LOGGER).setLevel(logging.ERROR)  # "bars disabled"


def leave_out() -> None:
    """Leaves out what workers say in vain, and this process; once connected."""
    for name, handle in list(worker_lines.handlers):
        worker_lines.remove_handler(name)
        worker_lines.add_handler(name, _without(handle))
    # This process says it once, in C++, to descriptor 2. Here it does so of an actor that no node
    # can hold, while that descriptor leads nowhere, and never again.
    actor: Any = ray.remote(num_cpus=0, max_restarts=1, resources={"cwpo_nowhere": 1})(_Nothing)
    stored = ray.put(None)
    with _unheard():
        made = actor.remote(stored)
    ray.kill(made)


class _Nothing:
    """Never made."""

    def __init__(self, _argument: object) -> None: ...


def _without(handle: Any) -> Any:
    def kept(data: dict[str, Any]) -> None:
        lines = [line for line in data["lines"] if not any(text in line for text in NOT_OURS)]
        if lines and data.get("actor_name") not in HELPERS:
            handle(data | {"lines": lines})

    return kept


@contextmanager
def _unheard() -> Iterator[None]:
    """Within it, what is written to descriptor 2 is lost; Python's own `sys.stderr` uses it too."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
