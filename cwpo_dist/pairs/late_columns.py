"""Columns that the first rows of a source lack: those that are named, and those that nobody reads.

The first rows say how all are read. A column that the configuration names may come later, and
rows without it are as with null; one that it does not name is not read, and is told.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from cwpo_dist.config import ConfigError, Pairing
from cwpo_dist.pairs import column_names
from cwpo_dist.pairs.first_rows import FirstRows, plain
from cwpo_dist.pairs.layout import ALONE, EITHER, LISTS, answer_fields
from cwpo_dist.pairs.numbers import number_fields
from cwpo_dist.pairs.piece_summary import PieceSummary
from cwpo_dist.pairs.pieces import Piece
from cwpo_dist.pairs.unread import Unread

_BESIDE = ("system", "tools", "history")
_VOTES_OF = {"votes_a": "votes_chosen", "votes_b": "votes_rejected"}


def missed(
    first: FirstRows,
    columns: Mapping[str, str],
    given: Collection[str],
    annotators: Sequence[str],
    pairing: Pairing,
) -> dict[str, str]:
    """The names under which fields would have been read, had the first rows had them.

    Args:
        first: the source's first rows.
        columns: our field → their column.
        given: the fields of which the configuration says something.
        annotators: columns with a label of one annotator each.
        pairing: which responses of a prompt are compared.
    """
    found: dict[str, str] = {}
    for ours in _fields(columns, annotators, pairing):
        names = (ours, *_other_names(ours))
        if ours not in columns and ours not in given and not first.named(*names):
            found |= dict.fromkeys(names, ours)
    return found


def _fields(
    columns: Mapping[str, str], annotators: Sequence[str], pairing: Pairing
) -> Iterator[str]:
    """The fields that say something beside such answers."""
    yield from _BESIDE
    answers = answer_fields(columns)
    for fields in (LISTS, ALONE):
        if answers == fields[:1]:
            yield from fields[1:] if pairing != "given" else ()
            return
    yield from number_fields(answers)
    if annotators:
        return
    if answers == EITHER:
        yield "label"
    others = {*_VOTES_OF} if "votes_chosen" in columns else {*_VOTES_OF.values()}
    either = others & {*columns} or answers == EITHER
    yield from (*_VOTES_OF, "votes_tie") if either else (*_VOTES_OF.values(), "votes_tie")


def _other_names(ours: str) -> Sequence[str]:
    rating = {"score": "scores", "rank": "ranks"}.get(ours, ours)
    return column_names.RATINGS.get(rating) or column_names.OTHERS.get(ours, ())


def lost(pieces: Iterable[Piece], unread: Iterable[Unread]) -> Iterator[str]:
    """What is not read of sources because their first rows lack it, for people.

    Args:
        pieces: one a source.
        unread: of each, what nothing reads.
    """
    for piece, found in zip(pieces, unread, strict=True):
        for name, count in found.columns.items():
            ours = piece.layout.missed.get(plain(name))
            if ours is not None:
                yield (
                    f"{piece.source}: column {name!r} (in {count:,} rows) is lost: it may be "
                    f"{ours}, but the rows that were looked at lack it, and they say how all are "
                    "read. Put the files that have it into a source of their own, or name it under "
                    f"prepare.sources.N.columns: {{{ours}: {name}}} (null: it is not to be read)"
                )


def unread_of(pieces: Iterable[Piece], read: Iterable[PieceSummary]) -> list[Unread]:
    """What nothing reads of each source, whatever pieces it was cut into."""
    found: dict[str, Unread] = {}
    for each in read:
        found.setdefault(each.source, Unread()).add(each.unread)
    return [found.get(piece.source, Unread()) for piece in pieces]


def note(first: FirstRows, late: Sequence[str]) -> str:
    """That columns are named which the first rows lack."""
    return (
        f"{first.field}: {', '.join(map(repr, late))} stands in none of the {len(first.rows):,} "
        f"rows of {first.path!r} that were looked at; rows without it are read as with null, and "
        "prepare stops where no row has it"
    )


def refuse_unmet(pieces: Sequence[Piece], read: Iterable[PieceSummary]) -> None:
    """Refuses columns that the configuration names and no row has.

    Raises:
        ConfigError: naming source and column.
    """
    met = {(each.source, name) for each in read for name in each.late}
    anywhere = {name for _, name in met}
    for k, piece in enumerate(pieces):
        for name in piece.layout.late:
            kept = name in piece.layout.kept and name in anywhere
            if not kept and (piece.source, name) not in met:
                raise ConfigError(
                    f"prepare.sources.{k}: {piece.source!r} has no column {name!r} in any row; "
                    "correct the name under columns (or prepare.keep_columns)"
                )
