"""Folders on this node's disk that its processes share: copies of stores, and data to be mapped."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from cwpo_dist import local_files
from cwpo_dist.canonical import digest
from cwpo_dist.file_marks import fingerprint
from cwpo_dist.local_files import is_partial
from cwpo_dist.storage import Store


def staged(store: Store) -> Path:
    """A store's folder itself where it is local, else a copy of its present version on this node.

    Processes of a node share it: one downloads, the others wait for it.
    """
    if store.is_local:
        return Path(store.root)
    with store.reading():
        target = _cache() / digest([store.uri, fingerprint(store.uri)])
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one copies, others wait; a kill frees it
        if not target.exists():
            _download(store, target)
    return target


def shared_data(name: str, make: Callable[[Path], None]) -> tuple[Path, IO[str]]:
    """A folder of data that one process of this node makes, and all read.

    What nobody reads is removed before others are made: a disk holds the data of the trainings that
    run on it, and those of the last.

    Args:
        name: of its content; the same name gives the same folder.
        make: writes into the folder that it is given.

    Returns:
        The folder, and a file: while that is open the folder stays.
    """
    target = _cache("data") / name
    with ExitStack() as opened:
        lock = opened.enter_context(target.with_suffix(".lock").open("w"))
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if target.exists():
                opened.pop_all()
                return target, lock
            fcntl.flock(lock, fcntl.LOCK_EX)  # one makes, others wait; a kill frees it
            if not target.exists():
                _remove_unread(target)
                with local_files.whole_folder(str(target)) as folder:
                    make(folder)


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
    """Under TMPDIR, this user's alone."""
    cache = Path(tempfile.gettempdir()) / f"cwpo-stage-{os.getuid()}"
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    (cache / below).mkdir(exist_ok=True)
    return cache / below


def upload(folder: Path, store: Store) -> None:
    """Copies every file of a local folder into a store's, but for half-written ones."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not is_partial(name):
            store.copy_in(path, name)


def _download(store: Store, target: Path) -> None:
    """Copies all files; the folder gets its name when it is whole."""
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of one who was killed half-way
    for name in store.names():
        store.fetch(name, partial / name)
    partial.rename(target)
