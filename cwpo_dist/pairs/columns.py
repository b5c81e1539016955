"""The first rows of a source in; which of its columns is which of our fields out.

What the configuration names counts. Else a column of a field's own name, else one of the names
that other people give it. What could be two columns, or means nothing without a word from the user,
is refused with what stands there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from cwpo_dist.config import ConfigError, LabelColumn, Pairing
from cwpo_dist.pairs import column_names, refusals
from cwpo_dist.pairs.first_rows import FirstRows, plain
from cwpo_dist.pairs.label_values import label_values
from cwpo_dist.pairs.layout import ALONE, CHOSEN, EITHER, FIELDS, LISTS, TEXTS, answer_fields
from cwpo_dist.pairs.list_columns import BESIDE, check_responses, list_columns, one_response
from cwpo_dist.pairs.numbers import NUMBER_FIELDS, number_fields
from cwpo_dist.pairs.verdicts import (
    LETTERS,
    ValueMap,
)
from cwpo_dist.pairs.written import is_conversation, messages_in

_RESPONSES = {"responses", "response"}
_VOTES_OF_EITHER, _VOTES_OF_CHOSEN = ("votes_a", "votes_b"), ("votes_chosen", "votes_rejected")


@dataclass(frozen=True)
class Found:
    """What a source's columns are.

    Attributes:
        columns: our field → their column.
        values: what the values of its labels mean.
        annotators: columns with a label of one annotator each.
        media: columns of images, sound or video.
    """

    columns: dict[str, str]
    values: ValueMap = LETTERS
    annotators: tuple[str, ...] = ()
    media: tuple[str, ...] = ()


def find(
    first: FirstRows,
    given: Mapping[str, str | LabelColumn | None],
    most_unknown: float,
    pairing: Pairing = "given",
) -> Found:
    """Finds the columns.

    Args:
        first: the source's first rows.
        given: the configuration's `columns`.
        most_unknown: the share of labels that may have a value of no known meaning.
        pairing: which responses of a prompt are compared.

    Raises:
        ConfigError: naming the field, what is there, and the remedy.
    """
    columns = _given(first, given)
    left_out = {ours for ours, theirs in given.items() if theirs is None}
    columns |= _answers(first, columns, left_out, pairing)
    if _RESPONSES & columns.keys():
        check_responses(first, columns, {*given} - left_out, pairing)
    else:
        _refuse_other_scores(first, columns)
    label = given.get("label")
    several = _annotators(label)
    _add_others(columns, first, left_out, several)
    if several and set(CHOSEN) <= set(columns):
        raise refusals.not_read(first, "label", "chosen and rejected say it already")
    columns = _without_doubt(first, columns, given)
    values = LETTERS
    if several or "label" in columns:
        values = label_values(first, columns, several or (columns["label"],), label, most_unknown)
    return Found(columns, values, several, _media(first, {*columns.values()}, left_out))


def _annotators(label: str | LabelColumn | None) -> tuple[str, ...]:
    named = label.columns if isinstance(label, LabelColumn) else ()
    return () if isinstance(named, str) else tuple(named)


def _add_others(
    columns: dict[str, str], first: FirstRows, left_out: set[str], annotators: Sequence[str]
) -> None:
    """Adds the columns of the fields beside the answers, as far as they are not given."""
    for ours in _beside_answers(columns, annotators):
        theirs = None if {ours} & (columns.keys() | left_out) else _column(first, ours, columns)
        if theirs is not None:
            columns[ours] = theirs


def _media(first: FirstRows, taken: set[str], left_out: set[str]) -> tuple[str, ...]:
    free = (name for name in first.named(*column_names.MEDIA) if plain(name) not in left_out)
    return tuple(name for name in free if name not in taken)


def _given(first: FirstRows, given: Mapping[str, str | LabelColumn | None]) -> dict[str, str]:
    """The columns that the configuration names, our field → theirs; a label's only where one."""
    for ours, theirs in given.items():
        _refuse_unknown(first, ours, theirs)
    for ours, name in named(given):
        if not (first.has(name) if ours in TEXTS else first.may_have(name)):
            raise refusals.no_column(f"{first.field}.columns.{ours}", first, name)
    several = _annotators(given.get("label"))
    return {ours: name for ours, name in named(given) if not (several and ours == "label")}


def named(given: Mapping[str, str | LabelColumn | None]) -> Iterator[tuple[str, str]]:
    """The columns that the configuration names, each with our field."""
    for ours, theirs in given.items():
        names = theirs.columns if isinstance(theirs, LabelColumn) else theirs
        yield from ((ours, name) for name in ([names] if isinstance(names, str) else names or ()))


