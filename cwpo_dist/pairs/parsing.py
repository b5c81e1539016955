r"""One raw row in, one pair (prompt, two answers, label, votes) out, or the reason why not.

A source's `Layout` says how its rows spell a pair. Three spellings are read:

- text: `prompt` and both answers are strings, kept as they are. Without a prompt column, answers
  are transcripts, cut after their last "\n\nAssistant:".
- hh: transcripts "\n\nHuman: … \n\nAssistant: …" become conversations, contents stripped.
- conversational: lists of {role, content}. Answers are whole conversations, or continue `prompt`.
  Strings become one user message (the prompt) and one assistant message (an answer).

In a conversation the prompt is all messages before the last one of each answer, which must be an
assistant message; both answers must have the same messages before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, time
from decimal import Decimal
from functools import cached_property, partial
from math import isfinite
from typing import Any, Literal

from cwpo_dist.pairs.numbers import NO_NUMBERS, NUMBER_FIELDS, Numbers, own_numbers
from cwpo_dist.pairs.records import Kind, canonical
from cwpo_dist.pairs.rejects import BadRow, Reason

Format = Literal["text", "conversational", "hh"]
Message = dict[str, str]
Text = str | list[Message]

FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "response_a",
    "response_b",
    "label",
    "votes_a",
    "votes_b",
    *NUMBER_FIELDS,
)
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
MAX_VOTES = 1_000_000

_ANSWER_MARK = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_WHOLE = re.compile(r"-?\d+\.0+", re.ASCII)
_TURN_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Layout:
    """How the rows of one source spell a pair.

    Attributes:
        columns: our field → their column, for each field the source has.
        format: what prompts and answers are.
        kind: what the run's pairs are; text rows of a conversational run become messages.
        group: the column whose value decides the split; None: the prompt decides.
        keep: columns that are carried along.
    """

    columns: Mapping[str, str]
    format: Format
    kind: Kind
    group: str | None = None
    keep: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, str]:
        """The fields of the two answers: chosen and rejected, or response_a and response_b."""
        return answer_fields(self.columns)

    @property
    def needed(self) -> set[str]:
        """Their columns that parsing reads."""
        return {*self.columns.values(), *self.keep, *([self.group] if self.group else [])}

    @cached_property
    def has_numbers(self) -> bool:
        """Whether any of its columns holds a pair's own numbers."""
        return not self.columns.keys().isdisjoint(NUMBER_FIELDS)

    def value(self, row: Mapping[str, Any], name: str) -> Any:
        """What stands in a field; null where the source has no such field."""
        return row.get(self.columns[name]) if name in self.columns else None


@dataclass(frozen=True)
class ParsedPair:
    """A pair in its source's order; votes_first are the votes for the first answer."""

    prompt: Text
    first: Text
    second: Text
    label: Literal["first", "second"] | None
    votes_first: int | None = None
    votes_second: int | None = None
    numbers: Numbers = NO_NUMBERS
    group: str | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)


def answer_fields(columns: Mapping[str, str]) -> tuple[str, str]:
    """The pair of answer fields that a source has; chosen/rejected where it has both."""
    both = "chosen" in columns and "rejected" in columns
    return ("chosen", "rejected") if both else ("response_a", "response_b")


