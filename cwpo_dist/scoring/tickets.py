"""The shards that are left in; which of them a pool's ticket stands for, out.

It has a process of its own beside the driver, which is why no model and no Ray Data is imported
here: torch and transformers would take longer than most shards.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

MOST_DEATHS = 10  # of actors on living nodes over one shard: then the shard itself kills them


class ShardError(RuntimeError):
    """A shard cannot be done on this machine; the message names it, the cause and the remedy."""


class Shards:
    """Which shard each ticket stands for; lives in an actor beside the driver."""

    def __init__(self, name: str, shards: Sequence[int]) -> None:
        self.name = name
        self.waiting = deque(shards)
        self.given: dict[tuple[int, str], int] = {}  # (pool, ticket) → shard
        self.begun: Counter[tuple[int, str, str]] = Counter()  # the same on each node
        self.under_way: dict[int, dict[int, str]] = {}  # shard → pool → node; oldest first

    def take(self, pool: int, ticket: str, node: str) -> int | None:
        """The ticket's shard; None when nothing is left for it to do.

        Where nothing waits any more, a pool gets what another one has had for longest: the first
        commit wins, and no pool idles behind a slower or a lost one.
        """
        if (pool, ticket) not in self.given:
            index = self.waiting.popleft() if self.waiting else self._of_another(pool)
            if index is None:
                return None
            self.given[pool, ticket] = index
            self.under_way.setdefault(index, {})
        index = self.given[pool, ticket]
        if index not in self.under_way:
            return None
        self.under_way[index][pool] = node
        self.begun[pool, ticket, node] += 1
        if self.begun[pool, ticket, node] > MOST_DEATHS:
            raise ShardError(
                f"{self.name}: shard {index} took {MOST_DEATHS} actors down with it, on a node "
                "that lives; look there for want of memory or a crash in native code"
            )
        return index

    def _of_another(self, pool: int) -> int | None:
        return next((i for i, holders in self.under_way.items() if pool not in holders), None)

    def has_begun(self) -> bool:
        """True once an actor has come up and taken a shard."""
        return bool(self.begun)

    def done(self, index: int) -> None:
        """The shard is committed."""
        self.under_way.pop(index, None)

    def stranded(self, alive: set[str]) -> bool:
        """True when all that is left lies with actors on lost nodes."""
        holders = [set(held.values()) for held in self.under_way.values()]
        return not self.waiting and not any(nodes & alive for nodes in holders)

    def close(self) -> None:
        """No ticket that has not begun gets a shard any more."""
        self.waiting.clear()
        self.under_way.clear()
