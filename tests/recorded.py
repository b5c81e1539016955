"""A process's storage operations in, a line for each beginning and end out; and a place to strike.

`Steps` is called at each step of an operation, down to the system's own calls: between any two of
them a driver can be killed, stopped or refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from cwpo_dist.storage import FileMissing, Store
from cwpo_dist.training import saving, shards
from cwpo_dist.training.lease import Lease, LeaseToken

Act = Callable[[str], None]  # is told the kind of step: what it raises, the step raises


class Log:
    """Lines of one process in a file that many append to: each is one write to the system."""

    def __init__(self, path: Path, who: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._who, self._next, self._lock = who, 0, threading.Lock()

    def line(self, **given: Any) -> None:
        line = {"who": self._who, "at": time.monotonic(), **given}
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def began(self, **what: Any) -> int:
        with self._lock:
            self._next += 1
            number = self._next
        self.line(began=number, what=what)
        return number

    def ended(self, number: int, **how: Any) -> None:
        self.line(ended=number, how=how)


class Steps:
    """Counts the steps of this process's main thread and of the one that writes checkpoints."""

    def __init__(self, act: Act, log: Log) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, int] = {}  # the main thread's step at which each stage began
        self.where = ""  # the stage
        self._act, self._log = act, log

    def __call__(self, kind: str) -> None:
        self.counts[threading.current_thread().name] += 1
        self._act(kind)

    def at(self, stage: str) -> None:
        """From here on it is about this stage."""
        self.where = stage
        self.first.setdefault(stage, self.counts["MainThread"])

    def watch_the_system(self, root: str) -> None:
        """Each call by which bytes and names below `root` reach a disk is a step, and its end."""
        for owner, name, kind in (
            (os, "link", "write"),
            (os, "replace", "write"),
            (os, "unlink", "remove"),
            (os, "mkdir", "write"),
            (Path, "write_bytes", "write"),
            (shards, "save_file", "write"),
            (saving, "save_file", "write"),
            (LocalFileSystem, "cat_file", "read"),
            (LocalFileSystem, "info", "read"),
            (LocalFileSystem, "_open", "read"),
        ):
            setattr(owner, name, self._around(getattr(owner, name), kind, root))
        os.fsync = self._around_sync(synced(self._log, os.fsync))

    def _around_sync(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def stepped(opened: int) -> None:
            self("sync")
            call(opened)
            self("end")

        return stepped

    def _around(self, call: Callable[..., Any], kind: str, root: str) -> Callable[..., Any]:
        def stepped(*given: Any, **named: Any) -> Any:
            paths = (os.fspath(each) for each in given if isinstance(each, str | os.PathLike))
            if not any(path.startswith(root) for path in paths):
                return call(*given, **named)
            self(kind)
            result = call(*given, **named)
            self("end")
            return result

        return stepped


# How safetensors calls a file that it is still writing: it gets its name, which is logged, later.
_UNDER_WAY = re.compile(r"/\.tmp\w{6}$")


def synced(log: Log, fsync: Callable[[int], None]) -> Callable[[int], None]:
    """`os.fsync`, and a line for what it brought to the disk."""

    def noted(opened: int) -> None:
        path = os.readlink(f"/proc/self/fd/{opened}")
        # Before the call: a name that comes meanwhile may be too late.
        names = {e.name: e.inode() for e in os.scandir(path)} if os.path.isdir(path) else {}
        before = os.fstat(opened)
        fsync(opened)
        mark = [before.st_ino, before.st_size, before.st_mtime_ns]
        log.line(path=path, mark=mark, names=names)

    return noted


def record(log: Log, steps: Steps, root: str) -> None:
    """From now on all operations of this process below `root` are logged, and are steps."""
    start = len(Store(root).uri.rstrip("/")) + 1

    def place(store: Store, name: str) -> str:
        return f"{store.uri.rstrip('/')}/{name}"[start:].rstrip("/")

    @contextmanager
    def noted(op: str, store: Store, name: str, **what: Any) -> Iterator[dict[str, Any]]:
        if threading.current_thread() is threading.main_thread():
            steps.at(place(store, name).split("/")[0])
        number, how = log.began(op=op, name=place(store, name), **what), {"outcome": "done"}
        steps("begin")
        try:
            yield how
        except FileMissing:
            log.ended(number, outcome="missing")
            raise
        except Exception:  # whatever it was, the operation is over
            log.ended(number, outcome="failed")
            raise
        log.ended(number, **how)
        steps("end")

    _record_store(noted, place)
    _record_training(noted)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _record_store(noted: Any, place: Callable[[Store, str], str]) -> None:
    create, write, read = Store.create, Store.write, Store.read
    exists, names, remove = Store.exists, Store.names, Store.remove
    opened, copy_in = Store.opened, Store.copy_in

    def created(self: Store, name: str, data: bytes) -> bool:
        with noted("create", self, name, digest=_digest(data)) as how:
            won = create(self, name, data)
            how["outcome"] = "won" if won else "lost"
        return won

    def written(self: Store, name: str, data: bytes) -> None:
        with noted("write", self, name, digest=_digest(data)):
            write(self, name, data)

    def was_read(self: Store, name: str) -> bytes:
        with noted("read", self, name) as how:
            data = read(self, name)
            how |= {"outcome": "here", "digest": _digest(data)}
        return data

    def there(self: Store, name: str) -> bool:
        with noted("exists", self, name) as how:
            found = exists(self, name)
            how["outcome"] = "here" if found else "missing"
        return found

    def listed(self: Store, below: str = "") -> list[str]:
        with noted("names", self, below) as how:
            found = [name for name in names(self, below) if not _UNDER_WAY.search(name)]
            how |= {"outcome": "here", "seen": [place(self, name) for name in found]}
        return found

    def removed(self: Store, name: str = "") -> None:
        with noted("remove", self, name):
            remove(self, name)

    @contextmanager
    def was_opened(self: Store, name: str, **given: Any) -> Iterator[Any]:
        with ExitStack() as stack:  # which hands it what goes wrong while the file is read
            with noted("exists", self, name) as how:
                file = stack.enter_context(opened(self, name, **given))
                how["outcome"] = "here"
            yield file

    def copied(self: Store, path: Path, name: str) -> None:
        with noted("write", self, name, digest=_digest(path.read_bytes())):
            copy_in(self, path, name)

    made: dict[str, Any] = {"create": created, "write": written, "read": was_read}
    made |= {"exists": there, "names": listed, "remove": removed}
    for name, function in (made | {"opened": was_opened, "copy_in": copied}).items():
        setattr(Store, name, function)


def _record_training(noted: Any) -> None:
    acquire, check = Lease.acquire.__func__, LeaseToken.check  # type: ignore[attr-defined]  # a method's
    written, shard, create_from = saving._written, shards.Shard.write, Store.create_from

    def acquired(cls: type[Lease], store: Store, **given: Any) -> Lease:
        with noted("acquire", store, "") as how:
            lease: Lease = acquire(cls, store, **given)
            how["epoch"] = lease.token.epoch
        return lease

    def checked(self: LeaseToken) -> None:
        with noted("check", self.store, "", epoch=self.epoch):
            check(self)

    @contextmanager
    def exported(store: Store, fence: saving.Fence) -> Iterator[Path]:
        with noted("export", store, ""), written(store, fence) as folder:
            yield folder

    def put(self: shards.Shard, folder: Store, name: str) -> None:
        with noted("write", folder, name) as how:
            shard(self, folder, name)
            how["outcome"] = "put"  # what promises that it stays is its checkpoint's commit

    def created_from(self: Store, path: Path, name: str) -> bool:
        with noted("create", self, name, digest=_digest(path.read_bytes())) as how:
            won = create_from(self, path, name)
            how["outcome"] = "won" if won else "lost"
        return won

    changes: list[tuple[Any, str, Any]] = [
        (Lease, "acquire", classmethod(acquired)),
        (LeaseToken, "check", checked),
        (saving, "_written", exported),
        (shards.Shard, "write", put),
        (Store, "create_from", created_from),
    ]
    for owner, name, value in changes:
        setattr(owner, name, value)