def _refuse_unknown(first: FirstRows, ours: str, theirs: str | LabelColumn | None) -> None:
    if ours not in FIELDS and not (ours in column_names.MEDIA and theirs is None):
        raise ConfigError(
            f"{first.field}.columns: {ours!r} is unknown; choose from "
            f"{', '.join(FIELDS)}; and {', '.join(column_names.MEDIA)}, which can be null alone"
        )
    if isinstance(theirs, LabelColumn) and ours != "label":
        raise ConfigError(
            f"{first.field}.columns.{ours}: a map of values is for label; name a column"
        )


def _answers(
    first: FirstRows, given: Mapping[str, str], left_out: set[str], pairing: Pairing
) -> dict[str, str]:
    """Those named, else chosen and rejected, else response_a and response_b, else responses."""
    for fields in (EITHER, CHOSEN):
        if set(fields) & set(given):
            return _both(first, given, fields)
    if "responses" in given:
        return list_columns(first, given, left_out) or {}
    if "response" in given:
        return one_response(first, given, left_out, pairing) or {}
    found = _by_their_names(first, left_out) or list_columns(first, given, left_out)
    found = found or one_response(first, given, left_out, pairing)
    if found is None:
        raise refusals.no_answers(first)
    return found


def _both(first: FirstRows, given: Mapping[str, str], fields: tuple[str, str]) -> dict[str, str]:
    """The columns of the two answers, which must be there."""
    columns = {ours: given.get(ours, ours) for ours in fields}
    for ours, theirs in columns.items():
        if not first.has(theirs):
            raise refusals.no_column(f"{first.field}.columns.{ours}", first, theirs)
    return columns


def _by_their_names(first: FirstRows, left_out: set[str]) -> dict[str, str] | None:
    """The columns of two answers, which the configuration does not name; None: there are none."""
    for fields, tables in ((CHOSEN, column_names.CHOSEN), (EITHER, column_names.EITHER)):
        there = [] if left_out & set(fields) else _complete(first, tables)
        if there:
            if fields != there[0]:
                _refuse_several(first, fields[0], list(map(", ".join, there)))
            if fields == EITHER and (more := _siblings(first, there[0])):
                raise refusals.more_answers(first, [*there[0], *more])
            return dict(zip(fields, there[0], strict=True))
    return None


def _complete(first: FirstRows, tables: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs of names of which the source has both; none shares a column with one before it."""
    found: list[tuple[str, str]] = []
    for names in tables:
        both = tuple(first.named(*names))
        if len(both) == 2 and not set(both) & {name for each in found for name in each}:
            found.append(both)
    return found


def _siblings(first: FirstRows, both: tuple[str, str]) -> list[str]:
    """Columns that are named like the two answers, but for their number or letter."""
    stem = plain(both[0])[:-1]
    like = re.compile(re.escape(stem) + r"([a-z]|[0-9]+)")
    return [name for name in first.names if like.fullmatch(plain(name)) and name not in both]


def _refuse_several(first: FirstRows, ours: str, found: Sequence[str]) -> None:
    """What could be two things is neither until the user says which."""
    if len(found) > 1:
        raise refusals.could_be_several(first, ours, found)


def _beside_answers(columns: Mapping[str, str], annotators: Sequence[str]) -> list[str]:
    """The fields to look for beside the answers, in an order in which none takes another's."""
    if _RESPONSES & columns.keys():
        return [*BESIDE]
    others = {*CHOSEN, *EITHER, *LISTS, *ALONE, "prompt", "input", *NUMBER_FIELDS}
    others -= {*_numbers_of(columns)}
    if annotators:
        others |= {"label", *(ours for ours in FIELDS if ours.startswith("votes_"))}
    rest = [ours for ours in FIELDS if ours not in others]
    if set(CHOSEN) <= set(columns):
        rest += EITHER  # beside chosen and rejected, to know whose votes votes_a are
    return [*rest, "prompt", "input"]


def _numbers_of(columns: Mapping[str, str]) -> tuple[str, ...]:
    """The fields of numbers that stand beside these answers."""
    return number_fields(answer_fields(columns))


def _refuse_other_scores(first: FirstRows, columns: Mapping[str, str]) -> None:
    """A score is named after its answer, so that it never changes sides."""
    numbers = _numbers_of(columns)
    for ours in columns:
        if ours in (*LISTS, *ALONE):
            raise refusals.says_nothing(first, ours, "says nothing without responses")
        if ours in NUMBER_FIELDS and ours not in numbers:
            raise ConfigError(
                f"{first.field}.columns.{ours}: scores beside "
                f"{' and '.join(answer_fields(columns))} are {' and '.join(numbers[2:])}; correct "
                "the name"
            )


def _column(first: FirstRows, ours: str, columns: Mapping[str, str]) -> str | None:
    """The column of a field that the configuration does not name; None where there is none."""
    taken = set(columns.values())
    if ours == "prompt":
        return _prompt(first, taken)
    if ours == "input":
        return _input(first, columns)
    if ours == "history" and not all(map(_could_be_turns, first.values("history"))):
        return None
    if ours in first.names and ours not in taken:
        return ours
    if ours == "label" and set(CHOSEN) <= set(columns):  # chosen says it; other names mean less
        return None
    return _by_other_names(first, ours, taken)


def _by_other_names(first: FirstRows, ours: str, taken: set[str]) -> str | None:
    there = first.named(ours, *column_names.OTHERS.get(ours, ()))
    others = [name for name in there if name not in taken]
    _refuse_several(first, ours, others)
    if not others and ours == "tools" and first.has("input.tools"):
        return "input.tools"
    return others[0] if others else None


def _input(first: FirstRows, columns: Mapping[str, str]) -> str | None:
    """Alpaca's, which goes below the instruction."""
    if plain(columns.get("prompt", "")) != "instruction":
        return None
    return next((name for name in first.named("input") if name not in columns.values()), None)


def _could_be_turns(value: object) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.startswith("["))