def is_transcript(value: Any) -> bool:
    """True for a string in the spelling of HH transcripts."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and _ANSWER_MARK in value


def parse(row: Any, layout: Layout) -> ParsedPair:
    """Reads one row.

    Raises:
        BadRow: with the reason and the field at fault.
    """
    if not isinstance(row, Mapping):
        raise BadRow(Reason.NOT_MAPPING)
    prompt, first, second = _texts(row, layout)
    _refuse_empty(prompt, first, second, layout)
    return ParsedPair(
        prompt,
        first,
        second,
        _label(row, layout),
        *_votes(row, layout),
        numbers=_numbers(row, layout),
        group=_group(row, layout),
        kept={name: _kept(row.get(name), name) for name in layout.keep},
    )


def _texts(row: Mapping[str, Any], layout: Layout) -> tuple[Text, Text, Text]:
    if layout.format == "conversational":
        return _from_messages(row, layout)
    if layout.format == "hh":
        return _from_transcripts(row, layout)
    prompt, first, second = _from_text(row, layout)
    if layout.kind == "text":
        return prompt, first, second
    return [_message("user", prompt)], *_replies(first, second)


def _from_text(row: Mapping[str, Any], layout: Layout) -> tuple[str, str, str]:
    first, second = (_string(row, layout, name) for name in layout.answers)
    if "prompt" in layout.columns:
        return _string(row, layout, "prompt"), first, second
    prompts, answers = zip(*(_cut(text) for text in (first, second)), strict=True)
    if prompts[0] != prompts[1]:
        raise BadRow(Reason.PREFIXES)
    return prompts[0], answers[0], answers[1]


def _cut(transcript: str) -> tuple[str, str]:
    """Prompt (with the mark at its end) and answer of a transcript that stays text."""
    prompt, mark, answer = transcript.rpartition(_ANSWER_MARK)
    if not mark or _TURN.search(answer):
        raise BadRow(Reason.NO_ASSISTANT)
    return prompt + mark, answer


def _from_transcripts(row: Mapping[str, Any], layout: Layout) -> tuple[Text, Text, Text]:
    texts = [_string(row, layout, name) for name in layout.answers]
    if "prompt" in layout.columns:
        prompt = _string(row, layout, "prompt").rstrip()
        prompt = prompt if prompt.endswith(_ANSWER_MARK) else prompt + _ANSWER_MARK
        texts = [text if text.startswith(prompt) else f"{prompt} {text}" for text in texts]
    first, second = (_turns(text) for text in texts)
    return _same_context(first, second)


def _turns(transcript: str) -> list[Message]:
    start, *parts = _TURN.split("\n\n" + transcript.lstrip())
    if start.strip() or not parts:
        raise BadRow(Reason.NOT_TRANSCRIPT)
    return [
        _message(_TURN_ROLES[speaker], content.strip())
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _from_messages(row: Mapping[str, Any], layout: Layout) -> tuple[Text, Text, Text]:
    prompt = _messages(row, layout, "prompt", "user") if "prompt" in layout.columns else None
    whole = (_whole(row, layout, name, prompt) for name in layout.answers)
    return _same_context(*whole)


def _whole(
    row: Mapping[str, Any], layout: Layout, name: str, prompt: list[Message] | None
) -> list[Message]:
    """The whole conversation that ends in the answer `name`."""
    answer = _messages(row, layout, name, "assistant")
    if prompt is None or answer[: len(prompt)] == prompt:
        return answer
    if isinstance(row[layout.columns["prompt"]], str) and answer[0]["role"] != "assistant":
        # Beside whole conversations, a prompt given as text is one of their messages, repeated.
        if prompt[0]["content"] not in [message["content"] for message in answer[:-1]]:
            raise BadRow(Reason.PREFIXES)
        return answer
    return prompt + answer


def _same_context(first: list[Message], second: list[Message]) -> tuple[Text, Text, Text]:
    if first[-1]["role"] != "assistant" or second[-1]["role"] != "assistant":
        raise BadRow(Reason.NO_ASSISTANT)
    if first[:-1] != second[:-1]:
        raise BadRow(Reason.PREFIXES)
    return first[:-1], first[-1:], second[-1:]


def _messages(row: Mapping[str, Any], layout: Layout, name: str, role: str) -> list[Message]:
    """A message list; a string becomes one message of `role`."""
    value = _present(row, layout, name)
    if isinstance(value, str):
        return [_message(role, _checked(value, name))]
    if not isinstance(value, list) or not all(_is_message(item) for item in value):
        raise BadRow(Reason.TYPE, name)
    if not value:
        raise BadRow(Reason.EMPTY_PROMPT) if name == "prompt" else BadRow(Reason.EMPTY_ANSWER, name)
    return [_message(item["role"], _checked(item["content"], name)) for item in value]


def _is_message(item: Any) -> bool:
    if not isinstance(item, Mapping) or not isinstance(item.get("content"), str):
        return False
    role = item.get("role")
    return isinstance(role, str) and role in ROLES


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _replies(first: str, second: str) -> tuple[Text, Text]:
    return [_message("assistant", first)], [_message("assistant", second)]


def _present(row: Mapping[str, Any], layout: Layout, name: str) -> Any:
    value = row.get(layout.columns[name])
    if value is None:
        raise BadRow(Reason.MISSING, name)
    return value


def _string(row: Mapping[str, Any], layout: Layout, name: str) -> str:
    value = _present(row, layout, name)
    if not isinstance(value, str):
        raise BadRow(Reason.TYPE, name)
    return _checked(value, name)


def _checked(text: str, name: str) -> str:
    """The text, unless no file could hold it (JSON can spell lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(Reason.UNICODE, name) from None
    return text


def _refuse_empty(prompt: Text, first: Text, second: Text, layout: Layout) -> None:
    if not _has_words(prompt):
        raise BadRow(Reason.EMPTY_PROMPT)
    for name, answer in zip(layout.answers, (first, second), strict=True):
        if not _has_words(answer):
            raise BadRow(Reason.EMPTY_ANSWER, name)
    if canonical(first) == canonical(second):
        raise BadRow(Reason.IDENTICAL)


def _has_words(text: Text) -> bool:
    contents = [text] if isinstance(text, str) else [message["content"] for message in text]
    return any(content.strip() for content in contents)


def _label(row: Mapping[str, Any], layout: Layout) -> Literal["first", "second"] | None:
    if layout.answers == ("chosen", "rejected"):
        return "first"
    value = _optional(row, layout, "label")
    if value is None:
        return None
    if value not in ("a", "b"):
        raise BadRow(Reason.LABEL)
    return "first" if value == "a" else "second"


def _votes(row: Mapping[str, Any], layout: Layout) -> tuple[int | None, int | None]:
    """Votes for (chosen or response_a, rejected or response_b)."""
    votes = [_count(_optional(row, layout, name), name) for name in ("votes_a", "votes_b")]
    if votes.count(None) == 1:
        raise BadRow(Reason.VOTES, "votes_a" if votes[0] is None else "votes_b")
    return votes[0], votes[1]


def _numbers(row: Mapping[str, Any], layout: Layout) -> Numbers:
    if not layout.has_numbers:  # as most data are
        return NO_NUMBERS
    return own_numbers(partial(layout.value, row), layout.answers)


def _optional(row: Mapping[str, Any], layout: Layout, name: str) -> Any:
    """The field's value; what CSV and data frames write for null counts as null."""
    value = layout.value(row, name)
    is_nan = isinstance(value, float) and value != value
    return None if value == "" or is_nan else value


def _count(value: Any, name: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not whole or not 0 <= value <= MAX_VOTES:
        raise BadRow(Reason.VOTES, name)
    return int(value)


def _group(row: Mapping[str, Any], layout: Layout) -> str | None:
    if layout.group is None:
        return None
    value = row.get(layout.group)
    if value is None or value == "" or value != value:  # as CSV and data frames write null
        raise BadRow(Reason.MISSING, layout.group)
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise BadRow(Reason.TYPE, layout.group)
    return _group_name(_checked(value, layout.group) if isinstance(value, str) else value)


def _group_name(value: str | int | float | Decimal) -> str:
    """One name for one number: 3 in JSON, 3.0 in a data frame with gaps, either as text in CSV."""
    if isinstance(value, str):
        return value.partition(".")[0] if _WHOLE.fullmatch(value) else value
    whole = isinstance(value, float | Decimal) and isfinite(value) and value == int(value)
    return str(int(value)) if whole else str(value)


def _kept(value: Any, name: str) -> Any:
    """A kept value as JSON has it; dates and decimals by their usual spelling."""
    try:
        text = json.dumps(value, default=_spelled, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(Reason.UNICODE, name) from None
    except (TypeError, ValueError, RecursionError):
        raise BadRow(Reason.TYPE, name) from None
    return json.loads(text)


def _spelled(value: Any) -> str:
    if isinstance(value, date | datetime | time | Decimal):
        return str(value)
    raise TypeError(type(value).__name__)
