"""What some work asks of a cluster in; while it waits for room there, a line that says so, out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import ray
from ray.exceptions import RayError
from ray.util import placement_group_table

logger = logging.getLogger(__name__)

PATIENCE_S = 30.0  # a group of workers, or an actor, is up within seconds where there is room
POLL_S = 2.0


def lacking(need: Mapping[str, float]) -> str | None:
    """What of it is taken by others at the moment; None: nothing.

    Args:
        need: amounts by Ray's names of resources.
    """
    free, there = ray.available_resources(), ray.cluster_resources()
    short = [
        f"{free.get(name, 0.0):g} of {there.get(name, 0.0):g} {name}s are free"
        for name, amount in need.items()
        if free.get(name, 0.0) < amount
    ]
    return ", ".join(short) or None


def all_placed() -> bool:
    """Whether every group of workers that was asked for has its room, also one that is starting.

    It holds that room itself, which is then no longer free.
    """
    states = {group["state"] for group in placement_group_table().values()} - {"REMOVED"}
    return states == {"CREATED"}


def tell_waiting(what: str, need: Mapping[str, float], remedy: str) -> bool:
    """Says that work waits for room, where that is why it has not begun; True when it was said.

    Args:
        what: field and value, such as `align.num_workers: 2 workers of 1 CPU each`.
        need: in total.
        remedy: beside waiting.
    """
    taken = lacking(need)
    if taken is not None:
        logger.warning(
            "%s wait for room, as %s; they start when what runs there ends, or %s",
            what,
            taken,
            remedy,
        )
    return taken is not None


@contextmanager
def told_while_waiting(
    what: str, need: Mapping[str, float], remedy: str, has_begun: Callable[[], bool]
) -> Iterator[None]:
    """Within it, a line is said once, should work not begin for want of room.

    Args:
        what: as of `tell_waiting`.
        need: as there.
        remedy: as there.
        has_begun: asked now and then by another thread.
    """
    ended = threading.Event()

    def watch() -> None:
        patience = time.monotonic() + PATIENCE_S
        with suppress(RayError):  # whoever it asks is gone: then there is nothing to say
            while not (ended.wait(POLL_S) or has_begun()):
                if time.monotonic() > patience and tell_waiting(what, need, remedy):
                    return

    threading.Thread(target=watch, name="waiting", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
