"""A folder on any filesystem: read, list, and put-if-absent, the one primitive commits need.

Everything a run writes goes through `Store`, so a local path, NFS, `s3://` and `gs://` behave
alike. A file either exists whole or not at all, and of two writers of one name exactly one wins.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from cwpo_dist.redaction import has_credential, redacted

MANIFEST = "manifest.json"
# A smaller file comes whole in one request: footer and columns apart would be three, one by one.
ONE_REQUEST_BYTES = 4 * 2**20


class StorageError(OSError):
    """Storage refused a read or write; the message names the place and the remedy.

    What a service says may repeat a signed URL: it is told, and kept, without.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


@dataclass(frozen=True)
class Store:
    """A folder given by path or URI; cheap to make and to pickle.

    Attributes:
        uri: a local path or any URI that fsspec knows; credentials come from the environment.
    """

    uri: str

    @cached_property
    def _place(self) -> tuple[Any, str]:
        if has_credential(self.uri):
            raise StorageError(
                f"{self.uri}: a credential stands in it; give it by the environment "
                "(AWS_PROFILE, AWS_ACCESS_KEY_ID with its key, or fsspec's FSSPEC_… variables)"
            )
        try:
            filesystem, root = fsspec.url_to_fs(self.uri)
        except (ImportError, ValueError) as error:  # s3 and gs come with extras of the same names
            raise StorageError(
                f"{self.uri}: {error}. Use a path or a URI of a known kind; s3:// wants the extra "
                "[s3], gs:// the extra [gcs]"
            ) from error
        return filesystem, root.rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri}

    @property
    def filesystem(self) -> Any:
        """The fsspec filesystem."""
        return self._place[0]

    @property
    def root(self) -> str:
        """The folder as its filesystem spells it."""
        return self._place[1]

    @property
    def is_local(self) -> bool:
        """True where the folder is a plain path (which may still be NFS)."""
        return isinstance(self.filesystem, LocalFileSystem)

    def child(self, *parts: str) -> Store:
        """A folder below this one."""
        return Store("/".join([self.uri.rstrip("/"), *parts]))

    def path(self, name: str) -> str:
        """The full path of `name`, as the filesystem spells it."""
        return f"{self.root}/{name}"

    def check(self) -> None:
        """Returns when this folder, which need not exist, can be asked for.

        Raises:
            StorageError: where no folder can be made, or the service does not answer or know us.
        """
        if self.is_local:
            there = Path(self.root)
            while not there.exists():
                there = there.parent
            if not (there.is_dir() and os.access(there, os.W_OK)):
                raise StorageError(f"{self.uri}: nothing can be written in {there}; name another")
            return
        try:
            self.filesystem.exists(self.root)
        except Exception as error:  # each service raises kinds of its own; raised again as ours
            raise StorageError(
                f"{self.uri}: {type(error).__name__}: {error}. Check its name, your credentials "
                "(environment variables) and the network"
            ) from error

    def exists(self, name: str) -> bool:
        """True when the file `name` is there, whole."""
        self.filesystem.invalidate_cache()
        return bool(self.filesystem.isfile(self.path(name)))

    def names(self, below: str = "") -> list[str]:
        """All file names below a sub-folder, relative to this folder, sorted."""
        self.filesystem.invalidate_cache()
        found = self.filesystem.find(self.path(below) if below else self.root)
        return sorted(
            str(path)[len(self.root) + 1 :] for path in found if not _is_partial(str(path))
        )

    def read(self, name: str) -> bytes:
        """The content of `name`; FileNotFoundError where there is none."""
        return bytes(self.filesystem.cat_file(self.path(name)))

    def create(self, name: str, data: bytes) -> bool:
        """Writes `name` unless it exists, in one step.

        Returns:
            True when this call created the file, False when another had.

        Raises:
            StorageError: when storage refuses the write (full, forbidden).
        """
        try:
            if self.is_local:
                return self._link(name, data)
            return self._put(name, data)
        except OSError as error:
            raise self._refused(name, error) from error

    def write(self, name: str, data: bytes) -> None:
        """Writes or replaces `name`, in one step."""
        try:
            if self.is_local:
                self._replace(self._partial(name, data), name)
            else:
                self.filesystem.pipe_file(self.path(name), data)
        except OSError as error:
            raise self._refused(name, error) from error

    def remove(self, name: str = "") -> None:
        """Removes a file or a whole sub-folder; nothing happens where there is none."""
        path = self.path(name) if name else self.root
        self.filesystem.invalidate_cache()
        if self.filesystem.exists(path):
            self.filesystem.rm(path, recursive=True)

    def read_json(self, name: str) -> Any:
        """The parsed content of a JSON file.

        Raises:
            FileNotFoundError: where there is none.
            StorageError: for a file that is empty or torn.
        """
        data = self.read(name)
        try:
            return json.loads(data)
        except ValueError as error:  # of other bytes than UTF-8, too
            raise StorageError(
                f"{self.path(name)!r} is {'torn' if data else 'empty'}, as after a power cut or a "
                "broken copy; remove it, then run the same command again: what it stood for is "
                f"made anew ({error})"
            ) from error

    def create_json(self, name: str, value: Any) -> bool:
        """Like `create`, for a JSON value."""
        return self.create(name, to_json(value))

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file as a table; of a large one only the columns asked for are fetched."""
        if columns is None:
            return pq.read_table(pa.BufferReader(self.read(name)))
        self.filesystem.invalidate_cache()  # another one may have written it since we listed
        # Arrow plans its own ranges; fsspec's read-ahead would fetch what lies between them.
        with self.filesystem.open(self.path(name), "rb", cache_type="none") as file:
            small = file.size <= ONE_REQUEST_BYTES
            return pq.read_table(pa.BufferReader(file.read()) if small else file, columns=columns)

    def create_table(self, name: str, table: pa.Table) -> bool:
        """Like `create`, for a table as Parquet; the same table gives the same bytes."""
        return self.create(name, parquet_bytes(table))

    def upload(self, folder: Path) -> None:
        """Copies every file of a local folder into this one."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.copy_in(path, path.relative_to(folder).as_posix())

    def copy_in(self, path: Path, name: str) -> None:
        """Copies one local file to `name`, replacing it in one step."""
        try:
            if self.is_local:
                partial = self._partial(name, None)
                try:
                    shutil.copyfile(path, partial)
                    _synced(partial)
                except OSError:
                    Path(partial).unlink(missing_ok=True)
                    raise
                self._replace(partial, name)
            else:
                self.filesystem.put_file(str(path), self.path(name))
        except OSError as error:
            raise self._refused(name, error) from error

    def fetch(self, name: str, path: Path) -> None:
        """Copies `name` to a local path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.filesystem.get_file(self.path(name), str(path))

    def staged(self) -> Path:
        """This folder as a local one, downloaded once a node, and version, when it is remote."""
        if self.is_local:
            return Path(self.root)
        cache = Path(tempfile.gettempdir()) / f"cwpo-stage-{os.getuid()}"
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        target = cache / digest([self.uri, fingerprint(self.uri)])
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one copies, others wait; a kill frees it
            if not target.exists():
                self._download(target)
        return target

    def _download(self, target: Path) -> None:
        """Copies all files; the folder gets its name when it is whole."""
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # of one who was killed half-way
        for name in self.names():
            self.fetch(name, partial / name)
        partial.rename(target)

    def _partial(self, name: str, data: bytes | None) -> str:
        """A finished temporary file beside `name`, on the same disk.

        It is on the disk, and not only in memory: a name that were there before what it names would
        be an empty file after a power cut, for ever.
        """
        final = self.path(name)
        _made(Path(final).parent)
        partial = f"{final}.{uuid.uuid4().hex}.partial"
        if data is not None:
            try:
                Path(partial).write_bytes(data)
                _synced(partial)
            except OSError:
                Path(partial).unlink(missing_ok=True)
                raise
        return partial

    def _link(self, name: str, data: bytes) -> bool:
        """Put-if-absent on a local disk or NFS: a hard link is made once or not at all."""
        if os.path.exists(self.path(name)):
            return False
        partial = self._partial(name, data)
        try:
            os.link(partial, self.path(name))
        except FileExistsError:
            return False
        finally:
            os.unlink(partial)
        _synced(os.path.dirname(partial))
        return True

    def _replace(self, partial: str, name: str) -> None:
        os.replace(partial, self.path(name))
        _synced(os.path.dirname(partial))

    def _put(self, name: str, data: bytes) -> bool:
        """Put-if-absent on object storage: a conditional write."""
        try:
            self.filesystem.pipe_file(self.path(name), data, mode="create")
            return True
        except FileExistsError:
            return False

    def _refused(self, name: str, error: OSError) -> StorageError:
        return StorageError(
            f"storage refused to write {self.path(name)!r}: {error}. What was committed stays "
            "readable; free space or fix permissions, then run the same command again"
        )


def _synced(path: str | Path) -> None:
    """Returns when a file's bytes, or the names in a folder, are on the disk itself."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _made(folder: Path) -> None:
    """A folder that is there after a power cut, with those above it."""
    if folder.is_dir():
        return
    _made(folder.parent)
    folder.mkdir(exist_ok=True)
    _synced(folder.parent)


