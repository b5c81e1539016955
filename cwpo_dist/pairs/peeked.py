"""A source in; its inputs and its first rows, which tell how all of it is read, out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from cwpo_dist.config import ConfigError, Source
from cwpo_dist.pairs.first_rows import FirstRows
from cwpo_dist.pairs.locate import Found, find
from cwpo_dist.pairs.looks import Rest, look
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
        n_first: how many of them stand at its head; the others lie behind, evenly spread.
    """

    source: Source
    found: Found
    first: FirstRows
    raws: tuple[RawRow, ...]
    n_first: int


def peek(at: str, source: Source) -> Peeked:
    """Finds the inputs of a source and reads its first rows.

    Args:
        at: where the configuration has it.
        source: what it says there.

    Raises:
        ConfigError: where there is none, or none of its first rows can be read.
    """
    found = find(at, source)
    try:
        head = _head(found.parts)
        more, rest = _behind(found.parts, head, source.limit)
    except SourceError as error:
        raise ConfigError(f"{at}.path: {error}") from error
    unread = head.unread
    if not head.rows:
        told = unread.values() if len(unread) == 1 else (f"{f}: {why}" for f, why in unread.items())
        said = "; ".join(itertools.islice(told, _SAID))
        raise ConfigError(
            f"{at}.path: no row among the first {PEEK_ROWS} of {source.path!r} can be read "
            f"({said or 'it is empty'}); check that the file is what its name says"
        )
    raws = (*head.rows, *more)
    rows = tuple(map(_without_unread, raws))
    first = FirstRows(at, source.path, rows, rest)
    return Peeked(source, found, first, raws, len(head.rows))


def _without_unread(raw: RawRow) -> Mapping[str, object]:
    """A row, with null for each cell that cannot be read; nothing may need it."""
    row = cast(Mapping[str, object], raw.value)  # as `_good` found
    return {**row, **dict.fromkeys(raw.cells)} if raw.cells else row


@dataclass
class _Head:
    """The rows at the head of a source that can be read.

    Attributes:
        rows: these.
        unread: of the files without one, each with why.
        n_opened: how many files were.
        ended: whether the last of them was read to its end.
    """

    rows: list[RawRow] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    n_opened: int = 0
    ended: bool = True


def _head(parts: Iterable[Part]) -> _Head:
    """The head of a source.

    Of a file that is none inside, whatever its name, the next one tells what rows look like.
    """
    head = _Head()
    for part in parts:
        asked = PEEK_ROWS - len(head.rows)
        raws = list(itertools.islice(read(part), asked))
        good = _good(raws)
        if raws and not good:
            head.unread[str(part)] = _why_unreadable(raws)
        head.rows += good
        head.n_opened += 1
        head.ended = len(raws) < asked
        if len(head.rows) >= PEEK_ROWS or len(head.unread) > _BAD_FILES:
            break
    return head


def _good(raws: Iterable[RawRow]) -> list[RawRow]:
    return [raw for raw in raws if not raw.fault and isinstance(raw.value, Mapping)]


def _behind(parts: Sequence[Part], head: _Head, limit: int | None) -> tuple[list[RawRow], Rest]:
    """Some of the rows behind the head; of a source with a limit none, which may lie beyond it."""
    if not head.rows or (limit is not None and limit <= len(head.rows)):
        return [], Rest()
    known = {name for raw in head.rows for name in cast(Mapping[str, object], raw.value)}
    rows, rest = look(parts, head.n_opened, ended=head.ended, known=known)
    return (_good(rows) if limit is None else []), rest


def _why_unreadable(raws: Sequence[RawRow]) -> str:
    if raws[0].fault is Reason.DAMAGED:
        return f"{raws[0].fault}: {raws[0].as_text()}"
    return raws[0].fault or Reason.NOT_MAPPING
