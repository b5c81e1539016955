"""One writer a stage: live holders refuse, dead or silent ones are followed, zombies shut out."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cwpo_dist.storage import Store
from cwpo_dist.training.lease import Holder, Lease, LeaseHeld, LeaseLost, device_hours


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "align" / "key"))


def holder(store: Store, epoch: int = 1, beat: float | None = None, **changes: object) -> None:
    """Writes a lease as another process would have."""
    held = vars(Holder.this_process()) | {"host": "elsewhere", "since": 0.0} | changes
    assert store.create_json(f"lease/{epoch:06d}.json", held)
    if beat is not None:
        store.write(f"lease/{epoch:06d}.beat", repr(beat).encode())


def test_a_live_holder_is_named(store: Store) -> None:
    with Lease.acquire(store), pytest.raises(LeaseHeld) as caught:
        Lease.acquire(store)
    assert f"process {os.getpid()} on {socket.gethostname()}" in str(caught.value)
    assert f"kill {os.getpid()}" in str(caught.value)


def test_released_is_free(store: Store) -> None:
    with Lease.acquire(store) as first:
        pass
    with Lease.acquire(store) as second:
        assert second.token.epoch == first.token.epoch + 1


def test_renewed_while_held(store: Store) -> None:
    with Lease.acquire(store, ttl_s=0.3):
        time.sleep(1.0)
        with pytest.raises(LeaseHeld):
            Lease.acquire(store, ttl_s=0.3)


class Clock:
    """The time as a taker sees it, in no time: whenever it sleeps, so much of it has passed.

    Attributes:
        passed: seconds that it has slept.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object] = lambda: None
    ) -> None:
        """Takes the place of the clock.

        Args:
            monkeypatch: ends it.
            meanwhile: what another does after 9 s.
        """
        self.passed, self._meanwhile = 0.0, meanwhile
        clock = SimpleNamespace(time=time.time, monotonic=lambda: self.passed, sleep=self._sleep)
        monkeypatch.setattr("cwpo_dist.training.lease.time", clock)

    def _sleep(self, seconds: float) -> None:
        self.passed += seconds
        if self.passed > 9:
            self._meanwhile()


def beats(store: Store) -> Callable[[], object]:
    """A first holder's next sign of life, whatever its clock says."""
    return lambda: store.write("lease/000001.beat", b"1.5")


HOUR = 3600.0


@pytest.mark.parametrize("ahead", [-HOUR, -61.0, 0.0, 61.0, HOUR], ids="{:g} s".format)
def test_a_holder_elsewhere_is_judged_by_no_clock_but_ours(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ahead: float,
) -> None:
    """Dead, it is followed after a TTL; living, it is refused at its next sign of life."""
    now = time.time() + ahead
    holder(store, beat=now, since=now - 5)
    living = Clock(monkeypatch, beats(store))
    with caplog.at_level("WARNING"), pytest.raises(LeaseHeld, match="on elsewhere, which lives"):
        Lease.acquire(store, ttl_s=60)
    assert living.passed <= 12, "a sixth of a TTL, and a look"
    assert "which may be dead: waiting for its next sign of life" in caplog.text
    assert "due every 10 s, for 60 s at most" in caplog.text
    dead = Clock(monkeypatch)
    with Lease.acquire(store, ttl_s=60) as lease:
        assert lease.token.epoch == 2
    assert 60 <= dead.passed <= 62