def _is_partial(path: str) -> bool:
    return path.endswith(".partial")


def is_full(error: BaseException) -> bool:
    """True when what failed is that a disk, or a quota, is full, at the root of the error."""
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return True
    # safetensors says so in words.
    of_rust = "os error 28" in str(error) or "os error 122" in str(error)
    return of_rust or (error.__cause__ is not None and is_full(error.__cause__))


def to_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, so that equal values have equal bytes."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def digest(value: Any) -> str:
    """A short content key: 16 hex digits of the SHA-256 of canonical JSON."""
    return hashlib.sha256(to_json(value)).hexdigest()[:16]


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as Parquet bytes, deterministic for one version of pyarrow.

    Without rows it has no row group either: `datasets` takes the first one's rows as its batch
    size, and refuses 0.
    """
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema, compression="zstd") as writer:
        if table.num_rows:
            writer.write_table(table)
    return buffer.getvalue()


def fingerprint(uri: str) -> list[list[Any]]:
    """What identifies a file or folder without reading it: [name, size, etag or mtime] a file.

    Raises:
        FileNotFoundError: where there is none.
    """
    filesystem, root = fsspec.url_to_fs(uri)
    found = filesystem.find(root)
    if not found:
        raise FileNotFoundError(f"no file at {uri!r}")
    return [mark(path, filesystem.info(path)) for path in sorted(found)]


def mark(path: str, info: Mapping[str, Any]) -> list[Any]:
    """[name, size, etag or mtime] of one file, from what its filesystem says of it."""
    stamp = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("mtime")
    return [str(path), info.get("size"), str(stamp)]
