"""SIGTERM and SIGUSR1 to a command: code 75, one message, and the same command goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray._private import utils
from small_run import small_config

from cwpo_dist.config.load import parse_config
from cwpo_dist.execution.side_by_side import Job, make_all
from cwpo_dist.graph import nodes_until
from cwpo_dist.runs import cluster
from cwpo_dist.runs.context import Context
from cwpo_dist.stop_signals import STOP_SIGNALS, Preempted, on_stop
from cwpo_dist.storage import StorageError, Store
from cwpo_dist.training.checkpoint import newest
from cwpo_dist.training.lease import Lease, LeaseToken, ask_holder_to_stop


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_command_that_is_told_to_stop_says_so_and_ends_with_its_code(
    number: signal.Signals,
    exit_code: Callable[..., int | str | None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def long_work(*_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    monkeypatch.setattr("cwpo_dist.results.show.show", long_work)
    assert exit_code("report", str(tmp_path)) == 75
    said = f"{number.name}: stopped; what was committed stays, and the same command resumes\n"
    assert capsys.readouterr().err == said
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_an_exit_that_nobody_asked_for_keeps_its_code(
    exit_code: Callable[..., int | str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def end(*_: object) -> None:
        raise SystemExit(3)

    monkeypatch.setattr("cwpo_dist.results.show.show", end)
    assert exit_code("report", str(tmp_path)) == 3


@pytest.mark.parametrize("command", ["begins Ray", "fails as it ends", "hears it twice"])
def test_nothing_takes_the_code_from_a_command_that_was_told_to_stop(
    command: str,
    exit_code: Callable[..., int | str | None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def init(**_: object) -> None:
        utils.set_sigterm_handler(lambda *_: sys.exit(15))  # as Ray does first of all
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    def work(*_: object) -> None:
        if command == "begins Ray":
            cluster.connect()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            if command == "fails as it ends":
                raise StorageError("refused")
            os.kill(os.getpid(), signal.SIGTERM)
            (tmp_path / "in order").touch()

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr("cwpo_dist.results.show.show", work)
    assert exit_code("report", str(tmp_path)) == 75
    assert capsys.readouterr().err.startswith("SIGTERM: stopped; what was committed stays")
    assert (tmp_path / "in order").exists() == (command == "hears it twice")


def test_what_was_done_when_the_signal_came_is_done(
    exit_code: Callable[..., int | str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def end(*_: object) -> None:
        with contextlib.suppress(SystemExit):  # as Python does of a handler that meets a finalizer
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("cwpo_dist.results.show.show", end)
    assert exit_code("report", str(tmp_path)) == 0


def test_who_leaves_a_signal_alone_hands_it_on() -> None:
    heard: list[str] = []

    def outer(name: str) -> bool:
        heard.append(f"outer {name}")
        return True

    def inner(name: str) -> bool:
        heard.append(name)
        return name == "SIGUSR1"

    with on_stop(outer), on_stop(inner):
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
    assert heard == ["SIGTERM", "outer SIGTERM", "SIGUSR1"]
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with on_stop(lambda _: False), pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 75


def test_another_thread_sets_no_handler() -> None:
    before, within = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with on_stop(lambda _: True):
            within.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert within == [before]


def test_a_holder_is_asked_while_it_trains(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert not ask_holder_to_stop(store), "nobody ever trained here"
    with Lease.acquire(store) as lease:
        assert not ask_holder_to_stop(store), "no ranks have started: nothing would be lost"
        lease.token.for_new_group(1.0)
        assert not lease.token.asked_to_stop()
        assert ask_holder_to_stop(store)
        assert lease.token.asked_to_stop()
    assert not ask_holder_to_stop(store), "it has ended"
    with Lease.acquire(store) as later:
        later.token.for_new_group(1.0)
        assert not later.token.asked_to_stop(), "what was asked of another"


def test_trainings_side_by_side_checkpoint_before_they_end(ray_local: Any, tmp_path: Path) -> None:
    """Two trainings, in Ray tasks of their own, that would not end within the time of this test."""
    runs = [
        parse_config(small_config(tmp_path, seed=seed, fit__max_steps=10**6, fit__save_steps=10**6))
        for seed in (0, 1)
    ]
    context = Context(Store(str(tmp_path / "run")))
    nodes = [node for run in runs for node in nodes_until(run, "cw", "fit").values()]
    fits = [node for node in nodes if node.stage == "fit"]

    ended = threading.Event()

    def stop_when_both_train() -> None:
        while not ended.wait(0.1):
            if all(LeaseToken(context.place(fit), 1).has_group() for fit in fits):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=stop_when_both_train)
    thread.start()
    try:
        with pytest.raises(Preempted, match="the same command resumes"):
            make_all([Job(context, node) for node in nodes])
    finally:
        ended.set()
        thread.join()
    assert len(fits) == 2
    for fit in fits:
        found = newest(context.place(fit))
        assert found is not None, "no checkpoint before the end"
        assert 0 < found.step < 10**6