def test_killed_before_its_first_beat(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    holder(store, since=time.time() + HOUR)
    clock = Clock(monkeypatch)
    Lease.acquire(store, ttl_s=60).release()
    assert 60 <= clock.passed <= 62


def test_a_holder_that_ends_while_it_is_watched_is_followed_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder(store, beat=time.time())
    clock = Clock(monkeypatch, lambda: store.write("lease/000001.released", b"1.0"))
    Lease.acquire(store, ttl_s=60).release()
    assert clock.passed <= 12


@pytest.mark.parametrize("set_by", [-HOUR, HOUR])
def test_where_this_hosts_clock_was_set_a_holder_here_is_watched(
    store: Store, monkeypatch: pytest.MonkeyPatch, set_by: float
) -> None:
    """It lives, so that it is not taken from; and is not believed to the end of the hour."""
    here = vars(Holder.this_process())
    holder(store, beat=time.time() + set_by, **here)
    clock = Clock(monkeypatch, beats(store))
    with pytest.raises(LeaseHeld):
        Lease.acquire(store, ttl_s=60)
    assert 9 < clock.passed <= 12
    Clock(monkeypatch)  # it hangs
    Lease.acquire(store, ttl_s=60).release()


def test_device_hours_are_those_of_all_groups(store: Store) -> None:
    """Two of a driver that ended, one of a killed driver, none of one that never found room."""
    holder(store, 1, beat=105.0, since=100.0)
    store.write("lease/000001.released", b"117.5")
    store.create_json("lease/000001.workers-0001", {"since": 101.0, "devices": 8})
    store.create_json("lease/000001.workers-0002", {"since": 111.0, "devices": 4})
    holder(store, 2, beat=230.0, since=200.0)
    store.create_json("lease/000002.workers-0001", {"since": 210.0, "devices": 2})
    holder(store, 3, beat=900.0, since=300.0)
    by_hand = 10 * 8 + 6.5 * 4 + 20 * 2
    assert device_hours(store) * 3600 == pytest.approx(by_hand)
    with Lease.acquire(store, ttl_s=0.1) as lease:
        lease.token.for_new_group(2.5)
        time.sleep(0.4)
    assert device_hours(store) * 3600 == pytest.approx(by_hand + 1.0, abs=0.5)


def test_what_an_earlier_version_left_has_no_hours_and_does_no_harm(store: Store) -> None:
    """It wrote the same files, empty."""
    holder(store, 1, beat=105.0, since=100.0)
    store.write("lease/000001.workers-0001", b"")
    store.write("lease/000001.released", b"")
    assert device_hours(store) == 0.0
    store.create_json("lease/000001.workers-0002", {"since": 101.0, "devices": 2})
    assert device_hours(store) * 3600 == pytest.approx(8.0), "to its last beat"


def _take(store: Store, taken: object) -> None:
    Lease.acquire(store)
    # multiprocessing's events have no public type.
    taken.set()  # type: ignore[attr-defined]  # multiprocessing's proxies have no types
    time.sleep(60)


def test_dead_here_needs_no_waiting(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    taken = context.Event()
    process = context.Process(target=_take, args=(store, taken))
    process.start()
    assert taken.wait(60)
    with pytest.raises(LeaseHeld, match=f"process {process.pid}"):
        Lease.acquire(store)
    process.kill()
    process.join()
    with Lease.acquire(store) as lease:
        assert lease.token.epoch == 2


def test_a_reused_process_id_is_another_process(store: Store) -> None:
    here = Holder.this_process()
    holder(store, beat=time.time(), host=here.host, started=here.started + 1)
    Lease.acquire(store).release()


def test_ids_of_another_container_or_boot_prove_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Holder.this_process()
    holder(store, beat=time.time(), host=here.host, boot="other", started=here.started + 1)
    Clock(monkeypatch, beats(store))
    with pytest.raises(LeaseHeld):
        Lease.acquire(store)


def test_an_empty_sign_of_life_is_none(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a power cut may leave it."""
    here = Holder.this_process()
    holder(store, host=here.host, since=time.time())
    store.write("lease/000001.beat", b"")
    with pytest.raises(LeaseHeld):
        Lease.acquire(store)
    assert device_hours(store) == 0.0


def test_a_zombie_is_shut_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    holder(store, beat=0.0)
    Clock(monkeypatch)
    zombie = Lease.acquire(store)
    workers = zombie.token.for_new_group(1)
    workers.check()
    holder(store, epoch=3)
    for token in (workers, zombie.token):
        with pytest.raises(LeaseLost, match="elsewhere"):
            token.check()
    with pytest.raises(LeaseLost):
        zombie.token.for_new_group(1)
    zombie.release()


def test_a_group_shuts_out_the_one_before(store: Store) -> None:
    with Lease.acquire(store) as lease:
        first = lease.token.for_new_group(1)
        second = lease.token.for_new_group(1)
        second.check()
        with pytest.raises(LeaseLost, match=r"1\.1 has passed on to 1\.2"):
            first.check()


def test_one_of_many_wins(store: Store) -> None:
    results: list[str] = []
    start = threading.Barrier(8)

    def contend() -> None:
        start.wait()
        try:
            Lease.acquire(store)
            results.append("won")
        except LeaseHeld:
            results.append("refused")

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["refused"] * 7 + ["won"]


def test_word_to_the_workers(store: Store) -> None:
    with Lease.acquire(store) as lease:
        workers = lease.token.for_new_group(1)
        assert not workers.asked_to_stop()
        lease.token.ask_to_stop()
        assert workers.asked_to_stop()


def test_on_object_storage(s3_store: Store) -> None:
    with Lease.acquire(s3_store) as lease:
        lease.token.for_new_group(1).check()
        with pytest.raises(LeaseHeld):
            Lease.acquire(s3_store)
    Lease.acquire(s3_store).release()
