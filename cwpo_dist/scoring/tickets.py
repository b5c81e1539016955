"""The shards that are left in; which of them a pool's ticket stands for, out.

It has a process of its own beside the driver, which is why no model and no Ray Data is imported
here: torch and transformers would take longer than most shards.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

MOST_DEATHS = 10  # of actors on living nodes over one shard: then the shard itself kills them
MOST_DEVICES = 3  # that break over one shard: then it is the shard that breaks them
MOST_BREAKS = 2  # of one device, whatever the shards: then it gets no more of them
SPARE = 2  # tickets that a device may hold without a shard: Ray Data hands out so many at once

Later = Literal["later"]


class ShardError(RuntimeError):
    """A shard cannot be done on this machine; the message names it, the cause and the remedy."""


class BrokenDeviceError(ShardError):
    """The device will compute nothing more in this process: not by fault of a row."""


@dataclass
class Broken:
    """Devices that broke: the actors that come after these ones must know it.

    Attributes:
        breaks: device → how often.
        over: shard → the devices that broke over it.
        all_that_came: whether every device that came up may compute no more.
    """

    breaks: Mapping[str, int] = field(default_factory=dict)
    over: Mapping[int, set[str]] = field(default_factory=dict)
    all_that_came: bool = False


class TicketShards:
    """Which shard each ticket stands for; lives in an actor beside the driver.

    A shard is chosen when an actor begins a ticket, not when Ray Data hands it out: that is ahead
    of time, and the shard would wait behind a long one while other actors idle.

    Args:
        name: of the work.
        shards: that are to be done.
        tickets: how many there are, of all pools.
        broken: what was known of devices before.
    """

    def __init__(
        self, name: str, shards: Sequence[int], tickets: int, broken: Broken | None = None
    ) -> None:
        self.name, self.tickets = name, tickets
        broken = broken or Broken()
        self.waiting = deque(shards)
        self.given: dict[tuple[int, str], int] = {}  # (pool, ticket) → shard
        self.begun: Counter[tuple[int, str, str]] = Counter()  # the same on each node
        self.under_way: dict[int, dict[int, str]] = {}  # shard → pool → node; oldest first
        self.broke_over = {shard: set(devices) for shard, devices in broken.over.items()}
        self.breaks = dict(broken.breaks)  # device → how often, for all that have begun
        self.node_of: dict[str, str] = {}  # device → node, of those that came up here
        self.spent: set[tuple[int, str]] = set()  # tickets that found nothing left to do
        self.refused: set[tuple[int, str]] = set()  # those with a device that gets no shard

    def take(self, pool: int, ticket: str, node: str, device: str) -> int | Later | None:
        """The ticket's shard; None when nothing is left for it to do.

        Where nothing waits any more, a pool gets what another one has had for longest: the first
        commit wins, and no pool idles behind a slower or a lost one. A device that broke twice gets
        none: it is told to ask again, until others have done them all.

        Args:
            pool: its number.
            ticket: id of Ray's task.
            node: of the actor.
            device: of the actor; other processes on it have the same.

        Raises:
            ShardError: when the shard takes actors down with it.
        """
        self.node_of[device] = node
        self.refused.discard((pool, ticket))
        if self.breaks.setdefault(device, 0) >= MOST_BREAKS and (self.waiting or self.under_way):
            self.refused.add((pool, ticket))
            return "later"
        index = self._shard_of(pool, ticket, node, device)
        if index is None:
            self.spent.add((pool, ticket))
        return index

    def _shard_of(self, pool: int, ticket: str, node: str, device: str) -> int | None:
        # A ticket is the id of Ray's task. Of a lost actor's task Ray makes another try under the
        # same id, which must find the same shard: its first try may be about to commit it.
        if (pool, ticket) not in self.given:
            index = self._waiting_for(device)
            if index is None:
                index = self._of_another(pool)
            if index is None:
                return None
            self.given[pool, ticket] = index
            self.under_way.setdefault(index, {})
        index = self.given[pool, ticket]
        if index not in self.under_way:
            return None
        self.under_way[index][pool] = node
        # Node by node: that a node was lost, with all its actors, is no fault of a shard.
        self.begun[pool, ticket, node] += 1
        if self.begun[pool, ticket, node] > MOST_DEATHS:
            raise ShardError(
                f"{self.name}: shard {index} took {MOST_DEATHS} actors down with it, on a node "
                "that lives; look there for too little memory or a crash in native code"
            )
        return index

    def broke(self, pool: int, ticket: str, device: str, why: str) -> None:
        """A device broke over the ticket's shard, which waits for another one now.

        Args:
            pool: its number.
            ticket: id of Ray's task, which Ray will run again.
            device: that broke.
            why: in words.

        Raises:
            ShardError: when it broke others before, or when no device is left.
        """
        index = self.given.pop((pool, ticket))
        self.breaks[device] += 1
        devices = self.broke_over.setdefault(index, set())
        devices.add(device)
        if len(devices) >= MOST_DEVICES:
            raise ShardError(
                f"{self.name}: shard {index} broke {len(devices)} devices ({why}); look at its "
                "rows and the model, with CUDA_LAUNCH_BLOCKING=1 to see where"
            )
        if self._all_broken():
            raise ShardError(
                f"{self.name}: the device broke {MOST_BREAKS} times ({why}), and no other is left "
                f"({device}); reset or replace it, then run the same command again"
            )
        holders = self.under_way.get(index, {})
        holders.pop(pool, None)
        if index in self.under_way and not holders:
            del self.under_way[index]
            self.waiting.appendleft(index)

    def _waiting_for(self, device: str) -> int | None:
        """The next one, but of those that broke this device only what no other has taken."""
        broken = (index for index in self.waiting if device in self.broke_over.get(index, ()))
        whole = (index for index in self.waiting if device not in self.broke_over.get(index, ()))
        index = next(whole, next(broken, None))
        if index is not None:
            self.waiting.remove(index)
        return index

    def _of_another(self, pool: int) -> int | None:
        """The shard that another pool has had for longest, as the oldest stands first."""
        return next((i for i, holders in self.under_way.items() if pool not in holders), None)

    def has_begun(self) -> bool:
        """True once an actor has come up and taken a shard."""
        return bool(self.begun)

    def done(self, index: int) -> None:
        """The shard is committed."""
        self.under_way.pop(index, None)

    def stranded(self, alive: set[str]) -> bool:
        """True when what is left lies with actors on lost nodes, or waits for none but those.

        Or when nobody is left to take it: Ray Data hands out tickets ahead of time, and ends an
        actor that has none any more, while the last ones may lie with a broken device.
        """
        if any(set(held.values()) & alive for held in self.under_way.values()):
            return False
        if not self.waiting:
            return True
        able = {node for d, node in self.node_of.items() if self.breaks[d] < MOST_BREAKS}
        return bool(self.node_of) and (not able & alive or self._rest_is_refused())

    def close(self) -> Broken:
        """No ticket that has not begun gets a shard any more; what was learned of devices."""
        self.waiting.clear()
        self.under_way.clear()
        breaks = {device: times for device, times in self.breaks.items() if times}
        return Broken(breaks, self.broke_over, self._all_broken())

    def _rest_is_refused(self) -> bool:
        """True when the tickets that are left lie with devices that get no shard.

        One that waits here holds up to SPARE - 1 behind it, which have not asked yet.
        """
        done = {ticket for ticket, index in self.given.items() if index not in self.under_way}
        unseen = self.tickets - len(self.refused | self.spent | done)
        return len(self.refused) > 0 and unseen <= len(self.refused) * (SPARE - 1)

    def _all_broken(self) -> bool:
        """True when each device that came up may compute no more."""
        here = [self.breaks[device] for device in self.node_of]
        return bool(here) and min(here) >= MOST_BREAKS
