"""A stage's folder in, the right to write there out: one holder at a time, the later epoch wins.

`lease/000003.json` names the third holder and is made put-if-absent; `lease/000003.beat` is its
sign of life, renewed by a thread. Whether a holder elsewhere lives is seen by whether its sign
changes, for the clocks of two machines may differ by any amount. A dead holder is followed by epoch
4; from then on whatever epoch 3 still does is refused by `LeaseToken.check`, which every commit
asks first. Within an epoch, each start of a group of ranks takes a number in the same way
(`lease/000003.workers-0002`), so that a group cut off from its driver is shut out by the next one;
the file says since when it holds how many devices. `.released` holds the time of a holder's orderly
end, `.stop` asks its ranks to end.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from cwpo_dist.processes import Process
from cwpo_dist.storage import StorageError, Store

logger = logging.getLogger(__name__)

TTL_S = 60.0
BEATS_PER_TTL = 6
_LOOKS_PER_BEAT = 5  # a live holder is noticed soon after its next beat
FOLDER = "lease"


class LeaseHeld(ValueError):
    """Another driver trains this stage; the message says who, and what to do."""


class LeaseLost(RuntimeError):
    """A later driver took this stage over: nothing more may be committed here."""


@dataclass(frozen=True)
class Holder(Process):
    """The process that took a lease.

    Attributes:
        since: when, in seconds since 1970 by its own clock.
    """

    since: float

    @classmethod
    def this_process(cls) -> Holder:
        """The calling process, from now on."""
        return cls(**vars(Process.current()), since=time.time())


@dataclass(frozen=True)
class _Group:
    """When a group of ranks started, by its rank 0's clock, and how many devices it holds."""

    since: float
    devices: float


@dataclass(frozen=True)
class LeaseToken:
    """What a rank needs to ask whether it may still commit; cheap to pickle.

    Attributes:
        store: the stage's folder.
        epoch: the number of the holder.
        group: the number of the group of ranks within the epoch; 0 before any.
    """

    store: Store
    epoch: int
    group: int = 0

    def for_new_group(self, devices: float) -> LeaseToken:
        """The token of a group that starts now; it shuts out all groups before.

        Args:
            devices: that the group holds, for `device_hours`.

        Raises:
            LeaseLost: when a later driver has taken over.
        """
        while True:
            epoch, newest = _newest(self.store)
            following = replace(self, group=newest + 1)
            if epoch != self.epoch:
                following.check()
            begun = asdict(_Group(time.time(), devices))
            if self.store.claim_json(_group_name(self.epoch, following.group), begun):
                return following

    def check(self) -> None:
        """Returns while nobody later has taken over; asked right before each commit.

        Raises:
            LeaseLost: naming the later holder.
        """
        epoch, group = _newest(self.store)
        if (epoch, group) == (self.epoch, self.group):
            return
        raise LeaseLost(
            f"{self.store.uri}: lease {self.epoch}.{self.group} has passed on to {epoch}.{group} "
            f"({_who(self.store, epoch)}); this process stops without committing"
        )

    def has_group(self) -> bool:
        """True once ranks have started under this lease."""
        epoch, group = _newest(self.store)
        return epoch > self.epoch or group > 0

    def ask_to_stop(self) -> None:
        """Tells the ranks, wherever they are, to checkpoint and end."""
        self.store.write(_name(self.epoch, "stop"), b"")

    def asked_to_stop(self) -> bool:
        """True once the driver wants the ranks to checkpoint and end."""
        return self.store.exists(_name(self.epoch, "stop"))


class Lease:
    """The right to write in a stage's folder, renewed in the background; a context manager.

    Attributes:
        token: what ranks are given.
    """

    def __init__(self, token: LeaseToken, ttl_s: float) -> None:
        self.token = token
        self._ttl_s = ttl_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, store: Store, *, ttl_s: float = TTL_S) -> Lease:
        """Takes the lease of a stage's folder, over from a holder that is dead or silent.

        Args:
            store: the stage's folder.
            ttl_s: a holder whose sign of life does not change for so many seconds counts as dead;
                one that may live elsewhere is watched, until its sign changes or for so long.

        Raises:
            LeaseHeld: while a live process holds it.
        """
        newest, _ = _newest(store)
        if newest:
            _refuse_if_alive(store, newest, ttl_s)
        token = LeaseToken(store, newest + 1)
        if not store.claim_json(_name(token.epoch, "json"), asdict(Holder.this_process())):
            raise LeaseHeld(
                f"{store.uri}: {_who(store, token.epoch)} took the lease at the same moment; "
                "let it run, or stop it and start again"
            )
        return cls(token, ttl_s)

    def release(self) -> None:
        """Ends the renewal and lets the next driver in at once."""
        if not self._over.is_set():
            self._over.set()
            self._thread.join()
            now = repr(time.time()).encode()
            self.token.store.write(_name(self.token.epoch, "released"), now)

    def __enter__(self) -> Self:
        """The lease itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Releases."""
        self.release()

    def _renew(self) -> None:
        beat = _name(self.token.epoch, "beat")
        while True:
            try:
                self.token.store.write(beat, repr(time.time()).encode())
            except StorageError as error:  # one missed beat is no loss; commits ask anyway
                logger.warning("lease not renewed: %s", error)
            if self._over.wait(self._ttl_s / BEATS_PER_TTL):
                return


