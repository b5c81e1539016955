"""Work that finds no room says so in a line, naming field, what is free and the remedy."""

from __future__ import annotations

import logging
import time

import pytest
import ray
from ray.util import placement_group, remove_placement_group

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


def test_who_waits_for_room_is_told_once(ray_local: None, caplog: pytest.LogCaptureFixture) -> None:
    all_there = ray.cluster_resources()["CPU"]
    assert said(caplog, all_there) == [], "what is free is enough: it only takes its time"
    (line,) = said(caplog, all_there + 1)
    assert line.startswith("sft.num_workers: 2 workers of 1 CPU each wait for room, as ")
    assert f"of {all_there:g} CPUs are free" in line
    assert line.endswith("when what runs there ends, or lower it")
    assert said(caplog, all_there + 1, begun=True) == []


def test_a_group_that_has_its_room_waits_for_none(ray_local: None) -> None:
    """It may be long in starting, while what it holds is not free."""
    all_there = ray.cluster_resources()["CPU"]
    first = placement_group([{"CPU": all_there}])
    ray.get(first.ready())
    try:
        assert all_placed()
        second = placement_group([{"CPU": all_there}])
        assert not all_placed()
        remove_placement_group(second)
    finally:
        remove_placement_group(first)
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < all_there and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not all_placed(), "there is none"
