"""Bytes in, a file on a disk or NFS out: it is there whole or not at all, also after a power cut.

What is being written, a file or a whole folder, has a name that begins with a dot and ends in
`.partial`: pandas, pyarrow's data sets, `datasets` and Spark pass over it. Its name says who
writes, so that what a killed writer left is known as that, and removed.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cwpo_dist.processes import Process, started

logger = logging.getLogger(__name__)

# A writer on another host whose file has not grown for so long counts as dead. Should it live, its
# write fails with a word, and the same command does it again.
QUIET_S = 3600.0

_OURS = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-(-?\d+)-[0-9a-f]{8}\.partial")
_settled: set[tuple[str, int]] = set()  # folders by path and inode whose names are on the disk
_OF_EARLIER_VERSIONS = re.compile(r".+\.[0-9a-f]{32}\.partial")  # seen by readers, so gone at once


def is_partial(path: str) -> bool:
    """True for a file that is, or was, being written, or lies in a folder that is.

    Args:
        path: below the folder that is asked about.
    """
    return any(part.endswith(".partial") for part in path.split("/"))


def create(path: str, data: bytes) -> bool:
    """Puts a file there if there is none; False where there is one.

    A hard link is made once or not at all, on a local disk and on NFS.
    """
    if os.path.exists(path):
        return False
    with _partial(path) as partial:
        _write(partial, data)
        try:
            os.link(partial, path)
        except FileExistsError:
            # Where NFS lost the reply and asked again, the name that is there is ours.
            if os.stat(partial).st_nlink == 1:
                return False
    synced(os.path.dirname(path))
    return True


def replace(path: str, data: bytes) -> None:
    """Puts a file there, in place of what there may be."""
    with _partial(path) as partial:
        _write(partial, data)
        os.replace(partial, path)
    synced(os.path.dirname(path))


def copy(source: str | Path, path: str) -> None:
    """Like `replace`, with the bytes of another file."""
    with _partial(path) as partial:
        shutil.copyfile(source, partial)
        synced(partial)
        os.replace(partial, path)
    synced(os.path.dirname(path))


@contextmanager
def whole_folder(folder: str, fence: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A new folder for others' code to write in, which then gets its name in one step.

    Where one like it has the name, the first stays: two that do the same work write the same, and
    the second may be one that was stopped, and followed, long ago.

    Args:
        folder: its name.
        fence: asked before another's folder that is not like it, as half a copy, is replaced;
            raises where that must stay.
    """
    with _partial(folder) as partial:
        os.mkdir(partial)
        yield Path(partial)
        sync_files(partial)
        while not _renamed(partial, folder) and _sizes(partial) != _sizes(folder):
            fence()
            with _partial(folder) as torn, suppress(FileNotFoundError):
                os.replace(folder, torn)
    synced(os.path.dirname(folder))


def discard(folder: str) -> None:
    """Removes a folder: its name goes in one step, so that nobody finds half of what it held."""
    with _partial(folder) as gone:
        os.replace(folder, gone)


def _renamed(folder: str, name: str) -> bool:
    """Whether a folder got the name; not where a folder with files has it."""
    try:
        os.replace(folder, name)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _sizes(folder: str) -> dict[str, int]:
    return {os.path.relpath(path, folder): os.path.getsize(path) for path in below(folder)}


def settle(folder: str) -> None:
    """Returns when all names below a folder are on the disk, and its own: whoever put them there.

    Who was killed right after it made a name had not come to see to that, and who found the name
    there took it for done.
    """
    for parent, _, _ in os.walk(folder):
        synced(parent)
    for above in Path(folder).absolute().parents:
        with suppress(OSError):  # not ours to read, or not on a disk: then it was there before us
            synced(above)


def sync_files(folder: str | Path) -> None:
    """Returns when what others' code wrote below a folder is on the disk, bytes and names."""
    for parent, _, names in os.walk(folder):
        for name in names:
            synced(os.path.join(parent, name))
        synced(parent)


def below(folder: str) -> list[str]:
    """The paths of all files below a folder.

    Raises:
        OSError: where a folder refuses to be listed; fsspec by itself passes over it.
    """
    walk = os.walk(folder, onerror=_raise_unless_gone)
    return [os.path.join(parent, name) for parent, _, names in walk for name in names]


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):  # others may remove meanwhile
        raise error


def sweep(folder: str) -> None:
    """Removes what dead writers left half-written below a folder; of living ones nothing."""
    for parent, folders, names in os.walk(folder):
        for name in filter(is_partial, (*folders, *names)):
            path = os.path.join(parent, name)
            try:
                if _is_left_over(path):
                    _remove(path)
            except FileNotFoundError:  # its writer, or another sweep, was faster
                continue
            except OSError as error:  # in another's folder, say: no reason to end a run
                logger.warning("%s was left half-written and cannot be removed: %s", path, error)


def _is_left_over(path: str) -> bool:
    name = os.path.basename(path)
    if (ours := _OURS.fullmatch(name)) is None:
        return _OF_EARLIER_VERSIONS.fullmatch(name) is not None
    machine, pid, since = ours.groups()
    if machine == Process.current().machine:
        return started(int(pid)) != int(since)
    return _age_s(path) > QUIET_S


def _age_s(path: str) -> float:
    """Seconds since it grew, by the clock of the disk that it lies on, which stamps both."""
    with _partial(path) as probe:
        Path(probe).touch()
        latest = max(os.stat(each).st_mtime for each in (path, *below(path)))
        return os.stat(probe).st_mtime - latest


@contextmanager
def _partial(final: str) -> Iterator[str]:
    """A name beside `final`, on the same disk, that is gone at the end, whatever happens."""
    folder, name = os.path.split(final)
    make_folder(Path(folder))
    writer = Process.current()
    by = f"{writer.machine}-{writer.pid}-{writer.started}-{uuid.uuid4().hex[:8]}"
    partial = os.path.join(folder, f".{name}.{by}.partial")
    try:
        yield partial
    finally:
        _remove(partial)


def _remove(path: str) -> None:
    """Removes a file, or a folder and all in it; nothing happens where there is none."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


def _write(path: str, data: bytes) -> None:
    """Writes, and returns when it is on the disk, and not only in memory.

    A name that were there before what it names would be an empty file after a power cut, for ever.
    """
    Path(path).write_bytes(data)
    synced(path)


def synced(path: str | Path) -> None:
    """Returns when a file's bytes, or the names in a folder, are on the disk itself."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def make_folder(folder: Path) -> None:
    """A folder that is there after a power cut, with those above it."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
    _settle_name(folder)


def _settle_name(folder: Path) -> None:
    """Returns when a folder's name is on the disk, once a process.

    Who made it may have been killed before, and what others then put there would go with it. Those
    above it have theirs: whoever made or used a folder in them saw to that first.
    """
    named = str(folder), folder.stat().st_ino
    if named not in _settled:
        with suppress(PermissionError):  # not ours: then it was there long before us
            synced(folder.parent)
        _settled.add(named)