def ask_holder_to_stop(store: Store) -> bool:
    """Asks the ranks of whoever trains in a stage's folder to checkpoint and end.

    Returns:
        False where no ranks have started, and so nothing is lost.
    """
    epoch, group = _newest(store)
    if group == 0 or _has_ended(store, epoch, _holder(store, epoch)):
        return False
    LeaseToken(store, epoch).ask_to_stop()
    return True


def device_hours(store: Store) -> float:
    """Device-hours of all groups of ranks of a stage, killed ones too.

    A group counts until the next one starts, or its driver ends or gives its last sign of life. An
    estimate: its start is by the clock of its rank 0's node, its end by its driver's.
    """
    names, held = store.names(FOLDER), 0.0
    for epoch in range(1, _newest(store)[0] + 1):
        files = [name for name in names if name.startswith(_name(epoch, "workers-"))]
        # Empty ones are of an earlier version: nothing is known of those groups.
        groups = [_Group(**json.loads(data)) for name in files if (data := store.read(name))]
        ends = [group.since for group in groups] + [_end(store, epoch)]
        for group, end in zip(groups, ends[1:], strict=True):
            held += max(0.0, end - group.since) * group.devices
    return held / 3600


def _end(store: Store, epoch: int) -> float:
    released = _name(epoch, "released")
    if store.exists(released) and (when := store.read(released)):
        return float(when)
    return _last_beat(store, epoch, _holder(store, epoch))


def _refuse_if_alive(store: Store, epoch: int, ttl_s: float) -> None:
    """Returns once a holder has released, or is dead, or was silent for a whole TTL.

    Raises:
        LeaseHeld: as soon as it is seen to live.
    """
    holder = _holder(store, epoch)
    if _has_ended(store, epoch, holder):
        return
    # Of a process on this host the time of its last sign is by our own clock, unless that was set.
    if holder.lives_here() and 0 <= time.time() - _last_beat(store, epoch, holder) <= ttl_s:
        raise _held(store, holder)
    logger.warning(
        "%s: held by process %d on %s, which may be dead: waiting for its next sign of life, due "
        "every %.0f s, for %.0f s at most; without one it counts as dead",
        *(store.uri, holder.pid, holder.host, ttl_s / BEATS_PER_TTL, ttl_s),
    )
    before, until = _sign(store, epoch), time.monotonic() + ttl_s
    while time.monotonic() < until:
        time.sleep(ttl_s / BEATS_PER_TTL / _LOOKS_PER_BEAT)
        if _has_ended(store, epoch, holder):
            return
        if _sign(store, epoch) != before:
            raise _held(store, holder)


def _has_ended(store: Store, epoch: int, holder: Holder) -> bool:
    return holder.is_dead_here() or store.exists(_name(epoch, "released"))


def _sign(store: Store, epoch: int) -> bytes:
    """The sign of life as it is now; empty before the first."""
    beat = _name(epoch, "beat")
    return store.read(beat) if store.exists(beat) else b""


def _held(store: Store, holder: Holder) -> LeaseHeld:
    return LeaseHeld(
        f"{store.uri} is being trained by process {holder.pid} on {holder.host}, which lives. Let "
        f"it finish; or stop it (kill {holder.pid} on {holder.host}) and run this again"
    )


def _last_beat(store: Store, epoch: int, holder: Holder) -> float:
    """When a holder gave its last sign of life, by its own clock."""
    return float(_sign(store, epoch) or holder.since)  # a power cut may leave it empty


def _newest(store: Store) -> tuple[int, int]:
    """The latest epoch and its latest group; 0 where there is none."""
    names = [Path(name).name for name in store.names(FOLDER)]
    epoch = max((int(name[:6]) for name in names if name.endswith(".json")), default=0)
    groups = [name for name in names if name.startswith(f"{epoch:06d}.workers-")]
    return epoch, max((int(name[-4:]) for name in groups), default=0)


def _holder(store: Store, epoch: int) -> Holder:
    return Holder(**store.read_json(_name(epoch, "json")))


def _who(store: Store, epoch: int) -> str:
    if epoch == 0:
        return "its files are gone"
    holder = _holder(store, epoch)
    return f"process {holder.pid} on {holder.host}"


def _name(epoch: int, ending: str) -> str:
    return f"{FOLDER}/{epoch:06d}.{ending}"


def _group_name(epoch: int, group: int) -> str:
    return _name(epoch, f"workers-{group:04d}")
