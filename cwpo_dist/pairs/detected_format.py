"""A source's first rows and its columns in; how its prompts and answers are spelled out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from cwpo_dist.config import ConfigError
from cwpo_dist.pairs.first_rows import FirstRows
from cwpo_dist.pairs.layout import TEXTS, Format, answer_fields, cell
from cwpo_dist.pairs.refusals import written_as_text
from cwpo_dist.pairs.transcripts import is_transcript
from cwpo_dist.pairs.written import listed, messages_in, turns_in

_IN_MESSAGES = ("system", "tools", "history")  # what has a place among messages alone


def written_in(first: FirstRows, columns: Mapping[str, str]) -> frozenset[str]:
    """The text fields most of whose first cells are messages, or lists of turns, as text."""
    cells = {name: first.texts(name, columns[name]) for name in TEXTS if name in columns}
    written = {name for name, values in cells.items() if _most(values, messages_in)}
    # A list of strings may be an answer like any other; where all texts are lists, they are turns.
    turns = all(_most(values, turns_in) for values in cells.values())
    if turns and not written and "responses" not in columns:
        return frozenset(cells)
    return frozenset(written)


def _most(values: Sequence[object], reads: Callable[[str], object]) -> bool:
    """Whether more than half of the values are text that spells something else."""
    hits = sum(isinstance(value, str) and reads(value) is not None for value in values)
    return 2 * hits > len(values)


def format_of(
    first: FirstRows,
    columns: Mapping[str, str],
    given: Literal["auto"] | Format,
    written: frozenset[str],
) -> Format:
    """The format given, or for `auto` the one that most of the first rows follow.

    Raises:
        ConfigError: for text whose columns hold what only messages can.
    """
    if given == "text":
        _check_text(first, columns, written)
    if given != "auto":
        return given
    return _likely(first, columns, written)


def _likely(first: FirstRows, columns: Mapping[str, str], written: frozenset[str]) -> Format:
    """The format that most of the first rows follow."""
    found = [_texts(row, columns) for row in first.rows]
    if written or 2 * sum(map(_holds_messages, found)) > len(found):
        return "conversational"
    # Transcripts show at the start of the whole text: the prompt's where there is one.
    if 2 * sum(is_transcript(next(iter(values), None)) for values in found) > len(found):
        return "hh"
    return "conversational" if set(_IN_MESSAGES) & set(columns) else "text"


def _texts(row: Mapping[str, object], columns: Mapping[str, str]) -> list[object]:
    """A row's prompt, where it has one, and its answers."""
    names = [name for name in ("prompt", *answer_fields(columns)) if name in columns]
    cells = {name: cell(row, columns[name]) for name in names}
    responses = listed(cells.pop("responses", None)) or []
    return [*cells.values(), *responses]


def _holds_messages(values: Sequence[object]) -> bool:
    return any(isinstance(value, list | Mapping) for value in values)


def _check_text(first: FirstRows, columns: Mapping[str, str], written: frozenset[str]) -> None:
    if written:
        raise written_as_text(first, [columns[name] for name in TEXTS if name in written])
    for ours in _IN_MESSAGES:
        if ours in columns:
            raise ConfigError(
                f"{first.field}.format: text, but {first.path!r} has {ours} ({columns[ours]!r}), "
                f"which has a place among messages alone; set format: conversational, or columns: "
                f"{{{ours}: null}}"
            )
