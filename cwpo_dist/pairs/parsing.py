r"""One raw row in, one pair (prompt, two answers, label, votes) out, or the reason why not.

A source's `Layout` says how its rows spell a pair. Three spellings are read:

- text: `prompt` and both answers are strings, kept as they are. Without a prompt column, answers
  are transcripts, cut after their last "\n\nAssistant:".
- hh: transcripts "\n\nHuman: … \n\nAssistant: …" become conversations, contents stripped.
- conversational: messages in any of the spellings of `messages`. Answers are whole conversations,
  or continue `prompt`. Strings become one user message (the prompt) and one assistant message (an
  answer).

In a conversation the prompt is all messages before the last one of each answer, which must be an
assistant message; both answers must have the same messages before it. A system column stands in
front of it all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from math import isfinite
from typing import Literal

from cwpo_dist.pairs import transcripts
from cwpo_dist.pairs.judging import judged
from cwpo_dist.pairs.layout import Layout
from cwpo_dist.pairs.messages import MessageReader, as_json, checked, has_words
from cwpo_dist.pairs.numbers import NO_NUMBERS, Numbers, own_numbers
from cwpo_dist.pairs.records import Message, Text, Tools
from cwpo_dist.pairs.rejects import BadRow, Reason, shown
from cwpo_dist.pairs.written import decoded, is_turns, messages_in

_WHOLE = re.compile(r"-?\d+\.0+", re.ASCII)


@dataclass(frozen=True)
class ParsedPair:
    """A pair in its source's order.

    Attributes:
        prompt: text or messages, as the answers are.
        first: chosen, or response_a.
        second: rejected, or response_b.
        label: the better one, a tie, or None where nobody said.
        votes_first: for the first answer; None where nobody counted.
        votes_second: for the second.
        votes_tie: for neither.
        tools: what the conversation could call.
        group: what decides the split in place of the prompt.
        kept: the columns that are carried along.
        unread: what its messages hold and nothing reads.
    """

    prompt: Text
    first: Text
    second: Text
    label: Literal["first", "second", "tie"] | None
    votes_first: int | None = None
    votes_second: int | None = None
    votes_tie: int | None = None
    numbers: Numbers = NO_NUMBERS
    tools: Tools | None = None
    group: str | None = None
    kept: Mapping[str, object] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()

    @property
    def voted_against(self) -> bool:
        """Whether more people voted for the other answer than for the one that the label names."""
        a, b = self.votes_first or 0, self.votes_second or 0
        return (self.label == "first" and b > a) or (self.label == "second" and a > b)


def parse(row: object, layout: Layout) -> ParsedPair:
    """Reads one row.

    Raises:
        BadRow: with the reason and the field at fault, and what was found there.
    """
    if not isinstance(row, Mapping):
        raise BadRow(Reason.NOT_MAPPING)
    for name in layout.media:
        if row.get(name) not in (None, "", []):
            raise BadRow(Reason.MEDIA, name)
    reader = MessageReader(nulls_are_absent=layout.nulls_are_absent)
    prompt, first, second = _texts(row, layout, reader)
    _refuse_empty(prompt, first, second, layout)
    verdict = judged(row, layout, lambda: _turned(row, layout, reader, (first, second)))
    return ParsedPair(
        _with_system(prompt, row, layout),
        first,
        second,
        verdict.label,
        verdict.votes_first,
        verdict.votes_second,
        verdict.votes_tie,
        numbers=_numbers(row, layout),
        tools=reader.tools(layout.optional(row, "tools")) if "tools" in layout.columns else None,
        group=_group(row, layout),
        kept={name: as_json(row.get(name), name) for name in layout.kept},
        unread=frozenset(reader.unread),
    )


def _texts(
    row: Mapping[str, object], layout: Layout, reader: MessageReader
) -> tuple[Text, Text, Text]:
    if layout.format == "conversational":
        return _from_messages(row, layout, reader)
    if layout.format == "hh":
        return _from_transcripts(row, layout)
    prompt, first, second = _from_text(row, layout)
    if layout.kind == "text":
        return prompt, first, second
    return [_message("user", prompt)], *_replies(first, second)


def _from_text(row: Mapping[str, object], layout: Layout) -> tuple[str, str, str]:
    first, second = (_string(layout.present(row, name), layout, name) for name in layout.answers)
    if "prompt" in layout.columns:
        return _string(_prompt(row, layout), layout, "prompt"), first, second
    prompts, answers = zip(*(transcripts.cut(text) for text in (first, second)), strict=True)
    if prompts[0] != prompts[1]:
        raise BadRow(Reason.PREFIXES)
    return prompts[0], answers[0], answers[1]


def _prompt(row: Mapping[str, object], layout: Layout) -> object:
    """What stands in the prompt's column; an input, where there is one, below the instruction."""
    more = layout.optional(row, "input")
    if more is None:
        return layout.present(row, "prompt")
    if not isinstance(more, str):
        raise BadRow(Reason.TYPE, "input", shown(more))
    value = layout.optional(row, "prompt")
    if value is None:
        return more
    if not isinstance(value, str):
        raise BadRow(Reason.TYPE, "prompt", shown(value))
    return f"{value}\n{more}"


