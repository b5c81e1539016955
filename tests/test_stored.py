"""Messages, tool calls and tools go through Arrow and come out as they were, for us and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwpo_dist.pairs.preferences import Preference, preference_schema, product_table
from cwpo_dist.pairs.records import MESSAGES, TEXT_KEYS, pair_id, prompt_id
from cwpo_dist.pairs.stored import Pair, pair_table, pairs_of, whole_schema

TEXT = st.text(max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": st.none() | TEXT},
    optional={
        **{key: TEXT for key in TEXT_KEYS},
        "tool_calls": st.lists(st.fixed_dictionaries({"function": JSON}), min_size=1, max_size=2),
    },
)
TALK = st.lists(MESSAGE, min_size=1, max_size=3)
TOOLS = st.none() | st.lists(st.dictionaries(TEXT, JSON), min_size=1, max_size=2)


@given(prompt=TALK | TEXT, tools=TOOLS, answer=st.data())
def test_pairs_come_back_as_they_were(prompt: Any, tools: Any, answer: Any) -> None:
    kind: Any = "text" if isinstance(prompt, str) else "conversational"
    answers = [answer.draw(TEXT if kind == "text" else TALK) for _ in "ab"]
    pair = Pair(pair_id(prompt_id(prompt, tools), *answers), prompt, *answers, tools)
    (back,) = pairs_of(pair_table([pair], whole_schema(kind)))
    assert back == pair
    assert pair_id(prompt_id(back.prompt, back.tools), *back.answers) == pair.pair_id


def test_a_pairs_identity_is_all_of_its_content() -> None:
    ask, a, b = ([{"role": role, "content": "x"}] for role in ("user", "assistant", "assistant"))
    b = [b[0] | {"content": "y"}]
    call = [{"type": "function", "function": {"name": "f"}}]
    plain = pair_id(prompt_id(ask), a, b)
    assert plain == pair_id(prompt_id(ask), b, a) == "690822119a28a7fd29d3a14710a4fff2"  # for ever
    others = [
        pair_id(prompt_id(ask, call), a, b),
        pair_id(prompt_id(ask), [a[0] | {"tool_calls": call}], b),
        pair_id(prompt_id(ask), [a[0] | {"reasoning_content": "hm"}], b),
        pair_id(prompt_id([ask[0] | {"name": "Ada"}]), a, b),
    ]
    assert len({plain, *others}) == 5


CALL = {"type": "function", "function": {"name": "stops", "arguments": {"near": "Zoo", "x": None}}}
ASKED = [{"role": "user", "content": "Which tram?", "name": "Ada"}]
CALLED = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
GUESSED = [{"role": "assistant", "content": "The 9."}]
ROW = Preference("x", ASKED, CALLED, GUESSED, None, "a", None, None, None, None, weight=0.5)
TOOL = [{"type": "function", "function": {"name": "stops", "parameters": {"b": 1, "a": {}}}}]


def loaded(tmp_path: Path, rows: list[Any], **more: bool) -> list[dict[str, Any]]:
    schema = preference_schema("conversational", **more)
    pq.write_table(product_table(Preference, rows, schema), tmp_path / "x.parquet")
    found = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "x.parquet"), cache_dir=str(tmp_path), split="train"
    )
    return list(found)


def test_other_programs_get_the_objects_that_our_templates_were_given(tmp_path: Path) -> None:
    plain = ROW._replace(prompt=[ASKED[0] | {}], chosen=GUESSED)
    first, second = loaded(tmp_path, [ROW._replace(tools=TOOL), plain], keys=True, tools=True)
    assert (first["prompt"], first["chosen"], first["rejected"]) == (ASKED, CALLED, GUESSED)
    assert (first["tools"], second["tools"]) == (TOOL, None)
    assert list(first["tools"][0]["function"]["parameters"]) == ["b", "a"]
    assert second["chosen"] == GUESSED  # no key that it had not


def test_plain_messages_are_structures_that_any_reader_knows(tmp_path: Path) -> None:
    plain = [{"role": "user", "content": "Which tram?"}]
    row = ROW._replace(prompt=plain, chosen=GUESSED, rejected=GUESSED)
    (found,) = loaded(tmp_path, [row])
    assert found["prompt"] == plain
    assert "tools" not in found
    message = preference_schema("conversational").field("prompt").type.value_type
    assert [field.name for field in message] == ["role", "content"]


@pytest.mark.parametrize("kind", ["text", "conversational"])
def test_schemas_of_pairs(kind: Any) -> None:
    schema = whole_schema(kind)
    assert schema.field("prompt").type == (pa.string() if kind == "text" else MESSAGES)
    names = ["pair_id", "prompt", "response_a", "response_b", "tools", "label", "tie"]
    assert schema.names[:7] == names
