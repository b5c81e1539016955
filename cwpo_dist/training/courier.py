"""Records and a tracker in; the records handed on by a thread of their own, never waited for.

A tracker's server may hang, refuse, die and come back: no call here raises or waits for it, but for
`close`, which waits a few seconds. What is not taken is kept, up to a bound, and tried again. That
a tracker is away is said once, until it is back. `metrics.jsonl` has every record anyway.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from cwpo_dist.redaction import redacted

logger = logging.getLogger(__name__)

Stamped = tuple[float, Mapping[str, float]]  # when it was logged, seconds since 1970, and what

RETRY_S = 30.0  # until a tracker that failed is tried again
CLOSE_S = 10.0  # for what is left, once the run has ended
AWAY_S = 1.0  # the same, of a tracker that is known to be away
KEPT = 10_000  # records of a tracker that is away; then the oldest go
AT_ONCE = 50  # records a call: MLflow takes 1,000 numbers


class TrackedRun(Protocol):
    """One run in one tracker; each method may wait for a server, and raise anything."""

    def connect(self) -> None:
        """Opens or continues the run; called again after anything failed."""

    def log(self, records: Sequence[Stamped]) -> None:
        """Takes numbers of some steps; `step` is among each record's."""

    def flush(self) -> None:
        """Brings what was logged to where it is kept."""

    def close(self) -> None:
        """No further record comes."""


class Courier:
    """Between a training and one tracker."""

    def __init__(self, name: str, run: TrackedRun) -> None:
        self._name, self._run = name, run
        self._news = threading.Condition()
        self._waiting: deque[Stamped] = deque(maxlen=KEPT)
        self._batch: list[Stamped] = []  # being handed on
        self._lost = 0
        self._connected = self._away = self._wants_flush = self._ending = False
        # Not waited for when the process ends.
        self._thread = threading.Thread(target=self._serve, name=f"courier-{name}", daemon=True)
        self._thread.start()

    def log(self, record: Mapping[str, float]) -> None:
        """Takes the numbers of a step, `step` among them."""
        with self._news:
            self._lost += len(self._waiting) == KEPT
            self._waiting.append((time.time(), record))
            self._news.notify()

    def flush(self) -> None:
        """Asks that what was logged be brought to where it is kept."""
        with self._news:
            self._wants_flush = True
            self._news.notify()

    def end(self) -> None:
        """No further record comes."""
        with self._news:
            self._ending = True
            self._news.notify()

    def close(self) -> None:
        """The same; then waits for what is left, a few seconds at the most."""
        self.end()
        started = time.monotonic()
        self._thread.join(AWAY_S if self._away else CLOSE_S)
        left = self._lost + len(self._batch) + len(self._waiting)
        if left or self._thread.is_alive():
            logger.warning(
                "%s: its last %d records were not taken within %.0f s; metrics.jsonl has them",
                self._name,
                left,
                time.monotonic() - started,
            )

    def _serve(self) -> None:
        while not self._last_round():
            pass

    def _last_round(self) -> bool:
        """Waits for work and does it; True when it was told before that no more comes."""
        with self._news:
            if self._away:
                self._news.wait_for(lambda: self._ending, RETRY_S)
            else:
                self._news.wait_for(lambda: self._waiting or self._wants_flush or self._ending)
            ending = self._ending
        try:
            self._hand_over(ending)
        except Exception as error:  # noqa: BLE001, a client's own kinds are many; none may end a run
            self._failed(error)
        return ending

    def _hand_over(self, ending: bool) -> None:
        if not self._connected:
            self._run.connect()
            self._connected = True
        while self._batch or self._waiting:
            if not self._batch:
                with self._news:
                    count = min(AT_ONCE, len(self._waiting))
                    self._batch = [self._waiting.popleft() for _ in range(count)]
            self._run.log(self._batch)
            self._batch = []
        if self._wants_flush or ending:
            self._run.flush()
            self._wants_flush = False
        if ending:
            self._run.close()
        if self._away:
            logger.warning("%s is back, and has what it missed", self._name)
        self._away = False

    def _failed(self, error: Exception) -> None:
        if not self._away:
            logger.warning(
                "%s: %s; training goes on, and it is tried again every %.0f s",
                self._name,
                _first_line(error),
                RETRY_S,
            )
        self._away, self._connected = True, False


def _first_line(error: Exception) -> str:
    """A client's message may be a page."""
    lines = str(error).splitlines() or [""]
    return redacted(f"{type(error).__name__}: {lines[0]}".removesuffix(": "))[:300]
