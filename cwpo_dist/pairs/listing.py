"""A folder or a glob in; its files that a reader takes, and the others, each with why, out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from cwpo_dist.pairs.readers import COMPRESSIONS, READERS, SIGNATURES, compression_of, reader_of
from cwpo_dist.pairs.rejects import printable

# What `datasets` and the hub write beside data.
_METADATA = frozenset(
    {"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
)
_MAGIC = re.compile(r"[*?\[]")
_NAMES_SHOWN = 5

Info = Mapping[str, Any]  # of a file, as fsspec gives it


@dataclass(frozen=True)
class LeftOut:
    """A file, or a split, that a source does not read.

    Attributes:
        source: the source as the configuration spells it.
        file: its path relative to the source.
        why: and how it would be read, if it can.
    """

    source: str
    file: str
    why: str


@dataclass(frozen=True)
class Listing:
    """Files by their path relative to a folder.

    Attributes:
        root: the folder, as its filesystem spells it.
        files: those that are read, in the order of their names.
        left_out: the others, each with why.
    """

    root: str
    files: Mapping[str, Info]
    left_out: Mapping[str, str]

    def without(self, why: Mapping[str, str]) -> Listing:
        """The same, but that the files in `why` are left out as well, for the reasons there."""
        files = {name: info for name, info in self.files.items() if name not in why}
        return Listing(self.root, files, {**self.left_out, **why})


def unknown_suffix() -> str:
    """What is wrong with a name that no reader takes."""
    return (
        f"unknown suffix; we read {', '.join(READERS)}, each also with {', '.join(COMPRESSIONS)} "
        "(but Parquet and Arrow, which compress themselves)"
    )


def below(filesystem: AbstractFileSystem, root: str) -> Listing:
    """All files below a folder; folders behind links are left out, hidden ones by their name.

    Raises:
        OSError: also where a folder below it refuses to be listed.
    """
    return _sorted_out(filesystem, root, _everything(filesystem, root), hidden=False)


def _everything(filesystem: AbstractFileSystem, root: str) -> Mapping[str, Info]:
    """All files below a folder; fsspec by itself passes over local folders that it may not list."""
    if not isinstance(filesystem, LocalFileSystem):
        every: Mapping[str, Info] = filesystem.find(root, detail=True)
        return {path: info for path, info in every.items() if info["type"] != "directory"}
    found: dict[str, Info] = {}
    for info in filesystem.ls(root, detail=True):
        is_folder = info["type"] == "directory"  # which a link to one is not
        found |= _everything(filesystem, info["name"]) if is_folder else {info["name"]: info}
    return found


def matching(filesystem: AbstractFileSystem, pattern: str) -> Listing:
    """What matches a glob; hidden files do where the glob itself spells such a name."""
    root, rest = _existing(filesystem, pattern)
    hidden = re.search(r"(^|/)[._]", rest) is not None
    strict = _Strict() if isinstance(filesystem, LocalFileSystem) else filesystem
    if not _MAGIC.search(root):
        found = strict.glob(pattern, detail=True)
    else:
        wanted = re.compile(glob_translate(rest))  # of the root the filesystem would make a glob
        every = strict.find(root, detail=True, withdirs=True)
        found = {path: info for path, info in every.items() if wanted.match(_below(root, path))}
    for error in getattr(strict, "refused", ()):
        if _could_match(pattern, error.filename or pattern):
            raise error
    return _sorted_out(filesystem, root, found, hidden)


class _Strict(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Local files; remembers which folders refused to be listed, which fsspec passes over.

    Attributes:
        refused: their errors.
    """

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.refused: list[OSError] = []

    def ls(self, path: str, detail: bool = False, **how: object) -> object:
        try:
            return super().ls(path, detail, **how)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            self.refused.append(error)
            raise


def _could_match(pattern: str, folder: str) -> bool:
    """Whether something in a folder could match a glob."""
    for wanted, name in zip(pattern.split("/"), folder.split("/"), strict=False):
        if "**" in wanted:
            return True
        if name != wanted and not fnmatchcase(name, wanted):
            return False
    return True


