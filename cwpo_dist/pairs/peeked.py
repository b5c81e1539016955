"""A source in; its inputs and its first rows, which tell how all of it is read, out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from cwpo_dist.config import ConfigError, Source
from cwpo_dist.pairs.first_rows import FirstRows
from cwpo_dist.pairs.locate import Found, find
from cwpo_dist.pairs.readers import Part, RawRow, SourceError, read
from cwpo_dist.pairs.rejects import Reason

PEEK_ROWS = 1000
_BAD_FILES = 100  # at the head of a source, until we give up
_SAID = 3  # of them


@dataclass(frozen=True)
class Peeked:
    """A source that was looked at.

    Attributes:
        source: as the configuration has it.
        found: its inputs.
        first: its first rows.
        raws: the same, as their files have them.
    """

    source: Source
    found: Found
    first: FirstRows
    raws: tuple[RawRow, ...]


def peek(field: str, source: Source) -> Peeked:
    """Finds the inputs of a source and reads its first rows.

    Args:
        field: where the configuration has it.
        source: what it says there.

    Raises:
        ConfigError: where there is none, or none of its first rows can be read.
    """
    found = find(field, source)
    try:
        raws, unread = _first_rows(found.parts)
    except SourceError as error:
        raise ConfigError(f"{field}.path: {error}") from error
    if not raws:
        told = unread.values() if len(unread) == 1 else (f"{f}: {why}" for f, why in unread.items())
        said = "; ".join(itertools.islice(told, _SAID))
        raise ConfigError(
            f"{field}.path: no row among the first {PEEK_ROWS} of {source.path!r} can be read "
            f"({said or 'it is empty'}); check that the file is what its name says"
        )
    rows = tuple(map(_without_unread, raws))
    return Peeked(source, found, FirstRows(field, source.path, rows), tuple(raws))


def _without_unread(raw: RawRow) -> Mapping[str, object]:
    """A row, with null for each cell that cannot be read; nothing may need it."""
    row = cast(Mapping[str, object], raw.value)  # as `_first_rows` found
    return {**row, **dict.fromkeys(raw.cells)} if raw.cells else row


def _first_rows(parts: Iterable[Part]) -> tuple[list[RawRow], dict[str, str]]:
    """The first rows that can be read, and of the files without one so far, each with why.

    Of a file that is none inside, whatever its name, the next one tells what rows look like.
    """
    rows: list[RawRow] = []
    unread: dict[str, str] = {}
    for part in parts:
        raws = list(itertools.islice(read(part), PEEK_ROWS - len(rows)))
        good = [raw for raw in raws if not raw.fault and isinstance(raw.value, Mapping)]
        if raws and not good:
            unread[str(part)] = _why_unreadable(raws)
        rows += good
        if len(rows) >= PEEK_ROWS or len(unread) > _BAD_FILES:
            break
    return rows, unread


def _why_unreadable(raws: Sequence[RawRow]) -> str:
    if raws[0].fault is Reason.DAMAGED:
        return f"{raws[0].fault}: {raws[0].as_text()}"
    return raws[0].fault or Reason.NOT_MAPPING
