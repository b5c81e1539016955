"""A source's path in; the files, saved folder or hub shards behind it, and what it leaves out, out.

A folder's readable files are all read, unless something says that they are of several splits: the
`configs` of its data set card, the metadata of a saved data set, or their own names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from cwpo_dist.config import ConfigError, Source
from cwpo_dist.file_marks import Mark, fingerprint, mark
from cwpo_dist.hub_names import is_hub_id
from cwpo_dist.pairs.listing import (
    Info,
    LeftOut,
    Listing,
    below,
    left_out_lines,
    matching,
    real_path,
    unknown_suffix,
)
from cwpo_dist.pairs.readers import READERS, Part, filesystem_of, reader_of
from cwpo_dist.pairs.split_names import NoSplitError, of_other_splits, pick, split_of
from cwpo_dist.storage_faults import MISSING, fault_of, told

_SAVED = ("state.json", "dataset_dict.json")
_CARD = "README.md"
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---", re.DOTALL)


@dataclass(frozen=True)
class Found:
    """What a source's path leads to.

    Attributes:
        parts: what is read, in this order.
        left_out: what is not.
        marks: [path, size, etag or time] of each file that is read; none for the hub.
        note: what should be known of it that is no fault.
    """

    parts: tuple[Part, ...]
    left_out: tuple[LeftOut, ...] = ()
    marks: tuple[Mark, ...] = ()
    note: str | None = None


def find(field: str, source: Source) -> Found:
    """What a source reads and what it leaves out; no row is read.

    Args:
        field: what errors call the source.
        source: the source.

    Raises:
        ConfigError: naming what is there, or not, and the remedy.
    """
    try:
        if is_hub_id(source.path):
            return _on_the_hub(field, source)
        filesystem, root = filesystem_of(source.path)
        kind = _kind(filesystem, root)
        if kind == "directory":
            return _in_folder(field, source, filesystem, root.rstrip("/"))
        return _files(field, source, filesystem, root, there=kind == "file")
    except NoSplitError as error:
        raise ConfigError(f"{field}.split: {source.path!r} {error}") from None
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 (each service raises kinds of its own; others go on)
        raise _refused(field, source, error) from None


def reads_below(source: Source, place: str) -> bool:
    """Whether a source is a folder, or a glob over folders, in which `place` lies."""
    if is_hub_id(source.path):
        return False
    filesystem, root = filesystem_of(source.path)
    other, place = filesystem_of(place)
    if filesystem.isdir(root):
        root = f"{root}/{source.data_dir or ''}"
    elif "**" in root:
        root = root.partition("**")[0]
    else:
        return False
    if type(filesystem) is not type(other):
        return False
    root, place = (real_path(filesystem, each).rstrip("/") + "/" for each in (root, place))
    return place.startswith(root)


def _nothing(field: str, source: Source, why: object) -> ConfigError:
    return ConfigError(
        f"{field}.path: nothing to read at {source.path!r} ({why}); give a file, a glob, a folder, "
        "a URI, or a Hugging Face data set id"
    )


def _refused(field: str, source: Source, error: Exception) -> Exception:
    """What storage has against a source, in words; the error itself where that is not storage's."""
    fault = fault_of(error)
    if fault is None or fault is MISSING:
        # OSError: of a kind that nobody knows; the others: no driver for the protocol.
        ours = isinstance(error, OSError | ImportError | ValueError)
        return _nothing(field, source, told(error)) if ours or fault else error
    return ConfigError(
        f"{field}.path: cannot read {source.path!r}: {fault.what} ({told(error)}); {fault.remedy}"
    )


def _kind(filesystem: AbstractFileSystem, path: str) -> str | None:
    """`directory`, `file`, …; None where there is nothing.

    fsspec's own `isdir` and `isfile` take every refusal and outage for "no".
    """
    if filesystem.isdir(path):
        return "directory"
    try:
        return str(filesystem.info(path)["type"])
    except OSError as error:
        if fault_of(error) is MISSING:
            return None
        raise


