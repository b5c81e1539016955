"""A folder on any filesystem: read, list, and put-if-absent, the one primitive commits need.

Everything a run writes goes through `Store`, so a local path, NFS, `s3://` and `gs://` behave
alike. A file either exists whole or not at all, and of two writers of one name exactly one wins.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from cwpo_dist import local_files
from cwpo_dist.canonical import parquet_bytes, to_json
from cwpo_dist.redaction import has_credential, redacted
from cwpo_dist.storage_faults import MISSING, damaged, fault_of, told, unanswered, unread, unwritten

MANIFEST = "manifest.json"
# A smaller file comes whole in one request: footer and columns apart would be three, one by one.
ONE_REQUEST_BYTES = 4 * 2**20
_REMOVALS = 100  # tries, where others remove or write in the same folder
# Of fsspec's kinds: what each process has for itself, and what can only be read.
_NOT_KEPT = {"memory", "data", "http", "https", "zip", "tar", "github", "git", "reference"}


class StorageError(OSError):
    """Storage refused a read or write; the message names the place and the remedy.

    What a service says may repeat a signed URL: it is told, and kept, without.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class FileMissing(StorageError, FileNotFoundError):
    """A file that was to be read, or a folder that was being written in, is not there."""


@dataclass(frozen=True)
class Store:
    """A folder given by path or URI; cheap to make and to pickle.

    Attributes:
        uri: a local path or any URI that fsspec knows; credentials come from the environment.
    """

    uri: str

    @cached_property
    def _place(self) -> tuple[AbstractFileSystem, str]:
        if has_credential(str(self.uri)):
            raise StorageError(
                f"{self.uri}: a credential stands in it; give it by the environment "
                "(AWS_PROFILE, AWS_ACCESS_KEY_ID with its key, or fsspec's FSSPEC_… variables)"
            )
        try:
            filesystem, root = fsspec.url_to_fs(self.uri)
        except Exception as error:  # some read or ask as they are made; s3 and gs come with extras
            raise StorageError(
                f"{self.uri}: {told(error)}. Use a path or a URI of a known kind; s3:// wants the "
                "extra [s3], gs:// the extra [gcs]"
            ) from error
        return filesystem, root.rstrip("/")

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri}

    @property
    def filesystem(self) -> AbstractFileSystem:
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
        if fsspec.core.split_protocol(self.uri)[0] in _NOT_KEPT or "::" in self.uri:
            raise StorageError(
                f"{self.uri}: nothing can be kept there; give a path, or the URI of a service "
                "that can be written to (s3://, gs://)"
            )
        if self.is_local:
            there = Path(self.root)
            with self._writing(""):
                while not there.exists():
                    there = there.parent
            if not (there.is_dir() and os.access(there, os.W_OK)):
                raise StorageError(f"{self.uri}: nothing can be written in {there}; name another")
            return
        try:
            self.filesystem.exists(self.root)
        except Exception as error:  # each service raises kinds of its own; raised again as ours
            raise StorageError(f"{self.uri}: {unanswered(error)}") from error

    def exists(self, name: str) -> bool:
        """True when the file `name` is there, whole."""
        try:  # fsspec's own `isfile` takes every refusal and outage for "no"
            with self.reading(name):
                return bool(self.filesystem.info(self.path(name))["type"] == "file")
        except FileMissing:
            return False

    def names(self, below: str = "") -> list[str]:
        """All file names below a sub-folder, relative to this folder, sorted; none without it."""
        place = self.path(below) if below else self.root
        try:
            with self.reading(below):
                found = local_files.below(place) if self.is_local else self._found(place)
        except FileMissing:
            return []
        names = (str(path)[len(self.root) + 1 :] for path in found)
        return sorted(name for name in names if not local_files.is_partial(name))

    def _found(self, place: str) -> list[str]:
        """Files alone: s3fs gives a folder for one into which another begins to write meanwhile."""
        found = self.filesystem.find(place, detail=True)
        return [path for path, info in found.items() if info["type"] == "file"]

    def read(self, name: str) -> bytes:
        """The content of `name`.

        Raises:
            FileMissing: where there is none.
            StorageError: when storage refuses the read.
        """
        with self.reading(name):
            return bytes(self.filesystem.cat_file(self.path(name)))

    @contextmanager
    def opened(self, name: str, **how: str) -> Iterator[IO[bytes]]:
        """`name`, to read a piece at a time, with fsspec settings; raises as `read`, then too."""
        with self.reading(name), self.filesystem.open(self.path(name), "rb", **how) as file:
            yield file

    @contextmanager
    def parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        """A Parquet file, open; raises as `read`, and for one that is torn."""
        with self.opened(name) as file, self._whole(name), pq.ParquetFile(file) as opened:
            yield opened

    def create(self, name: str, data: bytes) -> bool:
        """Writes `name` unless it exists, in one step.

        Returns:
            True when this call created the file, False when another had.

        Raises:
            StorageError: when storage refuses the write (full, forbidden).
        """
        with self._writing(name):
            if self.is_local:
                return local_files.create(self.path(name), data)
            try:
                self.filesystem.pipe_file(self.path(name), data, mode="create")  # conditional
            except FileExistsError:
                return False
            return True

    def write(self, name: str, data: bytes) -> None:
        """Writes or replaces `name`, in one step."""
        with self._writing(name):
            if self.is_local:
                local_files.replace(self.path(name), data)
            else:
                self.filesystem.pipe_file(self.path(name), data)

    def remove(self, name: str = "") -> None:
        """Removes a file or a whole sub-folder; nothing happens where there is none.

        Another may remove, or write, there at the same time; then it is done again.
        """
        path = self.path(name) if name else self.root
        for _ in range(_REMOVALS):
            try:
                with self._writing(name):
                    self.filesystem.invalidate_cache()
                    if self.filesystem.exists(path):
                        self.filesystem.rm(path, recursive=True)
                    return
            except StorageError as error:
                cause = error.__cause__
                gone = isinstance(cause, FileNotFoundError)
                if not gone and getattr(cause, "errno", None) != errno.ENOTEMPTY:
                    raise
        raise StorageError(f"{path}: others write there; end them, then run the same command again")

    def sweep(self) -> None:
        """Removes what killed writers left half-written here; object storage keeps nothing such."""
        if self.is_local:
            local_files.sweep(self.root)

    def settle(self) -> None:
        """Returns when no power cut can take a name away that is seen here, whoever wrote it."""
        if self.is_local:
            with self._writing(""):
                local_files.settle(self.root)

    def read_json(self, name: str) -> Any:
        """The parsed content of a JSON file.

        Raises:
            FileNotFoundError: where there is none.
            StorageError: for a file that is empty or torn.
        """
        data = self.read(name)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:  # of other bytes than UTF-8, too
            made = "what it stood for is made anew"
            raise StorageError(damaged(self.path(name), len(data), "it", made, error)) from error

    def create_json(self, name: str, value: object) -> bool:
        """Like `create`, for a JSON value."""
        return self.create(name, to_json(value))

    def claim_json(self, name: str, value: object) -> bool:
        """Like `create_json`, for a value that nobody else would write, as it names its writer.

        Where an object store's reply was lost and its client asked again, the writer's own file
        was in the way: it is known by what it says.
        """
        return self.create_json(name, value) or self.read(name) == to_json(value)

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file as a table; of a large one only the columns asked for are fetched."""
        if columns is None:
            data = self.read(name)
            with self._whole(name):
                return pq.read_table(pa.BufferReader(data))
        # Arrow plans its own ranges; fsspec's read-ahead would fetch what lies between them.
        with self.opened(name, cache_type="none") as opened, self._whole(name):
            file: Any = opened
            small = file.size <= ONE_REQUEST_BYTES
            return pq.read_table(pa.BufferReader(file.read()) if small else file, columns=columns)

    def create_table(self, name: str, table: pa.Table) -> bool:
        """Like `create`, for a table as Parquet; the same table gives the same bytes."""
        return self.create(name, parquet_bytes(table))

    def copy_in(self, path: Path, name: str) -> None:
        """Copies one local file to `name`, replacing it in one step."""
        with self._writing(name):
            if self.is_local:
                local_files.copy(path, self.path(name))
            else:
                self.filesystem.put_file(str(path), self.path(name))

    def create_from(self, path: Path, name: str) -> bool:
        """Like `create`, with the bytes of a local file, for an object store."""
        with self._writing(name):
            try:
                self.filesystem.put_file(str(path), self.path(name), mode="create")
            except FileExistsError:
                return False
            return True

    @contextmanager
    def in_place(self, name: str) -> Iterator[Path]:
        """The path of a local file, for others' code to write; it is on the disk afterwards.

        A writer that is killed leaves half a file: for folders that count only once a commit file
        lies in them.

        Raises:
            StorageError: when storage refuses the write, or another removed the folder meanwhile.
        """
        path = Path(self.path(name))
        with self._writing(name):
            local_files.make_folder(path.parent)
            yield path
            local_files.synced(path)

    def fetch(self, name: str, path: Path) -> None:
        """Copies `name` to a local path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.reading(name):
            self.filesystem.get_file(self.path(name), str(path))

    def reading(self, name: str = "") -> AbstractContextManager[None]:
        """What storage has against a read, whatever its client raises, is said as ours.

        What the client knows from listings is forgotten: others may have written since.
        """
        self.filesystem.invalidate_cache()
        return _said_as_ours(lambda error: unread(self.path(name) if name else self.uri, error))

    def _writing(self, name: str) -> AbstractContextManager[None]:
        """The same of a write."""
        return _said_as_ours(lambda e: unwritten(self.path(name), e, on_disk=self.is_local))

    @contextmanager
    def _whole(self, name: str) -> Iterator[None]:
        """Says so where what is read as Parquet is no whole Parquet file."""
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            # Arrow says in bare OSErrors that bytes are damaged; a column that is not there is
            # the caller's fault.
            refused = isinstance(error, OSError) and fault_of(error) is not None
            if refused or "No match for FieldRef" in str(error):
                raise
            size = self.filesystem.info(self.path(name))["size"]
            what = f"it and, if there is one, the {MANIFEST} of its stage"
            made = "what is missing is made again"
            raise StorageError(damaged(self.path(name), size, what, made, error)) from error


@contextmanager
def _said_as_ours(why_of: Callable[[Exception], str | None]) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # each service raises kinds of its own; others' go on
        if (why := why_of(error)) is None:
            raise
        raise (FileMissing if fault_of(error) is MISSING else StorageError)(why) from error
