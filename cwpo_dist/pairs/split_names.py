"""File names in; the split that each names, and so which files a source reads, out.

The rules are those of `datasets`: `data/NAME-00000-of-00003.parquet` is of split NAME; else the
words train, validation, test and their like count where they stand alone in the name of a folder,
or of the file itself. A file whose name says no split belongs to whatever is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

# A test holds them against those of `datasets`, whose import takes most of a second.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")
_PATTERNS = {
    split: re.compile(rf"(?<![^\W\d_])({'|'.join(words)})(?![^\W\d_])", re.IGNORECASE)
    for split, words in SPLIT_WORDS.items()
}


class NoSplitError(ValueError):
    """No file can be chosen; the message says which splits there are."""


def split_of(name: str) -> str | None:
    """The split that a file's path, relative to its source, names; None where none, or several."""
    if shard := _SHARD.fullmatch(name):
        return shard[1]
    path = PurePosixPath(name)
    folders = [folder.name for folder in path.parents if folder.name]
    for part in (*folders, path.name):  # the innermost folder first
        named = [split for split, pattern in _PATTERNS.items() if pattern.search(part)]
        if len(named) == 1:
            return named[0]
    return None


def pick(splits: Sequence[str], asked: str | None, into: str | None) -> str:
    """The split to read: the one asked for; else the one the source goes to, `train`, the only one.

    Raises:
        NoSplitError: where that leaves none.
    """
    choices = (
        [asked] if asked is not None else [into, "train", *(splits if len(splits) == 1 else ())]
    )
    for split in choices:
        if split is not None and split in splits:
            return split
    there = ", ".join(splits)
    if asked is not None:
        raise NoSplitError(f"has no split {asked!r}; it has {there or 'none'}")
    raise NoSplitError(f"has the splits {there}, and none is named; name one of them")


def of_other_splits(names: Iterable[str], asked: str | None, into: str | None) -> dict[str, str]:
    """The files of other splits than the one that is read, each with why.

    Args:
        names: paths relative to the source.
        asked: the split that the source names; None: where the names tell several, see `pick`.
        into: the side that the source goes to.

    Raises:
        NoSplitError: where the split asked for is not there, or none can be chosen.
    """
    named = {name: split_of(name) for name in names}
    splits = sorted({split for split in named.values() if split is not None})
    if not splits:  # as in `datasets`, all of it is `train`
        pick(["train"], asked, None)
        return {}
    if asked is None and None in named.values():
        read = {None, _likely(splits, into)}
    else:
        read = {pick(splits, asked, into)}
    return {name: _why(split, asked) for name, split in named.items() if split not in read}


def _likely(splits: Sequence[str], into: str | None) -> str | None:
    """The split that goes with files that name none, where there is one."""
    return next((split for split in (into, "train") if split in splits), None)


def _why(split: str | None, asked: str | None) -> str:
    if split is None:
        return f"no split is in the name, and split: {asked} is asked for"
    return f"of split {split!r} by the name; `split: {split}` reads it"
