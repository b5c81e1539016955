"""SIGTERM or SIGUSR1 in; a command that ends in good order, and resumes when given again, out.

A scheduler that takes a machine back sends one of them first. A training answers with a checkpoint,
all else ends at once: what was committed stays.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(RuntimeError):
    """A command was told to stop, and did; what was committed stays, and the same command resumes.

    A training has made a checkpoint before.
    """

    exit_code = 75  # sysexits.h: EX_TEMPFAIL, to be tried again


@contextmanager
def on_stop(do: Callable[[str], bool]) -> Iterator[None]:
    """Within it a stop signal calls this with its name; where that says False, what did before.

    In the main thread alone, as Python has it; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        outer = before[number]
        if do(signal.Signals(number).name):
            return
        if callable(outer):
            outer(number, frame)
        else:
            raise SystemExit(Preempted.exit_code)

    before = {int(number): signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
