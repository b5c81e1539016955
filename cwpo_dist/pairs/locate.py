"""A source's path in; the files, saved folder or hub shards behind it out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cwpo_dist.config import ConfigError, Source
from cwpo_dist.pairs.readers import COMPRESSIONS, READERS, DataSetError, Part, reader_of

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAVED = ("state.json", "dataset_dict.json")


def is_hub_id(path: str) -> bool:
    """True for `owner/name` or `name` that is nothing on disk and names no file of ours."""
    if "://" in path or not _HUB_ID.fullmatch(path) or reader_of(path):
        return False
    filesystem, root = fsspec.url_to_fs(path)
    return not filesystem.exists(root)


def find_parts(field: str, source: Source) -> list[Part]:
    """The files, saved folder or hub shards of a source, in the order they are read.

    Args:
        field: what errors call the path.
        source: the source.

    Raises:
        ConfigError: naming what is there, or not, and the remedy.
    """
    if is_hub_id(source.path):
        return _hub_parts(field, source)
    try:
        filesystem, root = fsspec.url_to_fs(source.path)
        if filesystem.isdir(root):
            return _folder_parts(field, source, filesystem, root)
        whole = filesystem.isfile(root)
        paths = [root] if whole else sorted(filesystem.glob(root))
    except (OSError, ImportError, ValueError) as error:  # no access, no driver for the protocol
        raise nothing_there(field, source.path, error) from None
    if not paths:
        raise nothing_there(field, source.path, "no such file")
    return [_file_part(field, filesystem, path) for path in paths if not filesystem.isdir(path)]


def nothing_there(field: str, path: str, error: object) -> ConfigError:
    """The error for a path that leads nowhere."""
    return ConfigError(
        f"{field}: nothing to read at {path!r} ({error}); give a file, a glob, a folder, a URI, or "
        "a Hugging Face data set id"
    )


def _file_part(field: str, filesystem: Any, path: str) -> Part:
    reader = reader_of(path)
    if reader is None:
        raise ConfigError(
            f"{field}: {path!r} has an unknown suffix; we read {', '.join(READERS)}, each also "
            f"with {', '.join(COMPRESSIONS)} (but Parquet, which compresses itself)"
        )
    return Part(_uri(filesystem, path), reader, size=filesystem.size(path) or 0)


def _uri(filesystem: Any, path: str) -> str:
    """A path that means the same on every node, whatever its working directory."""
    if isinstance(filesystem, LocalFileSystem):
        return path
    return str(filesystem.unstrip_protocol(path))


def _folder_parts(field: str, source: Source, filesystem: Any, root: str) -> list[Part]:
    root = f"{root.rstrip('/')}/{source.data_dir}" if source.data_dir else root.rstrip("/")
    if any(filesystem.exists(f"{root}/{name}") for name in _SAVED):
        return [_saved_part(field, source, filesystem, root)]
    from cwpo_dist.pairs import data_sets  # not above: it imports datasets

    try:
        found = data_sets.files_by_split(_uri(filesystem, root))
    except (OSError, DataSetError) as error:
        raise nothing_there(field, source.path, error) from None
    if source.split not in found:
        raise _no_split(field, source, found)
    stripped = (filesystem._strip_protocol(path) for path in found[source.split])
    paths = sorted(path for path in stripped if reader_of(path))
    if not paths:
        raise nothing_there(field, source.path, f"no {', '.join(READERS)} in it")
    return [_file_part(field, filesystem, path) for path in paths]


def _saved_part(field: str, source: Source, filesystem: Any, root: str) -> Part:
    size = sum(filesystem.du(root, total=False).values())
    uri = _uri(filesystem, root)
    if not filesystem.exists(f"{root}/dataset_dict.json"):
        return Part(uri, "saved", size=size)
    splits = json.loads(filesystem.cat_file(f"{root}/dataset_dict.json"))["splits"]
    if source.split not in splits:
        raise _no_split(field, source, splits)
    return Part(uri, "saved", split=source.split, size=size)


def _no_split(field: str, source: Source, splits: Iterable[Any]) -> ConfigError:
    return ConfigError(
        f"{field.removesuffix('path')}split: {source.path!r} has no split {source.split!r}; it has "
        f"{', '.join(map(str, splits))}"
    )


def _hub_parts(field: str, source: Source) -> list[Part]:
    """The shards of a hub split; each is read by its own task."""
    from cwpo_dist.pairs import data_sets  # not above: it imports datasets

    whole = Part(
        source.path,
        "hub",
        name=source.name,
        data_dir=source.data_dir,
        split=source.split,
        revision=source.revision,
    )
    try:
        count, size = data_sets.hub_shards(whole)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{field}: {source.path!r} is no file or folder here, and the Hugging Face hub does "
            f"not give it: {error}; check path, name, split and revision"
        ) from error
    return [
        Part(**{**vars(whole), "shard": (index, count), "size": size // count})
        for index in range(count)
    ]
