"""What surrounds the loop on a rank: signs of life, the log, checkpoints, and requests to stop.

The loop itself knows no store, no tracker and no Ray; it calls these hooks at fixed points, on all
ranks alike where they are collectives.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import ray.train
import torch

from cwpo_dist.canonical import digest
from cwpo_dist.training import held_out, metrics_log, tracking
from cwpo_dist.training.checkpoint import Saver
from cwpo_dist.training.courier import Courier
from cwpo_dist.training.loop import Hooks, Run
from cwpo_dist.training.process_group import told_to_stop

if TYPE_CHECKING:
    from cwpo_dist.training.train_rank import TrainRank, TrainSpec

ASK_DRIVER_S = 3.0  # how often rank 0 asks whether the driver was told to stop
ASK_RAY_S = 10.0  # how often all ranks ask Ray for a notice of preemption


class RankHooks(Hooks):
    """The hooks of one rank of a training."""

    def __init__(self, rank: TrainRank, run: Run, start: int, attempt: str) -> None:
        """Opens the runs in the trackers, on rank 0.

        Args:
            rank: what it holds.
            run: what the loop is told.
            start: the step from which it goes on.
            attempt: names the folders of its checkpoints; the same on all ranks.
        """
        self._rank, self._spec, self._last_save = rank, rank.spec, start
        self._run, self._trackers = run, _trackers(rank.spec, start) if rank.number == 0 else []
        self._saver = Saver(
            rank.spec.store,
            rank.engine,
            rank.identity,
            attempt,
            save_total_limit=rank.spec.config.save_total_limit,
            fence=rank.token.check,
        )
        self._records: list[dict[str, float]] = []
        self._asked_driver = self._asked_ray = self._saved = time.monotonic()
        self._asks_ray = self._heeded_notice = False

    def before_step(self, step: int) -> None:
        """A sign of life."""
        self._rank.watchdog.beat()

    def wants_stop(self) -> bool:
        """Whether a signal, or on rank 0 the driver, told this rank to stop."""
        now = time.monotonic()
        if self._rank.number == 0 and now - self._asked_driver > ASK_DRIVER_S:
            self._asked_driver = now
            if self._rank.token.asked_to_stop():
                told_to_stop.set()
        return told_to_stop.is_set()

    def wants_poll(self) -> bool:
        """Whether Ray is to be asked, a checkpoint has been written, or one is due by the clock."""
        now = time.monotonic()
        if self._rank.number == 0 and now - self._asked_ray > ASK_RAY_S:
            self._asked_ray, self._asks_ray = now, True
        return self._asks_ray or self._saver.news or self._is_time()

    def poll(self) -> bool:
        """Commits what all ranks have written; True when it is time for the next checkpoint."""
        self._saver.settle()
        wishes = torch.tensor([self._asks_ray, self._is_time()], dtype=torch.float64)
        asks_ray, is_time = self._rank.engine.total(wishes).tolist()
        self._asks_ray = False
        return bool(asks_ray and self._new_notice()) or bool(is_time)

    def _new_notice(self) -> bool:
        """A node is to be drained: checkpoint once, train on until Ray moves the group."""
        ask = getattr(ray.train, "get_preemption_info", None)  # older Rays have no notices
        notice = ask is not None and ask() is not None
        first, self._heeded_notice = notice and not self._heeded_notice, notice
        return first

    def _is_time(self) -> bool:
        """On rank 0, whose clock counts for all."""
        minutes = self._spec.config.save_minutes
        if self._rank.number > 0 or minutes is None:
            return False
        return time.monotonic() - self._saved >= 60 * minutes

    def evaluate(self, step: int) -> dict[str, float]:
        """Loss and metrics of the held-out pairs, if there are any."""
        rank = self._rank
        if rank.held_out is None:
            return {}
        beat = rank.watchdog.beat
        return held_out.evaluate(rank.held_out, rank.engine, self._run, step, beat)

    def log(self, record: dict[str, float]) -> None:
        """Keeps the record for the next checkpoint, hands it to trackers, and shows it."""
        self._records.append(record)
        for tracker in self._trackers:
            tracker.log(record)
        metrics_log.say(f"{self._spec.name}: {metrics_log.progress(record)}")

    def save(self, step: int) -> None:
        """Begins a checkpoint; the log up to it is written first: nothing is lost with it."""
        if step == self._last_save:
            return
        if self._rank.number == 0 and self._records:
            metrics_log.write_part(self._spec.store, step, self._records)
            self._records = []
            for tracker in self._trackers:
                tracker.flush()
        self._saver.begin(step, self._rank.task.learned)
        self._last_save, self._saved = step, time.monotonic()
        self._rank.watchdog.beat()

    def settle(self) -> None:
        """Commits the checkpoint under way, whatever ends the loop."""
        self._saver.settle(wait=True)

    def end_trackers(self) -> None:
        """Ends the runs in the trackers; a resumed attempt opens them again."""
        for tracker in self._trackers:
            tracker.end()

    def close(self) -> None:
        """Waits, but not long, for what trackers still have to take."""
        self.end_trackers()
        for tracker in self._trackers:
            tracker.close()


def _trackers(spec: TrainSpec, start: int) -> list[Courier]:
    """The runs of this stage output, the same ones for every attempt at it."""
    identity = digest([spec.store.uri, spec.key])
    settings = {"stage": spec.name, "key": spec.key, "seed": spec.seed}
    settings |= spec.model.model_dump(mode="json") | spec.config.model_dump(mode="json")
    to, name = spec.config.report_to, f"{spec.name}-{spec.key}"
    return tracking.open_runs(to, spec.store, name, identity, settings, start)