def _files(
    field: str, source: Source, filesystem: AbstractFileSystem, root: str, *, there: bool
) -> Found:
    """One file, or those that match a glob; a file that exists is no glob, whatever its name."""
    _refuse(field, source, "data_dir", "name", "revision")
    if there:
        if reader_of(root) is None:
            raise ConfigError(f"{field}.path: {root!r} has an {unknown_suffix()}")
        folder, _, name = root.rpartition("/")
        listing = Listing(folder, {name: filesystem.info(root)}, {})
        if source.split == "train":  # as `datasets` calls any file that is given by itself
            return _found(field, source, filesystem, listing)
    else:
        listing = matching(filesystem, root)
        if not listing.files and not listing.left_out:
            raise _nothing(field, source, "no such file")
    if source.split is None:  # who spells a glob means all that matches it
        found = _found(field, source, filesystem, listing)
        return replace(found, note=_several(source, listing))
    why = of_other_splits(listing.files, source.split, source.into)
    return _found(field, source, filesystem, listing.without(why))


def _several(source: Source, listing: Listing) -> str | None:
    named = sorted({split for name in listing.files if (split := split_of(name)) is not None})
    if len(named) < 2:
        return None
    return (
        f"{source.path!r} matches files of several splits by their names ({', '.join(named)}), and "
        "all are read; `split` reads one of them"
    )


def _in_folder(field: str, source: Source, filesystem: AbstractFileSystem, root: str) -> Found:
    root = f"{root}/{source.data_dir.strip('/')}" if source.data_dir else root
    _refuse(field, source, "revision")
    if any(filesystem.exists(f"{root}/{name}") for name in _SAVED):
        _refuse(field, source, "name")
        return _saved(source, filesystem, root)
    listing = below(filesystem, root)
    if (card := _configs(filesystem, root)) is not None:
        why = _by_card(source, filesystem, listing, card)
    else:
        _refuse(field, source, "name")
        why = of_other_splits(listing.files, source.split, source.into)
    return _found(field, source, filesystem, listing.without(why))


def _refuse(field: str, source: Source, *settings: str) -> None:
    """A setting that means nothing for what the path is must not look as if it acted."""
    whose = {
        "data_dir": "a folder or a hub data set",
        "name": f"a hub data set, or a folder whose {_CARD} lists `configs`",
        "revision": "a hub data set",
    }
    for setting in settings:
        if getattr(source, setting) is not None:
            raise ConfigError(
                f"{field}.{setting}: {getattr(source, setting)!r}, which only {whose[setting]} "
                f"has; {source.path!r} is none: remove it, or correct the path"
            )


def _configs(filesystem: AbstractFileSystem, root: str) -> str | None:
    """The folder's data set card, where it says which files are of which split."""
    if not filesystem.isfile(f"{root}/{_CARD}"):
        return None
    card: str = filesystem.cat_file(f"{root}/{_CARD}").decode("utf-8", "replace")
    head = _FRONT_MATTER.match(card)
    return card if head and re.search(r"^configs:", head[1], re.MULTILINE) else None


def _by_card(
    source: Source, filesystem: AbstractFileSystem, listing: Listing, card: str
) -> dict[str, str]:
    """The files that a data set card gives to no, or to another, split; each with why."""
    from cwpo_dist.pairs import data_sets  # not above: it imports datasets

    root = real_path(filesystem, listing.root)  # patterns go round no `..`
    subset, splits = data_sets.splits_of_card(card, _uri(filesystem, root), source.name)
    of = {
        filesystem._strip_protocol(path).removeprefix(root).lstrip("/"): split
        for split, paths in splits.items()
        for path in paths
    }
    kept = pick(list(splits), source.split, source.into)
    others = {name: of.get(name) for name in listing.files if of.get(name) != kept}
    return {
        name: f"of split {split!r} by {_CARD}; `split: {split}` reads it"
        if split
        else f"{_CARD} gives it to no split of subset {subset!r}"
        for name, split in others.items()
    }


