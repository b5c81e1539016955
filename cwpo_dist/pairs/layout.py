"""How the rows of one source spell a pair: which of our fields is which of its columns, and how."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from cwpo_dist.config import Pairing
from cwpo_dist.pairs.numbers import NUMBER_FIELDS
from cwpo_dist.pairs.records import Kind
from cwpo_dist.pairs.rejects import BadRow, Reason
from cwpo_dist.pairs.verdicts import LETTERS, ValueMap

Format = Literal["text", "conversational", "hh"]
EACH = "*"  # the step of a path into all items of a list

CHOSEN, EITHER = ("chosen", "rejected"), ("response_a", "response_b")
LISTS = ("responses", "scores", "ranks")  # a prompt's responses, and how good each is
ALONE = ("response", "score", "rank")  # the same of one response, in a row of its own
FIELDS = (
    "system",
    "tools",
    "history",
    "prompt",
    "input",
    *CHOSEN,
    *EITHER,
    *LISTS,
    *ALONE,
    "label",
    "votes_a",
    "votes_b",
    "votes_chosen",
    "votes_rejected",
    "votes_tie",
    *NUMBER_FIELDS,
)
TEXTS = ("prompt", *CHOSEN, *EITHER, "responses", "response")


@dataclass(frozen=True)
class Layout:
    """How the rows of one source spell a pair.

    Attributes:
        columns: our field → their column, for each field the source has; `a.b.0` is item 0 of `b`
            in column `a`, and `a.*.b` the list of the `b` of all its items.
        format: what prompts and answers are.
        kind: what the run's pairs are; text rows of a conversational run become messages.
        group: the column whose value decides the split; None: the prompt decides.
        kept: columns that are carried along.
        values: what the values of labels mean.
        annotators: columns with a label of one annotator each, in place of `label`.
        written: the fields whose cells hold messages, or lists of turns, as text.
        media: columns of images, sound or video: a row with a value there is no pair of texts.
        nulls_are_absent: whether a null inside tools stands for a key that is not there.
        as_text: whether text that spells messages is text all the same.
        pairing: which responses of a prompt are compared; given: none, but for rows of pairs.
        late: columns that the configuration names and the first rows lack; others may have them.
        missed: names under which a field would have been read, had the first rows had it, and the
            field.
    """

    columns: Mapping[str, str]
    format: Format
    kind: Kind
    group: str | None = None
    kept: tuple[str, ...] = ()
    values: ValueMap = LETTERS
    annotators: tuple[str, ...] = ()
    written: frozenset[str] = field(default_factory=frozenset)
    media: tuple[str, ...] = ()
    nulls_are_absent: bool = False
    as_text: bool = False
    pairing: Pairing = "given"
    late: tuple[str, ...] = ()
    missed: Mapping[str, str] = field(default_factory=dict)

    @property
    def answers(self) -> tuple[str, ...]:
        """The fields of the answers: chosen and rejected, response_a and response_b, or one."""
        return answer_fields(self.columns)

    @property
    def rated_by(self) -> str | None:
        """The field that says how good responses are, of a list or of a row each."""
        return next((name for name in (*LISTS[1:], *ALONE[1:]) if name in self.columns), None)

    @property
    def needed(self) -> set[str]:
        """Their columns that parsing reads."""
        return {name for path in self.paths for name in (path, path.partition(".")[0])}

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """What parsing reads, as `columns` spells it."""
        group = [self.group] if self.group else []
        return (*self.columns.values(), *self.annotators, *self.media, *self.kept, *group)

    @cached_property
    def has_numbers(self) -> bool:
        """Whether any of its columns holds a pair's own numbers."""
        return not self.columns.keys().isdisjoint(NUMBER_FIELDS)

    @cached_property
    def as_either(self) -> Layout:
        """The same rows, their answers read from response_a and response_b."""
        others = {ours: theirs for ours, theirs in self.columns.items() if ours not in CHOSEN}
        return replace(self, columns=others)

    def value(self, row: Mapping[str, object], name: str) -> object:
        """What stands in a field; null where the source has no such field."""
        return cell(row, self.columns[name]) if name in self.columns else None

    def present(self, row: Mapping[str, object], name: str) -> object:
        """What stands in a field.

        Raises:
            BadRow: for a null.
        """
        value = self.value(row, name)
        if value is None:
            raise BadRow(Reason.MISSING, name)
        return value

    def optional(self, row: Mapping[str, object], name: str) -> object:
        """What stands in a field; what CSV and data frames write for null counts as null."""
        return not_null(self.value(row, name))

    def described(self) -> str:
        """What is read where, for people."""
        read = dict(self.columns)
        if self.annotators:
            read["label"] = ", ".join(self.annotators)
        named = [ours if ours == theirs else f"{ours} ← {theirs}" for ours, theirs in read.items()]
        each = f"votes of {len(self.annotators)} columns" if self.annotators else "labels"
        meanings = f"; {each}: {self.values}" if "label" in read else ""
        pairs = f"; pairs: {self.pairing}" if {"responses", "response"} & read.keys() else ""
        return f"{', '.join(named)}; format {self.format}{meanings}{pairs}"


def answer_fields(columns: Mapping[str, str]) -> tuple[str, ...]:
    """The fields of answers that a source has; chosen/rejected where it has both."""
    for one in ("responses", "response"):
        if one in columns:
            return (one,)
    return CHOSEN if set(CHOSEN) <= set(columns) else EITHER


def not_null(value: object) -> object:
    """The value; None for what CSV and data frames write for null."""
    is_nan = isinstance(value, float) and value != value
    return None if is_nan or (isinstance(value, str) and not value.strip()) else value


def cell(row: Mapping[str, object], path: str) -> object:
    """What a row holds under a column's name, or under a dotted path into a nested one."""
    if path in row or "." not in path:
        return row.get(path)
    return _inside(row, path.split("."))


def _nested(value: object) -> object:
    """What a nested column holds, where it is written as JSON too; None for other text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _inside(value: object, steps: Sequence[str]) -> object:
    for at, step in enumerate(steps):
        value = _nested(value)
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step == EACH:
            return [_inside(item, steps[at + 1 :]) for item in value]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value