def _from_transcripts(row: Mapping[str, object], layout: Layout) -> tuple[Text, Text, Text]:
    texts = [_string(layout.present(row, name), layout, name) for name in layout.answers]
    if "prompt" in layout.columns:
        prompt = _string(_prompt(row, layout), layout, "prompt").rstrip()
        mark = transcripts.ANSWER_MARK
        prompt = prompt if prompt.endswith(mark) else prompt + mark
        texts = [text if text.startswith(prompt) else f"{prompt} {text}" for text in texts]
    first, second = (transcripts.turns(text) for text in texts)
    return _same_context(first, second)


def _from_messages(
    row: Mapping[str, object], layout: Layout, reader: MessageReader
) -> tuple[Text, Text, Text]:
    cells = {name: _unwritten(layout.present(row, name), layout, name) for name in layout.answers}
    asked: object = None
    if "prompt" in layout.columns:
        asked = _unwritten(_prompt(row, layout), layout, "prompt")
    if is_turns(asked):
        return _same_context(*(_of_turns(asked, cells[name], name) for name in layout.answers))
    first, second = (reader.read(cells[name], name, "assistant") for name in layout.answers)
    earlier = _history(row, layout)
    if asked is None:
        return _same_context(*(earlier + each for each in _with_one_context(first, second)))
    prompt = earlier + reader.read(asked, "prompt", "user")
    if prompt in (first, second):  # a column with the whole of one conversation says nothing new
        return _same_context(*_with_one_context(first, second))
    whole = (_whole(each, prompt, isinstance(asked, str)) for each in (first, second))
    return _same_context(*whole)


def _whole(answer: list[Message], prompt: list[Message], as_text: bool) -> list[Message]:
    """The whole conversation that ends in an answer."""
    if answer[: len(prompt)] == prompt:
        return answer
    if as_text and answer[0]["role"] != "assistant":
        # Beside whole conversations, a prompt given as text is one of their messages, repeated.
        if prompt[-1]["content"] not in [message["content"] for message in answer[:-1]]:
            raise BadRow(Reason.PREFIXES)
        return answer
    return prompt + answer


def _with_one_context(
    first: list[Message], second: list[Message]
) -> tuple[list[Message], list[Message]]:
    """Both conversations whole, where one answer stands alone beside the other's."""
    if len(first) > 1 and [each["role"] for each in second] == ["assistant"]:
        return first, first[:-1] + second
    if len(second) > 1 and [each["role"] for each in first] == ["assistant"]:
        return second[:-1] + first, second
    return first, second


def _of_turns(asked: list[str], told: object, name: str) -> list[Message]:
    """The conversation of questions and answers that stand in two lists."""
    told = [told] if isinstance(told, str) else told
    if not is_turns(told) or len(told) != len(asked):
        raise BadRow(Reason.TYPE, name, f"{shown(told)} beside {len(asked)} turns of the prompt")
    return _exchanges(zip(asked, told, strict=True), name)


def _history(row: Mapping[str, object], layout: Layout) -> list[Message]:
    """Earlier turns of the conversation, pairs of question and answer."""
    turns = layout.optional(row, "history") or []
    if isinstance(turns, str):
        turns = _decoded(turns, "history")
    if not isinstance(turns, list) or not all(map(_is_exchange, turns)):
        raise BadRow(Reason.TYPE, "history", shown(turns))
    return _exchanges(turns, "history")


