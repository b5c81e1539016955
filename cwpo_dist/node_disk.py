"""Folders on this node's disk that its processes share: copies of stores, and data to be mapped."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

from cwpo_dist import local_files
from cwpo_dist.canonical import digest
from cwpo_dist.file_marks import fingerprint
from cwpo_dist.local_files import is_partial
from cwpo_dist.storage import StorageError, Store

STILL_S = 600.0  # longer than a shard takes to be tokenised or a large file's first bytes to come
POLL_S = 0.1


def staged(store: Store) -> Path:
    """A store's folder itself where it is local, else a copy of its present version on this node.

    Processes of a node share it: one downloads, the others wait for it.

    Raises:
        StorageError: also where it changes meanwhile, for all would take a part of each version.
    """
    if store.is_local:
        return Path(store.root)
    with store.reading():
        present = fingerprint(store.uri)
    target = _cache() / digest([store.uri, present])
    with target.with_suffix(".lock").open("w") as lock:
        _locked(lock, target)
        if not target.exists():
            with local_files.whole_folder(str(target)) as folder:
                for name in store.names():
                    store.fetch(name, folder / name)
                with store.reading():
                    changed = fingerprint(store.uri) != present
                if changed:
                    raise StorageError(
                        f"{store.uri!r} changed while it was copied to this node; run the same "
                        "command again when nobody writes there"
                    )
    return target


def shared_data(name: str, make: Callable[[Path], None]) -> tuple[Path, IO[str]]:
    """A folder of data that one process of this node makes, and all read.

    What nobody reads is removed before others are made: a disk holds the data of the trainings that
    run on it, and those of the last.

    Args:
        name: of its content; the same name gives the same folder.
        make: writes into the folder that it is given.

    Returns:
        The folder, and a file: while that is open the folder stays, as what was mapped of it does
        in any case.
    """
    target = _cache("data") / name
    with ExitStack() as opened:
        lock = opened.enter_context(target.with_suffix(".lock").open("w"))
        while True:
            held = _locked(lock, target)
            if target.exists() and held != fcntl.LOCK_EX:
                opened.pop_all()
                return target, lock
            if target.exists() or held == fcntl.LOCK_SH:
                continue  # made meanwhile, to be read by all; or removed, to be made anew
            if held == fcntl.LOCK_EX:
                _remove_unread(target)
            with local_files.whole_folder(str(target)) as folder:
                make(folder)


def _locked(lock: IO[str], target: Path) -> int | None:
    """The lock that is ours: of one that makes the target, or of all that read it.

    One makes it, others wait, and a kill frees them. A maker that was stopped, or whose disk hangs,
    does not: where nothing has grown for STILL_S there is no lock (None), and the target is made
    once more beside it. Who ends first gives it its name.
    """
    fcntl.flock(lock, fcntl.LOCK_UN)  # two that wait must not hold each other up
    seen, since = -1, time.monotonic()
    while True:
        kind = fcntl.LOCK_SH if target.exists() else fcntl.LOCK_EX
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            size = _bytes_below(target.parent)
            if size != seen:
                seen, since = size, time.monotonic()
            elif time.monotonic() - since > STILL_S:
                return None
            time.sleep(POLL_S)
        else:
            return kind


def _bytes_below(folder: Path) -> int:
    found = 0
    for path in local_files.below(str(folder)):
        with suppress(FileNotFoundError):  # others end, or tidy up, meanwhile
            found += os.path.getsize(path)
    return found


def _remove_unread(target: Path) -> None:
    """Removes what lies beside a folder that is to be made, but for what others read or make."""
    local_files.sweep(str(target.parent))
    for path in set(target.parent.glob("*.lock")) - {target.with_suffix(".lock")}:
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if path.with_suffix("").exists():
                local_files.discard(str(path.with_suffix("")))


def _cache(below: str = "") -> Path:
    """Under TMPDIR, this user's alone.

    Raises:
        StorageError: where others can write in it, as anybody may have made it: they could put
            another model in the place of one.
    """
    cache = Path(tempfile.gettempdir()) / f"cwpo-stage-{os.getuid()}"
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = cache.stat()
    if {found.st_uid, cache.lstat().st_uid} != {os.getuid()} or found.st_mode & 0o022:
        raise StorageError(
            f"{str(cache)!r}: others can write in this folder of copies; remove it, or let TMPDIR "
            "name a folder of your own, then run the same command again"
        )
    (cache / below).mkdir(exist_ok=True)
    return cache / below


def upload(folder: Path, store: Store) -> None:
    """Copies every file of a local folder into a store's, but for half-written ones."""
    for path, name in whole_files(folder):
        store.copy_in(path, name)


def whole_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file of a local folder, but for half-written ones, with its name there."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not is_partial(name):
            yield path, name
