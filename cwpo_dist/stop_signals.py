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
def on_stop(do: Callable[[str], None]) -> Iterator[None]:
    """Within it a stop signal calls this with its name.

    In the main thread alone, as Python has it; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: FrameType | None) -> None:
        do(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """What answers SIGTERM before it does so after it, too: `ray.init` would take it for itself."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
