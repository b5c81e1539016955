"""What a child computes comes back; one that waits for a lock that nobody holds is begun anew."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cwpo_dist.lm import bounded
from cwpo_dist.lm.bounded import BoundError


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "_STILL_S", 2.0)
    monkeypatch.setattr(bounded, "_LOOK_S", 0.1)
    monkeypatch.setattr(bounded, "_WAITED_S", 4.0)


def counted(folder: Path, call: Callable[[int], int]) -> Callable[[], int]:
    """A call that is told which try it is, from 0."""

    def tried() -> int:
        number = len(list(folder.glob("try-*")))
        (folder / f"try-{number}").touch()
        return call(number)

    return tried


def tries(folder: Path) -> int:
    return len(list(folder.glob("try-*")))


def test_a_lock_that_another_thread_held_at_the_fork_does_not_hold_up_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock, forked, free = threading.Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            forked.set()
            while tries(tmp_path) == 0:
                time.sleep(0.05)
        free.set()

    holder = threading.Thread(target=hold)
    holder.start()
    forked.wait()

    def call(_: int) -> int:
        with lock:  # of the thread that the first child does not have
            return 7

    assert bounded.bounded(counted(tmp_path, call)) == 7
    holder.join()
    assert free.is_set()
    assert tries(tmp_path) == 2
    assert "begun anew: stood still for 2 s" in caplog.text


def test_who_computes_is_let_compute(tmp_path: Path) -> None:
    def busy(number: int) -> int:
        end = time.monotonic() + 5
        while time.monotonic() < end:
            sum(range(10_000))
        return number

    assert bounded.bounded(counted(tmp_path, busy)) == 0
    assert tries(tmp_path) == 1


def test_who_always_waits_is_refused_at_the_end(tmp_path: Path) -> None:
    def waits(_: int) -> int:
        time.sleep(60)
        return 0

    with pytest.raises(BoundError, match="it does not end, after 4 s of waiting"):
        bounded.bounded(counted(tmp_path, waits))
    assert tries(tmp_path) == 3


def test_a_child_that_a_signal_ended_is_begun_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen on a busy machine: a library aborts in the child of a process that has threads."""

    def dies_once(number: int) -> int:
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    assert bounded.bounded(counted(tmp_path, dies_once)) == 1
    assert "begun anew: the process that read it died (SIGKILL)" in caplog.text


def test_who_dies_each_time_is_refused(tmp_path: Path) -> None:
    def dies(_: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with pytest.raises(BoundError, match=r"the process that read it died \(SIGKILL\)"):
        bounded.bounded(counted(tmp_path, dies))
    assert tries(tmp_path) == 3


def test_what_it_raises_and_how_it_dies_is_said(tmp_path: Path) -> None:
    def raises(_: int) -> int:
        raise KeyError("no such thing")

    with pytest.raises(BoundError, match="no such thing"):
        bounded.bounded(counted(tmp_path, raises))
    assert tries(tmp_path) == 1


class _Gone:
    """Says in which process it was collected, as Ray's references give themselves back there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.itself = folder, self

    def __del__(self) -> None:
        (self.folder / f"gone-{os.getpid()}").touch()


def test_garbage_of_the_parent_is_left_to_the_parent(tmp_path: Path) -> None:
    assert gc.isenabled()
    gc.disable()
    try:
        _Gone(tmp_path)
        assert bounded.bounded(lambda: (gc.collect(), gc.isenabled())[1]), "the child's own goes"
        assert not list(tmp_path.glob("gone-*"))
    finally:
        gc.enable()
    gc.collect()
    assert [path.name for path in tmp_path.glob("gone-*")] == [f"gone-{os.getpid()}"]
    bounded.bounded(lambda: 0)
    assert gc.isenabled()
