"""Conversations as people spell them become our messages, or are refused with what stood there."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cwpo_dist.pairs.messages import (
    ROLES,
    MessageReader,
    has_words,
    message_text,
    plain_text,
)
from cwpo_dist.pairs.records import MESSAGE_KEYS
from cwpo_dist.pairs.rejects import BadRow
from cwpo_dist.pairs.written import LONGEST_PYTHON, decoded, is_turns, messages_in, turns_in

ASKED = {"role": "user", "content": "Where is the tram?"}
TOLD = {"role": "assistant", "content": "Round the corner."}
CALL = {"type": "function", "function": {"name": "lines", "arguments": {"stop": "Zoo"}}}


def read(value: Any, **options: Any) -> list[dict[str, Any]]:
    return MessageReader(**options).read(value, "chosen", "assistant")


def refused(value: Any) -> str:
    with pytest.raises(BadRow) as caught:
        read(value)
    return str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        [ASKED, TOLD],
        [{"from": "human", "value": ASKED["content"]}, {"from": "gpt", "value": TOLD["content"]}],
        [
            {"role": "Human", "content": ASKED["content"]},
            {"role": "AI ", "content": TOLD["content"]},
        ],
        [{"role": "user", "value": ASKED["content"]}, {"from": "bot", "content": TOLD["content"]}],
        [{"speaker": "prompter", "text": ASKED["content"]}, TOLD],
        [json.dumps(ASKED), json.dumps(TOLD)],
        [ASKED | {"from": None, "name": None}, TOLD | {"tool_calls": None, "value": None}],
        [
            {"role": "user", "content": [{"type": "text", "text": "Where is "}, "the tram?"]},
            {"role": "assistant", "content": {"type": "text", "text": TOLD["content"]}},
        ],
    ],
)
def test_spellings_of_one_conversation(value: Any) -> None:
    assert read(value) == [ASKED, TOLD]


def test_one_message_stands_for_a_list_of_one() -> None:
    assert read(TOLD) == read({"from": "chatgpt", "value": TOLD["content"]}) == [TOLD]
    assert read("Round the corner.") == [TOLD]


@pytest.mark.parametrize(("name", "role"), list(ROLES.items()))
def test_roles_have_many_names_in_any_case(name: str, role: str) -> None:
    for spelled in (name, name.upper(), name.capitalize()):
        assert read([{"role": spelled, "content": "x"}])[0]["role"] == role


def test_a_tool_call_needs_no_content() -> None:
    for content in (None, ""):
        (message,) = read({"role": "assistant", "content": content, "tool_calls": [CALL]})
        assert message == {"role": "assistant", "content": content, "tool_calls": [CALL]}
        assert has_words([message])
    assert read({"role": "assistant", "tool_calls": [CALL]})[0]["content"] is None


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": None, "tool_calls": CALL},
        {"role": "assistant", "content": None, "tool_calls": [CALL["function"]]},
        {"role": "assistant", "content": None, "tool_calls": [json.dumps(CALL)]},
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
    ],
)
def test_spellings_of_one_tool_call(message: Any) -> None:
    assert read(message) == [{"role": "assistant", "content": None, "tool_calls": [CALL]}]


def test_arguments_stay_as_they_are_and_keep_their_order() -> None:
    text = {
        "type": "function",
        "id": "7",
        "function": {"name": "f", "arguments": '{"b": 1, "a": 2}'},
    }
    objects = {"type": "function", "function": {"name": "f", "arguments": {"b": None, "a": 2}}}
    (message,) = read({"role": "assistant", "content": "", "tool_calls": [text, objects]})
    assert message["tool_calls"] == [text, objects]
    assert list(message["tool_calls"][1]["function"]["arguments"]) == ["b", "a"]


def test_nulls_of_columnar_files_are_keys_that_are_not_there() -> None:
    call = {
        **CALL,
        "id": None,
        "function": {"name": "lines", "arguments": {"stop": "Zoo", "x": None}},
    }
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert read(message, nulls_are_absent=True)[0]["tool_calls"] == [CALL]
    assert read(message)[0]["tool_calls"] == [call]


def test_what_templates_read_stays_and_what_nothing_reads_is_named() -> None:
    reader = MessageReader()
    message = TOLD | {"reasoning_content": "It is near.", "name": "guide", "weight": 0, "id": None}
    (kept,) = reader.read([message], "chosen", "assistant")
    assert kept == TOLD | {"reasoning_content": "It is near.", "name": "guide"}
    parts = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]
    reader.read([{"role": "user", "content": parts, "from": "web"}], "prompt", "user")
    assert reader.unread == {"weight", "content.cache_control", "from"}


def test_tools_are_lists_of_functions_however_they_are_written() -> None:
    bare = {"name": "lines", "description": "Lines at a stop", "parameters": {"type": "object"}}
    wrapped = [{"type": "function", "function": bare}]
    for value in (wrapped, wrapped[0], [bare], json.dumps([bare]), [json.dumps(wrapped[0])]):
        assert MessageReader().tools(value) == wrapped
    assert MessageReader().tools([{"type": "function", **bare}]) == wrapped  # Responses API
    assert MessageReader().tools([{"type": "web_search"}]) == [{"type": "web_search"}]
    for nothing in (None, "", " ", [], "[]"):
        assert MessageReader().tools(nothing) is None
    for bad in (3, "lines", ["lines"], [{"name": 3}], [{"type": "function"}]):
        with pytest.raises(BadRow, match="bad tools: tools"):
            MessageReader().tools(bad)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "wrong type: chosen (3)"),
        ([3], "no message: chosen (3)"),
        (["hello"], "no message: chosen (null)"),
        ([{"text": "x"}], "no message: chosen (an object with text)"),
        ([{"role": "user"}], "no message: chosen (an object with role)"),
        ([{"role": "Narrator", "content": "x"}], "unknown role: chosen (role 'Narrator')"),
        ([{"from": "Zuse", "value": "x"}], "unknown role: chosen (from 'Zuse')"),
        ([{"role": "assistant", "content": None}], "no content: chosen"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "no content: chosen"),
        ([{"role": "user", "content": 3}], "not text: chosen (content: 3)"),
        ([{"role": "user", "content": [None]}], "not text: chosen (a part of the content: null)"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "image, sound or video: chosen (a part of type 'image_url')",
        ),
        ([TOLD | {"name": 3}], "not text: chosen (name: 3)"),
        ([TOLD | {"tool_calls": "none"}], "bad tools: chosen ('none')"),
        ([TOLD | {"tool_calls": [{"id": 3}]}], "bad tools: chosen (an object with id)"),
        ([TOLD | {"tool_calls": [CALL | {"x": b"y"}]}], "wrong type: chosen (an object with"),
        ([TOLD | {"content": "\ud800"}], "invalid Unicode: chosen"),
        ([TOLD | {"name": "\ud800"}], "invalid Unicode: chosen"),
    ],
)
def test_what_is_no_message_says_what_was_found(value: Any, said: str) -> None:
    assert refused(value).startswith(said)


def test_a_message_in_words() -> None:
    assert plain_text([ASKED, TOLD]) == "Where is the tram?\n\nRound the corner."
    spoken = {"role": "assistant", "content": "One moment.", "tool_calls": [CALL]}
    assert message_text(spoken) == "One moment.\n" + json.dumps([CALL])
    assert message_text(spoken | {"content": None}) == json.dumps([CALL])
    assert has_words([TOLD | {"content": "", "reasoning_content": "hm"}])
    assert not has_words([TOLD | {"content": " "}])


# -- messages written as text

CONVERSATION = [{"role": "user", "content": 'It\'s "8"?\n[x] {y}'}, TOLD]


def spelled_by(program: str) -> str:
    if program == "json":
        return json.dumps(CONVERSATION)
    if program == "python":
        return str(CONVERSATION)
    array = np.array(CONVERSATION, dtype=object)
    return str(array) if program == "numpy" else repr(array)


@pytest.mark.parametrize("program", ["json", "python", "numpy", "numpy repr"])
def test_messages_written_as_text_are_read(program: str) -> None:
    assert decoded(spelled_by(program)) == CONVERSATION
    assert messages_in(spelled_by(program)) == CONVERSATION


def test_what_pandas_writes_of_a_parquet_file_is_read(tmp_path: Path) -> None:
    pd.DataFrame({"chosen": [CONVERSATION, [ASKED, TOLD]]}).to_parquet(tmp_path / "x.parquet")
    frame = pd.read_parquet(tmp_path / "x.parquet")
    text = pd.read_csv(_csv(frame, tmp_path / "x.csv"))["chosen"]
    assert [messages_in(each) for each in text] == [CONVERSATION, [ASKED, TOLD]]


def _csv(frame: pd.DataFrame, path: Path) -> Path:
    frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "[1, 2]",
        '{"a": 1}',
        '{"role": "user"}',
        '[{"role": "user", "content": "cut',
        "[x for x in 'role']",
        "__import__('os').system('true')  # role",
        '{"role"',
        "array([1, 2])",
        "[" * 100_000 + '"role"',
        "{[1]: 'role'}",
        "",
    ],
)
def test_text_that_spells_no_messages(text: str) -> None:
    assert messages_in(text) is None


def test_pythons_parser_is_given_no_huge_text() -> None:
    long = str([{"role": "user", "content": "x" * LONGEST_PYTHON}])
    with pytest.raises(ValueError, match="letters that are not JSON"):
        decoded(long)
    assert decoded(long.replace("'", '"'))[0]["role"] == "user"


PARTS = [{"type": "text", "text": "Where is "}, {"type": "text", "text": "the tram?"}]


@pytest.mark.parametrize("spell", [json.dumps, str])
def test_parts_written_as_text_are_a_content(spell: Any) -> None:
    assert messages_in(spell(PARTS)) == PARTS
    whole = [{"role": "user", "content": "Where is the tram?"}]
    assert read([{"role": "user", "content": spell(PARTS)}]) == whole
    assert MessageReader().read(PARTS, "prompt", "user") == whole
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert "image, sound or video" in refused([{"role": "user", "content": spell(image)}])
    for text in ('[{"type": "circle", "text": "x"}]', '[{"type": "text"}]', '["type"]', "[type] x"):
        assert messages_in(text) is None
        assert read([{"role": "user", "content": text}])[0]["content"] == text


def test_lists_of_turns() -> None:
    assert turns_in('["one", "two"]') == ["one", "two"]
    assert turns_in("['one']") == ["one"]
    for text in ("one", "[]", "[1]", '["one", null]', '[{"role": "user", "content": "x"}]', "[one"):
        assert turns_in(text) is None
    assert not is_turns([json.dumps(TOLD)])


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
def test_all_keys_that_known_templates_read_are_kept() -> None:
    """What the templates that trl ships ask of a message: none of it may be left out."""
    folder = Path(str(find_spec("trl").submodule_search_locations[0])) / "chat_templates"
    name = "(?:loop_)?message|msg|m"
    asked = re.compile(rf"""\b(?:{name})(?:\.get\(["']|\[["']|\.)([a-z_]+)""")
    inside = re.compile(rf"""["']([a-z_]+)["'] in (?:{name})\b""")
    texts = [path.read_text() for path in folder.glob("*.jinja")]
    assert len(texts) > 40
    found = {key for text in texts for pattern in (asked, inside) for key in pattern.findall(text)}
    assert {"tool_calls", "reasoning_content", "thinking"} <= found
    parts = {"type", "text"}
    assert found - {"role", "content", "get", "jinja"} - parts <= set(MESSAGE_KEYS)