def _prompt(first: FirstRows, taken: set[str]) -> str | None:
    if "prompt" in first.names and "prompt" not in taken:
        return "prompt"
    names = [name for name in first.named("prompt", *column_names.PROMPTS) if name not in taken]
    if "instruction" in map(plain, names):  # Alpaca's: the input goes below it
        names = _without_input(names)
    talks = [name for name in first.named(*column_names.CONVERSATIONS) if name not in taken]
    names += filter(partial(_holds_conversations, first), talks)
    if first.has("input.messages"):  # OpenAI's preference files
        names = ["input.messages", *_without_input(names)]
    _refuse_several(first, "prompt", names)
    return next(iter(names), None)


def _without_input(names: Sequence[str]) -> list[str]:
    return [name for name in names if plain(name) != "input"]


def _holds_conversations(first: FirstRows, name: str) -> bool:
    values = first.values(name)
    talks = sum(
        messages_in(value) is not None if isinstance(value, str) else is_conversation(value)
        for value in values
    )
    plain = sum(isinstance(value, str) for value in values)
    return 2 * max(talks, plain) > len(values)


def _without_doubt(
    first: FirstRows, columns: Mapping[str, str], given: Mapping[str, object]
) -> dict[str, str]:
    """The columns that say something together, in the order of FIELDS: votes with their answers."""
    found = dict(columns)
    if {"votes_a", "votes_b"} <= found.keys() & given.keys() and _names_chosen(found):
        found["votes_chosen"], found["votes_rejected"] = found.pop("votes_a"), found.pop("votes_b")
        given = {**given, "votes_chosen": None}
    dropped = _saying_nothing(first, found, given)
    for ours in dropped:
        if ours in found and given.get(ours) is not None:
            raise refusals.not_read(first, ours, f"it says nothing beside {', '.join(found)}")
    return {ours: found[ours] for ours in FIELDS if ours in found.keys() - dropped}


def _saying_nothing(
    first: FirstRows, found: Mapping[str, str], given: Mapping[str, object]
) -> tuple[str, ...]:
    """The fields that say nothing beside the others."""
    if not set(CHOSEN) <= set(found):  # a label says which answer was chosen
        return _VOTES_OF_CHOSEN if "votes_a" in found or "label" not in found else ()
    if "votes_chosen" in found:
        return (*_VOTES_OF_EITHER, *EITHER, "label")
    if "votes_a" in found and set(EITHER) <= set(found):
        return ()
    if {"votes_a", "label"} <= set(found) and "votes_a" not in given:
        why = "a label beside chosen and rejected leaves open which"
        raise refusals.not_read(first, "votes_a", why)
    return (*EITHER, "label")


def _names_chosen(columns: Mapping[str, str]) -> bool:
    """Whether the columns that are given for votes_a and votes_b say themselves whose they are."""
    return "chosen" in plain(columns["votes_a"]) and "reject" in plain(columns["votes_b"])
