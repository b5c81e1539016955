"""Work that finds no room says so in a line, naming field, what is free and the remedy."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import pytest

from cwpo_dist import waiting
from cwpo_dist.waiting import all_placed, told_while_waiting


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.3)
    monkeypatch.setattr(waiting, "POLL_S", 0.1)


def said(caplog: pytest.LogCaptureFixture, cpus: float, *, begun: bool = False) -> list[str]:
    caplog.clear()
    with told_while_waiting(
        "sft.num_workers: 2 workers of 1 CPU each", {"CPU": cpus}, "lower it", lambda: begun
    ):
        time.sleep(1.0)
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_who_waits_for_room_is_told_once(
    all_cpus_free: Callable[[], float], caplog: pytest.LogCaptureFixture
) -> None:
    all_there = all_cpus_free()
    assert said(caplog, all_there) == [], "what is free is enough: it only takes its time"
    (line,) = said(caplog, all_there + 1)
    assert line.startswith("sft.num_workers: 2 workers of 1 CPU each wait for room, as ")
    assert f"of {all_there:g} CPUs are free" in line
    assert line.endswith("when what runs there ends, or lower it")
    assert said(caplog, all_there + 1, begun=True) == []


@pytest.mark.parametrize(
    ("states", "placed"),
    [
        ([], False),
        (["REMOVED"], False),
        (["CREATED", "REMOVED"], True),
        (["CREATED", "PENDING"], False),
        (["RESCHEDULING"], False),
    ],
)
def test_a_group_that_has_its_room_waits_for_none(
    states: list[str], placed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be long in starting, while what it holds is not free."""
    groups = {str(number): {"state": state} for number, state in enumerate(states)}
    monkeypatch.setattr(waiting, "placement_group_table", lambda: groups)
    assert all_placed() == placed