def _below(root: str, path: str) -> str:
    return path.removeprefix(root).lstrip("/")


def _existing(filesystem: AbstractFileSystem, pattern: str) -> tuple[str, str]:
    """A glob's folders down to the first that is not there as it is spelled, and what follows.

    A folder that exists is no part of the glob, whatever its name.
    """
    folders = pattern.split("/")[:-1]
    for count, folder in enumerate(folders):
        path = "/".join(folders[: count + 1])
        if _MAGIC.search(folder) and not filesystem.isdir(path):
            folders = folders[:count]
            break
    root = "/".join(folders)
    return root, _below(root, pattern)


def left_out_lines(found: Sequence[LeftOut]) -> Iterator[str]:
    """What is left out: a line for each source and reason, with a few of the names."""
    groups: dict[tuple[str, str], list[str]] = {}
    for each in found:
        groups.setdefault((each.source, each.why), []).append(each.file)
    for (source, why), files in groups.items():
        more = f" and {len(files) - _NAMES_SHOWN:,} more" if len(files) > _NAMES_SHOWN else ""
        yield f"{source!r} leaves out {', '.join(files[:_NAMES_SHOWN])}{more}: {why}"


def real_path(filesystem: AbstractFileSystem, path: str) -> str:
    """A path that is the same for a file and for all links to it."""
    return os.path.realpath(path) if isinstance(filesystem, LocalFileSystem) else path


def _sorted_out(
    filesystem: AbstractFileSystem, root: str, found: Mapping[str, Info], hidden: bool
) -> Listing:
    files: dict[str, Info] = {}
    left_out: dict[str, str] = {}
    first_name: dict[str, str] = {}  # by the file itself
    for path, info in sorted(found.items(), key=lambda each: bool(each[1].get("islink"))):
        name = _below(root, path)
        why = _unread(filesystem, path, name, info, hidden)
        if why is None:
            same = first_name.setdefault(real_path(filesystem, path), name)
            why = None if same == name else f"a link to {same}, which is read"
        if why is None:
            files[name] = info
        else:
            left_out[printable(name)] = why
    return Listing(root, dict(sorted(files.items())), left_out)


def _unread(
    filesystem: AbstractFileSystem, path: str, name: str, info: Info, hidden: bool
) -> str | None:
    """Why a file is not read; None where a reader takes it."""
    if not hidden and _is_hidden(name):
        return "hidden: its name begins with a dot, or that of a folder with a dot or _"
    if printable(name) != name:  # no manifest and no table of rejects could hold it
        return "its name is not UTF-8; rename it"
    if info["type"] != "file":
        return _no_file(filesystem, path, info)
    return _unread_file(name.rpartition("/")[2], info)


def _no_file(filesystem: AbstractFileSystem, path: str, info: Info) -> str | None:
    """What else a path can be; None for a link to a file that is read."""
    is_link = bool(info.get("islink"))
    if filesystem.isdir(path):
        linked = " behind a link" if is_link else ""
        return f"a folder{linked}; give it as a source of its own"
    if not filesystem.isfile(path):
        return "no regular file" if filesystem.exists(path) else "a link to nothing"
    return _unread_file(path.rpartition("/")[2], info)


def _unread_file(base: str, info: Info) -> str | None:
    if base in _METADATA:
        return "it describes a data set, and holds no rows"
    reader = reader_of(base)
    if reader is None:
        return unknown_suffix()
    size = info.get("size")  # None where a filesystem cannot tell
    signature = SIGNATURES.get(compression_of(base) or "", 0)
    # Parquet and Arrow have a footer even where they hold no row: without one they are damaged.
    is_empty = size is not None and size <= signature and reader not in ("parquet", "arrow")
    return "it is empty" if is_empty else None


def _is_hidden(name: str) -> bool:
    """True for what `datasets`, Spark and Arrow pass over: .x, .x/y, __x/y and _x/y."""
    *folders, base = name.split("/")
    return base.startswith(".") or any(folder.startswith((".", "_")) for folder in folders)
