r"""The cells of a row in; its prompt and its answers, two or a list's one, out.

A source's `Layout` says how its rows spell them. Three spellings are read:

- text: `prompt` and the answers are strings, kept as they are. Without a prompt column, answers
  are transcripts, cut after their last "\n\nAssistant:".
- hh: transcripts "\n\nHuman: … \n\nAssistant: …" become conversations, contents stripped.
- conversational: messages in any of the spellings of `messages`. Answers are whole conversations,
  or continue `prompt`. Strings become one user message (the prompt) and one assistant message (an
  answer).

In a conversation the prompt is all messages before the last one of each answer, which must be an
assistant message; all answers must have the same messages before it. A system column stands in
front of it all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from cwpo_dist.pairs import transcripts
from cwpo_dist.pairs.layout import Layout
from cwpo_dist.pairs.messages import MessageReader, checked
from cwpo_dist.pairs.records import Message, Text
from cwpo_dist.pairs.rejects import BadRow, Reason, shown
from cwpo_dist.pairs.written import decoded, is_turns, messages_in


class Asked(NamedTuple):
    """What a row's answers reply to, without its system column, and the answers."""

    prompt: Text
    answers: list[Text]


Cell = Callable[[str], object]  # what stands in an answer's field; BadRow where nothing does


def read_texts(
    row: Mapping[str, object], layout: Layout, reader: MessageReader, cell: Cell | None = None
) -> Asked:
    """Reads the prompt, and the answers of the layout's fields.

    Args:
        row: the row.
        layout: how its source spells a pair.
        reader: of its messages.
        cell: what stands in an answer's field; None: what the row has there.

    Raises:
        BadRow: for what is no prompt or no answer, and answers to different prompts.
    """
    cell = cell or partial(layout.present, row)
    if layout.format == "conversational":
        return _from_messages(row, layout, reader, cell)
    if layout.format == "hh":
        return _from_transcripts(row, layout, cell)
    prompt, answers = _from_text(row, layout, cell)
    if layout.kind == "text":
        return Asked(prompt, list(answers))
    return Asked([_message("user", prompt)], [[_message("assistant", each)] for each in answers])


def _from_text(row: Mapping[str, object], layout: Layout, cell: Cell) -> tuple[str, list[str]]:
    answers = [_string(cell(name), layout, name) for name in layout.answers]
    if "prompt" in layout.columns:
        return _string(_prompt(row, layout), layout, "prompt"), answers
    cuts = [transcripts.cut(text) for text in answers]
    if len({prompt for prompt, _ in cuts}) > 1:
        raise BadRow(Reason.PREFIXES)
    return cuts[0][0], [answer for _, answer in cuts]


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


def _from_transcripts(row: Mapping[str, object], layout: Layout, cell: Cell) -> Asked:
    texts = [_string(cell(name), layout, name) for name in layout.answers]
    if "prompt" in layout.columns:
        prompt = _string(_prompt(row, layout), layout, "prompt").rstrip()
        mark = transcripts.ANSWER_MARK
        prompt = prompt if prompt.endswith(mark) else prompt + mark
        texts = [text if text.startswith(prompt) else f"{prompt} {text}" for text in texts]
    return _same_context([transcripts.turns(text) for text in texts])


def _from_messages(
    row: Mapping[str, object], layout: Layout, reader: MessageReader, cell: Cell
) -> Asked:
    cells = {name: _unwritten(cell(name), layout, name) for name in layout.answers}
    asked: object = None
    if "prompt" in layout.columns:
        asked = _unwritten(_prompt(row, layout), layout, "prompt")
    if is_turns(asked):
        return _same_context([_of_turns(asked, told, name) for name, told in cells.items()])
    answers = [reader.read(told, name, "assistant") for name, told in cells.items()]
    earlier = _history(row, layout)
    if asked is None:
        return _same_context([earlier + each for each in _with_one_context(answers)])
    prompt = earlier + reader.read(asked, "prompt", "user")
    if prompt in answers:  # a column with the whole of one conversation says nothing new
        return _same_context(_with_one_context(answers))
    return _same_context([_whole(each, prompt, isinstance(asked, str)) for each in answers])


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


def _with_one_context(answers: list[list[Message]]) -> list[list[Message]]:
    """All conversations whole, where answers stand alone beside one that is."""
    whole = next((each for each in answers if len(each) > 1), None)
    if whole is None:
        return answers
    alone = [[message["role"] for message in each] == ["assistant"] for each in answers]
    return [
        whole[:-1] + each if is_alone else each
        for each, is_alone in zip(answers, alone, strict=True)
    ]


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


def with_system(prompt: Text, row: Mapping[str, object], layout: Layout) -> Text:
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


def _same_context(whole: list[list[Message]]) -> Asked:
    if any(each[-1]["role"] != "assistant" for each in whole):
        raise BadRow(Reason.NO_ASSISTANT)
    prompt = whole[0][:-1]
    if any(each[:-1] != prompt for each in whole):
        raise BadRow(Reason.PREFIXES)
    return Asked(prompt, [each[-1:] for each in whole])


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


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
