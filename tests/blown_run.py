"""A run directory in; drivers at work there, as forks of this process, and what they said, out."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import small_recipe
from recorded import Log, record
from strikes import Strike, Striker, shift_clock

from cwpo_dist.storage import StorageError
from cwpo_dist.training.lease import Lease, LeaseHeld, LeaseLost
from cwpo_dist.training.saving import NoRoom

TTL_S = 1.0  # a driver that is stopped counts as dead after so long
DEADLINE_S = 120.0
SAID, FAULT = 3, 1  # exit codes: an error of ours, which says what to do; anything else
OURS = (StorageError, LeaseHeld, LeaseLost, NoRoom)


class BlowFailed(AssertionError):
    """A driver hangs, or ended by no error of ours."""


@dataclass
class Run:
    """A run directory, the drivers at work there, and their log.

    Attributes:
        folder: of the log, of what drivers say, and of the run directory where that is on a disk.
        uri: of the run directory.
        inputs: what the recipe reads.
        plant: what is wrong with the code of each driver, in tests of the tests.
        alive: process → driver.
        drivers: how many there have been.
    """

    folder: Path
    uri: str
    inputs: Path
    plant: Callable[[], None] | None = None
    alive: dict[int, str] = field(default_factory=dict)
    drivers: int = 0

    @property
    def log(self) -> Path:
        """A line for all that was done, and befell."""
        return self.folder / "history.jsonl"

    @property
    def on_disk(self) -> bool:
        """Whether it is a local folder."""
        return "://" not in self.uri

    @cached_property
    def machine(self) -> Log:
        """What no driver did."""
        return Log(self.log, "the machine")

    def lines(self) -> list[dict[str, Any]]:
        """The log."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def start(self, strike: Strike) -> int:
        """A driver begins; its process."""
        who = f"driver {self.drivers}"
        self.drivers += 1
        process = os.fork()
        if process == 0:
            self._drive(who, strike)
        self.alive[process] = who
        return process

    def _drive(self, who: str, strike: Strike) -> NoReturn:
        code, log = FAULT, Log(self.log, who)
        said = os.open(self.folder / f"{who}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        try:
            striker = Striker(strike, log)
            self._prepare(striker, log)
            small_recipe.drive(small_recipe.configured(self.inputs, self.uri))
            log.line(steps=striker.steps.counts, first=striker.steps.first)
            code = 0
        except OURS as error:
            log.line(said=type(error).__name__, message=str(error))
            code = SAID
        except BaseException:  # noqa: BLE001 (a fork must end here, whatever it was)
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _prepare(self, striker: Striker, log: Log) -> None:
        """The driver's own process, before it begins."""
        small_recipe.stand_in_for_a_cluster()
        acquire: Any = Lease.acquire
        acquire.__func__.__kwdefaults__["ttl_s"] = TTL_S
        if self.plant is not None:
            self.plant()
        record(log, striker.steps, self.uri)
        if self.on_disk:
            striker.steps.watch_the_system(self.uri)
        elif striker.strike.what == "refuse":
            striker.refuse_service()
        if striker.strike.shift_s:
            shift_clock(striker.strike.shift_s)

    def wait(self, process: int | None = None, *, or_stopped: bool = False) -> int:
        """Until this driver ends, or any; its status.

        Raises:
            BlowFailed: where none ends, or one by no error of ours.
        """
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until:
            for each in list(self.alive) if process is None else [process]:
                options = os.WNOHANG | (os.WUNTRACED if or_stopped else 0)
                found, status = os.waitpid(each, options)
                if found:
                    return status if os.WIFSTOPPED(status) else self._ended(each, status)
            time.sleep(0.002)
        who = ", ".join(self.alive.values())
        self.kill()
        raise BlowFailed(f"{who} did not end within {DEADLINE_S:.0f} s")

    def kill(self) -> None:
        """Ends all drivers at once."""
        for process in self.alive:
            os.kill(process, signal.SIGKILL)
        for process in list(self.alive):
            self._ended(process, os.waitpid(process, 0)[1])

    def _ended(self, process: int, status: int) -> int:
        who = self.alive.pop(process)
        self.machine.line(gone=who)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == FAULT:
            told = (self.folder / f"{who}.txt").read_text()[-3000:]
            self.kill()
            raise BlowFailed(f"{who} ended by no error of ours:\n{told}")
        return status


@dataclass(frozen=True)
class Undisturbed:
    """How many steps a driver makes of its own accord.

    Attributes:
        steps: by thread.
        first: of the main thread, the step at which each stage begins.
    """

    steps: dict[str, int]
    first: dict[str, int]

    @classmethod
    def of(cls, run: Run) -> Undisturbed:
        """Those of a run's only driver."""
        (line,) = (line for line in run.lines() if "steps" in line)
        return cls(line["steps"], line["first"])

    def drawn(self, run: Run, draw: random.Random) -> dict[str, Any]:
        """A step at which the next driver of a run is about as likely to be as at any other."""
        committed = {
            line["what"]["name"].split("/")[0]
            for line in (run.lines() if run.log.exists() else ())
            if "began" in line and line["what"]["name"].endswith("/manifest.json")
            if line["what"]["op"] == "create"
        }
        starts = [step for stage, step in self.first.items() if stage not in committed]
        if draw.random() < 0.15:
            return {"thread": "checkpoint", "at": draw.randint(1, self.steps["checkpoint"])}
        left = self.steps["MainThread"] - min(starts, default=self.first["align"])
        return {"thread": "MainThread", "at": draw.randint(1, max(1, left))}
