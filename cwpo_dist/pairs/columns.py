"""The first rows of a source in; which of its columns is which of our fields out.

What the configuration names counts. Else a column of a field's own name, else one of the names
that other people give it: the tables here. What could be two columns, or means nothing without a
word from the user, is refused with what stands there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cwpo_dist.config import ConfigError, LabelColumn
from cwpo_dist.pairs.first_rows import FirstRows, plain
from cwpo_dist.pairs.layout import CHOSEN, EITHER, FIELDS, answer_fields
from cwpo_dist.pairs.numbers import NUMBER_FIELDS, number_fields
from cwpo_dist.pairs.refusals import (
    could_be_several,
    more_answers,
    no_answers,
    no_column,
    not_read,
    unknown_values,
)
from cwpo_dist.pairs.rejects import printable
from cwpo_dist.pairs.verdicts import (
    LETTERS,
    ValueMap,
    counts_otherwise,
    found_in,
    mapped,
    spelled,
)
from cwpo_dist.pairs.written import is_conversation, messages_in

MEDIA = ("image", "images", "video", "videos", "audio", "audios", "pixel_values")

_AFTER = ("", "_response", "_answer", "_output", "_completion", "_text", "_message", "_messages")
_CHOSEN_NAMES = (
    *((f"chosen{end}", f"rejected{end}") for end in _AFTER),
    *((f"{start}_chosen", f"{start}_rejected") for start in ("response", "answer", "output")),
    *((f"preferred{end}", f"dispreferred{end}") for end in _AFTER),
    *((f"preferred{end}", f"non_preferred{end}") for end in _AFTER),
    ("better_response", "worse_response"),
    ("messages", "rejected_response"),  # ms-swift: the conversation ends in the chosen answer
    ("messages", "rejected_messages"),
)
_STEMS = ("response", "answer", "output", "completion", "conversation", "messages", "text")
_EITHER_NAMES = tuple(
    (f"{stem}{a}", f"{stem}{b}")
    for stem in _STEMS
    for a, b in (("_a", "_b"), ("_0", "_1"), ("_1", "_2"), ("0", "1"), ("1", "2"))
)
_PROMPTS = ("instruction", "question", "query", "input", "user_input", "user_prompt")
_CONVERSATIONS = ("messages", "conversations", "conversation", "conversation_input")
_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "system": ("system_prompt", "system_message"),
    "tools": ("functions",),
    "label": (
        *("winner", "preference", "preferred", "preferred_response", "verdict"),
        *("better_response_id", "overall_preference", "human_preference"),
    ),
    "votes_chosen": ("chosen_votes",),
    "votes_rejected": ("rejected_votes",),
    "votes_tie": ("votes_equal", "votes_ties", "votes_neither", "tie_votes"),
}
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
    first: FirstRows, given: Mapping[str, str | LabelColumn | None], most_unknown: float
) -> Found:
    """Finds the columns.

    Args:
        first: the source's first rows.
        given: the configuration's `columns`.
        most_unknown: the share of labels that may have a value of no known meaning.

    Raises:
        ConfigError: naming the field, what is there, and the remedy.
    """
    columns = _given(first, given)
    left_out = {ours for ours, theirs in given.items() if theirs is None}
    columns |= _answers(first, columns, left_out)
    _refuse_other_scores(first, columns)
    label = given.get("label")
    annotators = label.columns if isinstance(label, LabelColumn) else []
    several = tuple(annotators) if isinstance(annotators, list) else ()
    for ours in _wanted(columns, several):
        theirs = None if {ours} & (columns.keys() | left_out) else _column(first, ours, columns)
        if theirs is not None:
            columns[ours] = theirs
    if several and set(CHOSEN) <= set(columns):
        raise not_read(first, "label", "chosen and rejected say it already")
    columns = _without_doubt(first, columns, given)
    media = tuple(name for name in first.named(*MEDIA) if plain(name) not in left_out)
    media = tuple(name for name in media if name not in columns.values())
    values = LETTERS
    if several or "label" in columns:
        values = _values(first, columns, several or (columns["label"],), label, most_unknown)
    return Found(
        {ours: columns[ours] for ours in FIELDS if ours in columns}, values, several, media
    )


def _given(first: FirstRows, given: Mapping[str, str | LabelColumn | None]) -> dict[str, str]:
    """The columns that the configuration names, our field → theirs; a label's only where one."""
    columns = {}
    for ours, theirs in given.items():
        if ours not in FIELDS and not (ours in MEDIA and theirs is None):
            raise ConfigError(
                f"{first.field}.columns: {ours!r} is unknown; choose from "
                f"{', '.join(FIELDS)}; and {', '.join(MEDIA)}, which can be null alone"
            )
        if isinstance(theirs, LabelColumn) and ours != "label":
            raise ConfigError(
                f"{first.field}.columns.{ours}: a map of values is for label; name a column"
            )
        named = theirs.columns if isinstance(theirs, LabelColumn) else theirs
        for name in [named] if isinstance(named, str) else named or []:
            if not first.has(name):
                raise no_column(f"{first.field}.columns.{ours}", first, name)
        if isinstance(named, str):
            columns[ours] = named
    return columns


