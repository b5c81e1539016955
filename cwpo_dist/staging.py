"""Folders between a store and this node's disk, as libraries read and write by path alone."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

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
    cache = Path(tempfile.gettempdir()) / f"cwpo-stage-{os.getuid()}"
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    with store.reading():
        target = cache / digest([store.uri, fingerprint(store.uri)])
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one copies, others wait; a kill frees it
        if not target.exists():
            _download(store, target)
    return target


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