def _is_exchange(turn: object) -> bool:
    if not isinstance(turn, list) or len(turn) != 2:
        return False
    return all(isinstance(text, str) for text in turn)


def _exchanges(turns: Iterable[Sequence[str]], name: str) -> list[Message]:
    """The messages of questions and their answers."""
    return [
        _message(role, checked(text, name))
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _with_system(prompt: Text, row: Mapping[str, object], layout: Layout) -> Text:
    """The prompt behind what its system column says."""
    said = layout.optional(row, "system")
    if said is None:
        return prompt
    if not isinstance(said, str):
        raise BadRow(Reason.TYPE, "system", shown(said))
    assert isinstance(prompt, list), "a source with a system column is conversational"
    system = _message("system", checked(said, "system"))
    if prompt[0]["role"] not in ("system", "developer"):
        return [system, *prompt]
    if prompt[0]["content"] != said:
        raise BadRow(Reason.SYSTEMS)
    return prompt


def _same_context(first: list[Message], second: list[Message]) -> tuple[Text, Text, Text]:
    if first[-1]["role"] != "assistant" or second[-1]["role"] != "assistant":
        raise BadRow(Reason.NO_ASSISTANT)
    if first[:-1] != second[:-1]:
        raise BadRow(Reason.PREFIXES)
    return first[:-1], first[-1:], second[-1:]


def _turned(
    row: Mapping[str, object], layout: Layout, reader: MessageReader, chosen: tuple[Text, Text]
) -> bool:
    """Whether the chosen answer is response_b.

    Raises:
        BadRow: where the two spellings are not of the same two answers.
    """
    _, a, b = _texts(row, layout.as_either, reader)
    if (a, b) == chosen:
        return False
    if (b, a) == chosen:
        return True
    raise BadRow(Reason.WHOSE, found="chosen and rejected are not response_a and response_b")


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _replies(first: str, second: str) -> tuple[Text, Text]:
    return [_message("assistant", first)], [_message("assistant", second)]


def _unwritten(value: object, layout: Layout, name: str) -> object:
    """A cell with the messages that its column writes as text; other text stays what it is."""
    if not isinstance(value, str):
        return value
    if name in layout.written:
        return _decoded(value, name)
    return _plain(value, layout, name)


def _decoded(value: str, name: str) -> object:
    try:
        return decoded(value)
    except ValueError:
        raise BadRow(Reason.UNREADABLE, name, shown(value)) from None


def _plain(text: str, layout: Layout, name: str) -> str:
    """Text that is no message list: whose column is of text may not hide one."""
    if not layout.as_text and messages_in(text) is not None:
        raise BadRow(Reason.WRITTEN, name)
    return text


def _string(value: object, layout: Layout, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(Reason.TYPE, name, shown(value))
    return checked(_plain(value, layout, name), name)


def _refuse_empty(prompt: Text, first: Text, second: Text, layout: Layout) -> None:
    if not has_words(prompt):
        raise BadRow(Reason.EMPTY_PROMPT)
    for name, answer in zip(layout.answers, (first, second), strict=True):
        if not has_words(answer):
            raise BadRow(Reason.EMPTY_ANSWER, name)
    if first == second:
        raise BadRow(Reason.IDENTICAL)


def _numbers(row: Mapping[str, object], layout: Layout) -> Numbers:
    if not layout.has_numbers:  # as most data are
        return NO_NUMBERS
    return own_numbers(partial(layout.value, row), layout.answers)


def _group(row: Mapping[str, object], layout: Layout) -> str | None:
    if layout.group is None:
        return None
    value = row.get(layout.group)
    if value is None or value == "" or value != value:  # as CSV and data frames write null
        raise BadRow(Reason.MISSING, layout.group)
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise BadRow(Reason.TYPE, layout.group)
    return _group_name(checked(value, layout.group) if isinstance(value, str) else value)


def _group_name(value: str | int | float | Decimal) -> str:
    """One name for one number: 3 in JSON, 3.0 in a data frame with gaps, either as text in CSV."""
    if isinstance(value, str):
        return value.partition(".")[0] if _WHOLE.fullmatch(value) else value
    whole = isinstance(value, float | Decimal) and isfinite(value) and value == int(value)
    return str(int(value)) if whole else str(value)
