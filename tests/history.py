"""What processes did in one storage folder, a line each, in; what no order of it explains, out.

A line says that an operation began or ended, by the clock that all processes of a machine share.
One that began and never ended was cut short with its process, and may have acted or not. What is
checked, and no more:

1. Of all who create a name one wins, until it is removed.
2. Who reads a name gets the bytes of one who had begun to put them there: of a created name the
   winner's, and everyone the same; of a replaced name none that had surely been replaced before.
3. Nobody sees a name that nobody had begun to put there.
4. What was put there, or seen, is not missing later, unless somebody had begun to remove it. A
   power cut may take what was still being put there, and nothing else.
5. A training has one writer: once a later driver holds the lease, no question whether the former
   one may still commit is answered with yes; and whatever it commits or exports, it asked first,
   before the later one came. (Between question and commit time passes, however short: that much is
   allowed, as each attempt commits into a folder of its own.)
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PUTS = ("create", "write", "export")
SEES = ("read", "exists", "create")


@dataclass(frozen=True)
class Did:
    """One operation.

    Attributes:
        who: the process: a driver's name.
        op: create, write, export (of a folder), read, exists, names, remove, acquire, check, cut.
        name: of a file, from the run directory on; of a lease its stage's folder.
        begin: in seconds of the machine's clock.
        end: the same; where it never ended, when its process did.
        outcome: won, lost, here, missing, done, failed; put, of what is no promise yet; `cut short`
            where it never ended.
        digest: of the bytes written or read; empty where nobody looked at them.
        seen: the names that a listing gave.
        epoch: of the lease.
    """

    who: str
    op: str
    name: str
    begin: float
    end: float = math.inf
    outcome: str = "cut short"
    digest: str = ""
    seen: frozenset[str] = frozenset()
    epoch: int = 0

    def before(self, other: Did) -> bool:
        """Whether it surely was over when the other began."""
        return self.end < other.begin

    def __str__(self) -> str:
        what = f"{self.who}: {self.op} {self.name} {self.digest}".rstrip()
        return f"{what} → {self.outcome} [{self.begin:.4f}, {self.end:.4f}]"


def load(log: Path) -> list[Did]:
    """The operations that a log tells of; a torn last line of a killed process says nothing."""
    begun: dict[tuple[str, int], dict[str, Any]] = {}
    gone: dict[str, float] = {}
    found = []
    for line in log.read_text().splitlines():
        given = json.loads(line)
        if "gone" in given:
            gone[given["gone"]] = given["at"]
        elif "began" in given:
            begun[given["who"], given["began"]] = given
        elif "ended" in given:
            first = begun.pop((given["who"], given["ended"]))
            found.append(_did(first, end=given["at"], **given["how"]))
    cut = [_did(given, end=gone.get(given["who"], math.inf)) for given in begun.values()]
    return sorted([*found, *cut], key=lambda did: did.begin)


def _did(first: dict[str, Any], **more: Any) -> Did:
    given = {"who": first["who"], "begin": first["at"]} | first["what"] | more
    return Did(**given | {"seen": frozenset(given.get("seen", ()))})


def violations(history: Iterable[Did]) -> list[str]:
    """One line for each thing that no order explains."""
    history = list(history)
    names = {name for did in history for name in ([did.name, *did.seen])}
    folders = [did for did in history if did.op in {"remove", "export", "cut", "names"}]
    by_name: dict[str, list[Did]] = defaultdict(list)
    for did in history:
        by_name[did.name].append(did)
    found = []
    for name in sorted(names):
        about = [*by_name[name], *(did for did in folders if _covers(did, name))]
        found += _of_name(name, _Name(list(dict.fromkeys(about)), name))
    return [*found, *_of_leases(history)]


def _covers(did: Did, name: str) -> bool:
    everything = did.op == "cut" or not did.name
    return everything or (did.name != name and name.startswith(f"{did.name}/"))


class _Name:
    """All that was done about one name."""

    def __init__(self, about: list[Did], name: str) -> None:
        self.puts = [
            did for did in about if did.op in PUTS and (did.op, did.name) != ("export", name)
        ]
        self.created = all(did.op == "create" for did in self.puts)
        self.winners = [did for did in self.puts if did.outcome in {"won", "done"}]
        self.reads = [did for did in about if did.op == "read" and did.outcome == "here"]
        listed = [did for did in about if did.op == "names" and did.outcome == "here"]
        self.seen = [did for did in about if did.op in SEES and did.outcome in {"here", "lost"}]
        self.seen += [did for did in listed if name in did.seen]
        self.missing = [
            did for did in about if did.op in SEES and did.outcome in {"missing", "won"}
        ]
        self.missing += [did for did in listed if name not in did.seen]
        self.removes = [did for did in about if did.op == "remove"]
        self.removes += [did for did in about if did.op == "cut" and self._may_take(did)]

    def _may_take(self, cut: Did) -> bool:
        """Nobody had put it there to the end."""
        return not any(put.before(cut) for put in self.winners)

    def removed(self, after: Did, until: Did) -> bool:
        """Whether somebody may have removed it in between."""
        return any(r.begin < until.end and r.end > after.begin for r in self.removes)


def _of_name(name: str, of: _Name) -> Iterator[str]:
    yield from _winners(name, of)
    yield from _bytes(name, of)
    for did in of.seen:
        if not any(put.begin < did.end for put in of.puts):
            yield f"{name}: seen before anybody began to put it there: {did}"
    for did in of.missing:
        there = (known for known in (*of.winners, *of.seen) if known.before(did))
        for known in there:
            if not of.removed(known, did):
                yield f"{name}: missing after it was there: {known}, then {did}"
                break


def _winners(name: str, of: _Name) -> Iterator[str]:
    won = sorted((did for did in of.winners if did.op == "create"), key=lambda did: did.end)
    for first, second in itertools.pairwise(won):
        if not of.removed(first, second):
            yield f"{name}: two created it: {first}, and {second}"


def _bytes(name: str, of: _Name) -> Iterator[str]:
    known = [put for put in of.puts if put.digest]
    for read in of.reads if known else ():
        given = [put for put in known if put.digest == read.digest and put.begin < read.end]
        if not given:
            yield f"{name}: bytes that nobody put there: {read}"
        elif of.created:
            for won in of.winners:
                other = won.digest != read.digest and won.before(read)
                if other and not of.removed(won, read):
                    yield f"{name}: not the winner's bytes: {won}, but {read}"
        elif all(_replaced(put, known, read) for put in given):
            yield f"{name}: bytes that had been replaced: {read}"
    if of.created:
        for first, second in itertools.pairwise(of.reads):
            if first.digest != second.digest and not of.removed(first, second):
                yield f"{name}: two readers, two contents: {first}, and {second}"


def _replaced(put: Did, puts: list[Did], read: Did) -> bool:
    later = (other for other in puts if other.outcome in {"won", "done"} and other.before(read))
    return any(put.before(other) for other in later)


def _of_leases(history: list[Did]) -> Iterator[str]:
    """One writer a training: see 5."""
    held: dict[str, list[Did]] = defaultdict(list)
    for did in history:
        if did.op == "acquire" and did.outcome == "done":
            held[did.name].append(did)
    for stage, holders in held.items():
        for did in history:
            if did.op == "check" and did.name == stage and did.outcome == "done":
                late = _followed(holders, did.epoch, did)
                if late is not None:
                    yield f"{stage}: may commit though {late.who} holds the lease: {did}"
        yield from _unasked(stage, holders, history)


def _followed(holders: list[Did], epoch: int, did: Did) -> Did | None:
    """Who held the lease after this epoch when something began."""
    return next((h for h in holders if h.epoch > epoch and h.before(did)), None)


def _unasked(stage: str, holders: list[Did], history: list[Did]) -> Iterator[str]:
    """What was committed or exported late, without asking before the later driver came."""
    for did in history:
        if not _commits(did, stage):
            continue
        mine = [h for h in holders if h.who == did.who and h.before(did)]
        if not mine:
            yield f"{stage}: committed without the lease: {did}"
            continue
        asked = [
            check
            for check in history
            if check.op == "check" and check.who == did.who and check.name == stage
            if check.outcome == "done" and check.before(did)
        ]
        late = _followed(holders, mine[-1].epoch, did)
        if not asked:
            yield f"{stage}: committed without asking: {did}"
        elif late is not None and late.before(asked[-1]):
            yield f"{stage}: committed by one whom {late.who} had followed: {did}"


def _commits(did: Did, stage: str) -> bool:
    below = did.name.removeprefix(f"{stage}/")
    if below == did.name or did.outcome not in {"won", "done"}:
        return False
    commit = did.op == "create" and below.endswith("/commit.json")
    return commit or (did.op == "export" and below in {"model", "adapter"})
