"""A blow in; what befalls a driver at its step n, and a disk after a power cut, out."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recorded import Log, Steps

REFUSED_SHARE = 0.05
REFUSABLE = ("write", "sync", "remove", "read")  # kinds of steps
HOUR_S = 3600.0
FULL_STEPS = 40  # of a driver's writes, for which its disk is full
_OF_A_DISK = (errno.ETIMEDOUT, errno.EIO, errno.ESTALE, errno.ECONNRESET, errno.EBUSY)
_OF_A_SERVICE = (("TooManyRequests", 429), ("InternalError", 500), ("SlowDown", 503))

What = Literal["nothing", "kill", "stop", "full", "refuse"]


@dataclass(frozen=True)
class Strike:
    """What befalls one driver.

    Attributes:
        what: `kill` and `stop` are real signals, which the driver sends itself at this step;
            `full` and `refuse` are errors of the calls by which it reaches its storage.
        at: the step of its thread.
        thread: whose steps count: `MainThread`, or `checkpoint`.
        shift_s: by how much its clock is wrong.
        seed: of what is refused.
    """

    what: What = "nothing"
    at: int = 0
    thread: str = "MainThread"
    shift_s: float = 0.0
    seed: int = 0


class Striker:
    """Lets a strike befall this process."""

    def __init__(self, strike: Strike, log: Log) -> None:
        self.strike, self._log, self.steps = strike, log, Steps(self, log)
        self._draw, self._told = random.Random(strike.seed), False

    def __call__(self, kind: str) -> None:
        """Called at each step.

        Raises:
            OSError: where the disk is full, or refuses.
        """
        if self.strike.what in {"kill", "stop"}:
            self._signal()
        elif self.strike.what == "full" and kind == "write":
            steps = range(self.strike.at, self.strike.at + FULL_STEPS)
            if self.steps.counts["MainThread"] in steps:
                self._refuse(errno.ENOSPC)
        elif self.strike.what == "refuse" and kind in REFUSABLE and self._is_drawn():
            self._refuse(self._draw.choice(_OF_A_DISK))

    def _signal(self) -> None:
        name = threading.current_thread().name
        if name == self.strike.thread and self.steps.counts[name] == self.strike.at:
            self._tell()
            number = signal.SIGKILL if self.strike.what == "kill" else signal.SIGSTOP
            os.kill(os.getpid(), number)

    def _is_drawn(self) -> bool:
        return self._draw.random() < REFUSED_SHARE

    def _refuse(self, number: int) -> None:
        self._tell()
        raise OSError(number, os.strerror(number))

    def refuse_service(self) -> None:
        """A service that turns requests away, or breaks off before or after it has done them.

        Below the client's own retries: what it does not try again reaches the product.
        """
        import s3fs.core
        from botocore.exceptions import ClientError

        wrapper = s3fs.core._error_wrapper

        async def flaky(func: Callable[..., Awaitable[Any]], **given: Any) -> Any:
            async def call(*args: Any, **named: Any) -> Any:
                if not self._is_drawn():
                    return await func(*args, **named)
                self._tell()
                case = self._draw.randrange(len(_OF_A_SERVICE) + 2)
                if case < len(_OF_A_SERVICE):
                    code, status = _OF_A_SERVICE[case]
                    said = {
                        "Error": {"Code": code, "Message": code},
                        "ResponseMetadata": {"HTTPStatusCode": status},
                    }
                    raise ClientError(said, "request")  # type: ignore[arg-type]  # its own dict
                if case == len(_OF_A_SERVICE):
                    await func(*args, **named)  # it is done, and nobody hears of it
                raise ConnectionResetError(errno.ECONNRESET, "the connection was reset")

            return await wrapper(call, **given)

        s3fs.core._error_wrapper = flaky

    def _tell(self) -> None:
        """Once."""
        if not self._told:
            self._told = True
            self._log.line(struck=self.steps.where)


def shift_clock(by_s: float) -> None:
    """This process's clock is wrong from now on."""
    true = time.time
    time.time = lambda: true() + by_s


def unsynced(root: Path, log: Path) -> tuple[list[Path], list[Path]]:
    """The names that nobody brought to the disk, and the files whose bytes nobody did.

    Args:
        root: of the files.
        log: of what was synced.
    """
    of_bytes: set[tuple[int, ...]] = set()
    of_names: set[tuple[int, str, int]] = set()  # of a folder that may have another name by now
    for line in log.read_text().splitlines():
        given = json.loads(line)
        if "mark" in given:
            of_bytes.add(tuple(given["mark"]))
            of_names |= {(given["mark"][0], n, inode) for n, inode in given["names"].items()}
    names, torn = [], []
    for path in root.rglob("*"):
        found = path.stat()
        if (path.parent.stat().st_ino, path.name, found.st_ino) not in of_names:
            names.append(path)
        mark = (found.st_ino, found.st_size, found.st_mtime_ns)
        if path.is_file() and found.st_size and mark not in of_bytes:
            torn.append(path)
    return names, torn


def cut_power(root: Path, log: Path, draw: random.Random) -> dict[str, int]:
    """What a disk may have lost, of all that was not brought to it: simulated on the files.

    A file whose bytes were not synced is empty or half; a name that was not synced in its folder is
    there or gone. What was removed stays removed, and a replaced name has the new file.
    """
    names, torn = unsynced(root, log)
    for path in torn:
        os.truncate(path, draw.choice([0, path.stat().st_size // 2]))
    gone = [path for path in names if draw.random() < 0.5]
    for path in gone:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # its folder may be gone
    return {"names": len(gone), "torn": len(torn)}
