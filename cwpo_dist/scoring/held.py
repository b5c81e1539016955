"""A driver's progress in; for how long all drivers of an output have held devices, out.

Each driver keeps a small file beside the shards, `held/<job>-<its own name>.json`, so that one that
was killed has its cost counted, too. The file depends on time and is no part of the output.
"""

from __future__ import annotations

import time
import uuid

from cwpo_dist.scoring.progress import Progress
from cwpo_dist.storage import Store, to_json

FOLDER = "held"
EVERY_S = 30.0  # of this much, at most, a killed driver leaves no trace


class Held:
    """One driver's file, renewed as shards are reported."""

    def __init__(self, output: Store, job: str) -> None:
        self._output, self._name = output, f"{FOLDER}/{job}-{uuid.uuid4().hex[:12]}.json"
        self._kept: float | None = None

    def keep(self, progress: Progress, *, now: bool = False) -> None:
        """Writes the device-hours so far if it was not done a short while ago, or if `now`."""
        if now or self._kept is None or time.monotonic() - self._kept >= EVERY_S:
            self._kept = time.monotonic()
            self._output.write(self._name, to_json({"device_hours": progress.device_hours}))


def held_hours(output: Store) -> float:
    """Device-hours of all drivers that worked on an output, or on what lies in folders below it."""
    kept = [name for name in output.names() if f"/{FOLDER}/" in f"/{name}"]
    return sum(float(output.read_json(name)["device_hours"]) for name in kept)