def _answers(first: FirstRows, given: Mapping[str, str], left_out: set[str]) -> dict[str, str]:
    """The two answers: those named, else chosen and rejected, else response_a and response_b."""
    for fields in (EITHER, CHOSEN):
        if set(fields) & set(given):
            found = {ours: given.get(ours, ours) for ours in fields}
            for ours, theirs in found.items():
                if not first.has(theirs):
                    raise no_column(f"{first.field}.columns.{ours}", first, theirs)
            return found
    for fields, tables in ((CHOSEN, _CHOSEN_NAMES), (EITHER, _EITHER_NAMES)):
        there = [] if left_out & set(fields) else _complete(first, tables)
        if there:
            own = tuple(fields) == there[0]
            _refuse_several(first, fields[0], [] if own else [", ".join(both) for both in there])
            if fields == EITHER and (more := _siblings(first, there[0])):
                raise more_answers(first, [*there[0], *more])
            return dict(zip(fields, there[0], strict=True))
    raise no_answers(first)


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
        raise could_be_several(first, ours, found)


def _wanted(columns: Mapping[str, str], annotators: Sequence[str]) -> list[str]:
    """The fields to look for beside the answers, in an order in which none takes another's."""
    rest = [ours for ours in FIELDS if ours not in (*CHOSEN, *EITHER, "prompt", "input")]
    rest = [ours for ours in rest if ours not in NUMBER_FIELDS or ours in _numbers_of(columns)]
    if annotators:
        rest = [ours for ours in rest if ours != "label" and not ours.startswith("votes_")]
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
        below = plain(columns.get("prompt", "")) == "instruction"
        return next((name for name in first.named("input") if below and name not in taken), None)
    if ours == "history" and not all(map(_could_be_turns, first.values("history"))):
        return None
    if ours in first.names and ours not in taken:
        return ours
    if ours == "label" and set(CHOSEN) <= set(columns):  # chosen says it; other names mean less
        return None
    others = [name for name in first.named(ours, *_OTHER_NAMES.get(ours, ())) if name not in taken]
    _refuse_several(first, ours, others)
    if not others and ours == "tools" and first.has("input.tools"):
        return "input.tools"
    return others[0] if others else None


def _could_be_turns(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.startswith("["))


def _prompt(first: FirstRows, taken: set[str]) -> str | None:
    if "prompt" in first.names and "prompt" not in taken:
        return "prompt"
    names = [name for name in first.named("prompt", *_PROMPTS) if name not in taken]
    if "instruction" in map(plain, names):  # Alpaca's: the input goes below it
        names = [name for name in names if plain(name) != "input"]
    talks = [name for name in first.named(*_CONVERSATIONS) if name not in taken]
    names += [name for name in talks if _holds_conversations(first, name)]
    if first.has("input.messages"):  # OpenAI's preference files
        names = ["input.messages", *(name for name in names if plain(name) != "input")]
    _refuse_several(first, "prompt", names)
    return names[0] if names else None


def _holds_conversations(first: FirstRows, name: str) -> bool:
    values = first.values(name)
    talks = sum(
        messages_in(value) is not None if isinstance(value, str) else is_conversation(value)
        for value in values
    )
    plain = sum(isinstance(value, str) for value in values)
    return 2 * max(talks, plain) > len(values)


def _without_doubt(
    first: FirstRows, columns: Mapping[str, str], given: Mapping[str, Any]
) -> dict[str, str]:
    """The columns that say something together: votes with the answers that they belong to."""
    found = dict(columns)
    if {"votes_a", "votes_b"} <= found.keys() & given.keys() and _names_chosen(found):
        found["votes_chosen"], found["votes_rejected"] = found.pop("votes_a"), found.pop("votes_b")
        given = {**given, "votes_chosen": None}
    dropped: tuple[str, ...] = ()
    if not set(CHOSEN) <= set(found):
        if "votes_a" in found or "label" not in found:  # which says which answer was chosen
            dropped = _VOTES_OF_CHOSEN
    elif "votes_chosen" in found:
        dropped = (*_VOTES_OF_EITHER, *EITHER, "label")
    elif "votes_a" not in found or not set(EITHER) <= set(found):
        dropped = (*EITHER, "label")
        if {"votes_a", "label"} <= set(found) and "votes_a" not in given:
            raise not_read(first, "votes_a", "a label beside chosen and rejected leaves open which")
    for ours in dropped:
        if ours in found and given.get(ours) is not None:
            raise not_read(first, ours, f"it says nothing beside {', '.join(found)}")
    return {ours: theirs for ours, theirs in found.items() if ours not in dropped}


def _names_chosen(columns: Mapping[str, str]) -> bool:
    """Whether the columns that are given for votes_a and votes_b say themselves whose they are."""
    return "chosen" in plain(columns["votes_a"]) and "reject" in plain(columns["votes_b"])


def _values(
    first: FirstRows,
    columns: Mapping[str, str],
    labels: Sequence[str],
    label: str | LabelColumn | None,
    most_unknown: float,
) -> ValueMap:
    """What the values of the label columns mean."""
    seen = Counter(spelled(value) for name in labels for value in first.values(name))
    given = label.values() if isinstance(label, LabelColumn) else {}
    try:
        values = mapped(given) if given else found_in(seen, *(columns[name] for name in EITHER))
    except ValueError as error:
        raise ConfigError(f"{first.field}.columns.label: {error}; give each value once") from None
    unknown = {value: count for value, count in seen.items() if value not in values.meanings}
    share = sum(unknown.values()) / max(seen.total(), 1)
    if share == 1 or share > most_unknown or (not given and counts_otherwise(seen, values)):
        raise unknown_values(first, labels, seen, values)
    counted = {printable(str(value)): count for value, count in seen.most_common()}
    blank = len(first.rows) * len(labels) - seen.total()
    return replace(values, seen=counted, blank=blank)
