"""Reports of committed shards in; a line of progress while it runs, throughput at the end, out."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from cwpo_dist.config import Pool

logger = logging.getLogger(__name__)

REDRAW_S, LOG_EVERY_S = 0.2, 10.0  # on a terminal, and where there is none
BAR_WIDTH = 12


@dataclass(frozen=True)
class Report:
    """What an actor says of one shard. It depends on time, so it never enters a committed file.

    Attributes:
        shard: its number.
        actor: who did it.
        pool: the number of the actor's pool.
        busy_s: how long the shard took.
        up_s: how long the actor has been up.
        counts: of the shard; empty where another one had committed it before.
    """

    shard: int
    actor: str
    pool: int
    busy_s: float
    up_s: float
    counts: Mapping[str, int]


@dataclass
class _Seen:
    """An actor's time by its own clock, and when it came up by ours; reports may come late."""

    devices: float
    came_up: float = math.inf
    busy_s: float = 0.0
    up_s: float = 0.0

    @property
    def last(self) -> float:
        """When it ended the last shard that it reported."""
        return self.came_up + self.up_s


@dataclass
class Progress:
    """A bar on a terminal, else a line in the log every few seconds.

    Attributes:
        name: of the job.
        shards: how many it has.
        done: how many were committed before.
        pools: a device is a GPU in a pool that has them, else a CPU.
    """

    name: str
    shards: int
    done: int
    pools: Sequence[Pool]
    _counts: Counter[str] = field(default_factory=Counter)
    _actors: dict[str, _Seen] = field(default_factory=dict)
    _fresh: int = 0
    _shown: float = field(default_factory=time.monotonic)
    _bar: Bar | None = None
    _task: TaskID | None = None

    def __enter__(self) -> Self:
        console = Console(stderr=True)
        if console.is_terminal:
            # Of the two columns the text gives way on a narrow terminal.
            text = Column(ratio=1, no_wrap=True, overflow="ellipsis")
            columns = (BarColumn(BAR_WIDTH), TextColumn("{task.description}", table_column=text))
            self._bar = Bar(*columns, console=console, transient=True, expand=True)
            starting = f"{self.name}: actors are starting"
            self._task = self._bar.add_task(starting, total=self.shards, completed=self.done)
            self._bar.start()
            self._shown = -math.inf  # the first report is drawn at once
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, report: Report) -> None:
        """Counts a shard in, and shows how far the job is."""
        now = time.monotonic()
        pool = self.pools[report.pool]
        devices = pool.gpus_per_actor or pool.cpus_per_actor
        seen = self._actors.setdefault(report.actor, _Seen(devices))
        seen.came_up = min(seen.came_up, now - report.up_s)
        seen.busy_s += report.busy_s
        seen.up_s = max(seen.up_s, report.up_s)
        self.done += 1
        self._fresh += 1
        self._counts.update(report.counts)
        # Not at each of a fleet's shards: a line is made of all actors' times.
        if now - self._shown < (LOG_EVERY_S if self._bar is None else REDRAW_S):
            return
        self._shown = now
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, description=self.line())
        else:
            logger.info("%s", self.line())

    @property
    def counts(self) -> Mapping[str, int]:
        """What this run's shards have counted so far."""
        return self._counts

    @property
    def device_hours(self) -> float:
        """For how long this run's actors have held their devices, by their last reports."""
        return sum(seen.devices * seen.up_s for seen in self._actors.values()) / 3600

    @property
    def _scored(self) -> int:
        """Rows without those that were copied from earlier scores, which take no time."""
        return self._counts["rows"] - self._counts["reused"]

    def line(self) -> str:
        """Share done, remaining time, rates, rejects: on a narrow terminal its end is cut off."""
        counts, seconds = self._counts, self._seconds()
        left = timedelta(seconds=round((self.shards - self.done) * seconds / max(self._fresh, 1)))
        return (
            f"{self.name}: {self.done / self.shards:.0%}, {left} left, "
            f"{self._scored / seconds:,.1f} answers/s, {counts['tokens'] / seconds:,.0f} tokens/s, "
            f"{counts['rejects']:,} set aside, {self.done:,}/{self.shards:,} shards"
        )

    def summary(self) -> str:
        """What it took, in words."""
        took = self.throughput()
        if not took:
            return "another driver did the rest"
        actors = "1 actor" if took["actors"] == 1 else f"{took['actors']:.0f} actors"
        hours = f"{took['device_hours']:.3g} device-hours"
        if per_million := took.get("device_hours_per_million_answers"):
            hours += f", {per_million:.3g} for a million answers"
        return (
            f"{self._scored:,} answers in {took['seconds']:.0f} s by {actors}, "
            f"{took['busy_share']:.0%} busy, the first idle {took['tail_s']:.1f} s before the end: "
            f"{hours}"
        )

    def throughput(self) -> dict[str, float]:
        """What this run did in what time; a resumed run counts its own part.

        Metrics:
            shards: that it did.
            actors: that did them.
            seconds: since the first actor came up.
            answers_per_s: scored answers a second, without copied ones.
            tokens_per_s: tokens a second.
            device_hours: GPU-hours, or CPU-hours in a pool without GPUs.
            device_hours_per_million_answers: the same for a million answers.
            busy_share: the share of the actors' time in which they worked.
            tail_s: seconds that the first idle actor waited for the last shard.
            padding_share: the share of tokens that are padding.
            useful_flops_per_s: floating-point operations a second.
        """
        counts, seconds, actors = self._counts, self._seconds(), list(self._actors.values())
        held = self.device_hours
        if not actors:
            return {}  # another driver did it all
        idle_from, end = min(seen.last for seen in actors), max(seen.last for seen in actors)
        numbers: dict[str, float] = {
            "shards": self._fresh,
            "actors": len(actors),
            "seconds": seconds,
            "answers_per_s": self._scored / seconds,
            "tokens_per_s": counts["tokens"] / seconds,
            "device_hours": held,
            "busy_share": sum(s.busy_s for s in actors) / sum(s.up_s for s in actors),
            "tail_s": end - idle_from,
        }
        if self._scored:
            numbers["device_hours_per_million_answers"] = held * 1e6 / self._scored
        if counts["padded_tokens"]:
            numbers["padding_share"] = 1 - counts["tokens"] / counts["padded_tokens"]
        if counts["flops"]:
            numbers["useful_flops_per_s"] = counts["flops"] / seconds
        return {name: float(f"{value:.6g}") for name, value in numbers.items()}

    def _seconds(self) -> float:
        """Since the first actor came up."""
        came_up = [seen.came_up for seen in self._actors.values()]
        last = [seen.last for seen in self._actors.values()]
        return max(max(last) - min(came_up), 1e-3) if last else 1e-3
