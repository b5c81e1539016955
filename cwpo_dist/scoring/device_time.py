"""A driver's progress in; for how long all drivers of an output have held devices, out.

Each driver keeps a small file beside the shards, `held/<job>-<its own name>.json`, so that one that
was killed has its cost counted, too: that of the shards that it had heard of. The file depends on
time and is no part of the output.
"""

from __future__ import annotations

import logging
import time
import uuid

from cwpo_dist.canonical import to_json
from cwpo_dist.scoring.progress import Progress
from cwpo_dist.storage import StorageError, Store

logger = logging.getLogger(__name__)

FOLDER = "held"
EVERY_S = 30.0


class Held:
    """One driver's file, renewed as shards are reported."""

    def __init__(self, output: Store, job: str) -> None:
        self._output, self._name = output, f"{FOLDER}/{job}-{uuid.uuid4().hex[:12]}.json"
        self._kept: float | None = None

    def note(self, progress: Progress, *, now: bool = False) -> None:
        """Writes the device-hours so far if it was not done a short while ago, or if `now`."""
        if not now and self._kept is not None and time.monotonic() - self._kept < EVERY_S:
            return
        self._kept = time.monotonic()
        try:
            self._output.write(self._name, to_json({"device_hours": progress.device_hours}))
        except StorageError as error:  # no reason to end a run
            logger.warning("device-hours not kept: %s", error)


def held_hours(output: Store) -> float:
    """Device-hours of all drivers that worked on an output, or on what lies in folders below it."""
    kept = [name for name in output.names() if f"/{FOLDER}/" in f"/{name}"]
    return sum(float(output.read_json(name)["device_hours"]) for name in kept)