def _found(field: str, source: Source, filesystem: AbstractFileSystem, listing: Listing) -> Found:
    left_out = tuple(LeftOut(source.path, *each) for each in sorted(listing.left_out.items()))
    if not listing.files:
        why = "; ".join(left_out_lines(left_out)) or "it is empty"
        raise _nothing(field, source, f"no {', '.join(READERS)}: {why}")
    paths = [(f"{listing.root}/{name}", info) for name, info in listing.files.items()]
    parts = tuple(_part(filesystem, path, info) for path, info in paths)
    return Found(parts, left_out, tuple(mark(path, info) for path, info in paths))


def _part(filesystem: AbstractFileSystem, path: str, info: Info) -> Part:
    reader = reader_of(path)
    assert reader is not None, path
    return Part(_uri(filesystem, path), reader, size=info.get("size") or 0)


def _uri(filesystem: AbstractFileSystem, path: str) -> str:
    """A path that means the same on every node, whatever its working directory."""
    if isinstance(filesystem, LocalFileSystem):
        return path
    return str(filesystem.unstrip_protocol(path))


def _saved(source: Source, filesystem: AbstractFileSystem, root: str) -> Found:
    """A folder that `save_to_disk` wrote: one data set, or one a split."""
    uri, size = _uri(filesystem, root), sum(filesystem.du(root, total=False).values())
    marks = tuple(fingerprint(uri))
    if not filesystem.exists(f"{root}/dataset_dict.json"):
        state = _described(filesystem, f"{root}/state.json")
        of = str(state.get("_split") or "train").partition("[")[0]  # train[:10%]
        pick([of], source.split, source.into)
        return Found((Part(uri, "saved", size=size),), (), marks)
    splits = _described(filesystem, f"{root}/dataset_dict.json").get("splits")
    if not (isinstance(splits, list) and splits and all(isinstance(each, str) for each in splits)):
        raise ValueError(f"dataset_dict.json: splits: {str(splits)[:40]}; it should list names")
    kept = pick(splits, source.split, source.into)
    part = Part(uri, "saved", split=kept, size=size)
    return Found((part,), _other_splits(source, splits, kept), marks)


def _described(filesystem: AbstractFileSystem, path: str) -> dict[str, object]:
    """What a file of `save_to_disk` says of its folder.

    Raises:
        ValueError: naming the file, where it is no JSON object.
    """
    name = path.rpartition("/")[2]
    if not filesystem.isfile(path):
        raise ValueError(f"{name} is not a regular file")
    try:
        held = json.loads(filesystem.cat_file(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{name} does not hold a JSON object")
    return held


def _other_splits(source: Source, splits: Iterable[str], kept: str) -> tuple[LeftOut, ...]:
    others = [split for split in splits if split != kept]
    why = f"split {kept!r} is read; `split` names another"
    return tuple(LeftOut(source.path, f"split {split!r}", why) for split in others)


def _on_the_hub(field: str, source: Source) -> Found:
    """The shards of a hub split; each is read by its own task."""
    from cwpo_dist.pairs import data_sets  # not above: it imports datasets

    whole = Part(
        source.path,
        "hub",
        name=source.name,
        data_dir=source.data_dir,
        revision=source.revision,
    )
    try:
        splits: Mapping[str, tuple[int, int]] = data_sets.hub_splits(whole)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{field}.path: {source.path!r} is neither a file nor a folder here, and the Hugging "
            f"Face hub does not give it: {error}; check path, name, data_dir and revision"
        ) from error
    kept = pick(list(splits), source.split, source.into)
    count, size = splits[kept]
    part = replace(whole, split=kept, size=size // count)
    parts = tuple(replace(part, shard=(index, count)) for index in range(count))
    return Found(parts, _other_splits(source, splits, kept))
