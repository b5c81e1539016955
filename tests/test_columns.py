"""Columns are found by the names that people give them; what could be two things is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prepared import config, pairs, write

from cwpo_dist.config import ConfigError
from cwpo_dist.pairs.layout import Layout, cell
from cwpo_dist.pairs.records import pair_id, prompt_id
from cwpo_dist.pairs.sources import check, plan
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store

LONG, SHORT = "The tower is 96 metres high.", "High."
BOTH = {"chosen": LONG, "rejected": SHORT}
ASK = "How high is the tower?"
TALK = [{"role": "user", "content": ASK}]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def layout(tmp_path: Path, *rows: Any, **source: Any) -> Layout:
    path = write(tmp_path / "x.jsonl", list(rows))
    return plan(config({"path": path, **source})).pieces[0].layout


def only_pair(tmp_path: Path, row: Any, **source: Any) -> dict[str, Any]:
    store = Store(str(tmp_path / "out"))
    prepare(store, config({"path": write(tmp_path / "x.jsonl", [row]), **source}), seed=0)
    (pair,) = pairs(store)
    won, lost = ("a", "b") if pair["label"] == "a" else ("b", "a")
    return pair | {"won": pair[f"response_{won}"], "lost": pair[f"response_{lost}"]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, **BOTH},
        {"Prompt": ASK, "Chosen": LONG, "Rejected": SHORT},
        {"question": ASK, **BOTH},  # chatml.intel
        {"instruction": ASK, "chosen_response": LONG, "rejected_response": SHORT},  # chatml.argilla
        {"instruction": ASK, "input": "", "chosen": LONG, "rejected": SHORT},  # LLaMA-Factory
        {"input": ASK, **BOTH},  # llama3.icr
        {"query": ASK, "response_chosen": LONG, "response_rejected": SHORT},
        {"prompt": ASK, "preferred": LONG, "dispreferred": SHORT},
        {"prompt": ASK, "better_response": LONG, "worse_response": SHORT},
    ],
)
@pytest.mark.usefixtures("in_process")
def test_text_under_many_names(tmp_path: Path, row: Any) -> None:
    pair = only_pair(tmp_path, row)
    assert (pair["prompt"], pair["won"], pair["lost"]) == (ASK, LONG, SHORT)


SHARE = [{"from": "human", "value": ASK}]
GPT = {"chosen": {"from": "gpt", "value": LONG}, "rejected": {"from": "gpt", "value": SHORT}}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": SHARE, **GPT},  # LLaMA-Factory's ShareGPT
        {"conversations": SHARE, **BOTH},
        {"messages": TALK, "chosen": assistant(LONG), "rejected": assistant(SHORT)},  # axolotl
        {"messages": TALK, "chosen": [assistant(LONG)], "rejected": [assistant(SHORT)]},
        {"messages": ASK, "chosen": assistant(LONG), "rejected": assistant(SHORT)},
        {"prompt": ASK, "chosen": [*TALK, assistant(LONG)], "rejected": [*TALK, assistant(SHORT)]},
        {"chosen": [*TALK, assistant(LONG)], "rejected": [*TALK, assistant(SHORT)]},
        {
            "prompt": ASK,
            "messages": [*TALK, assistant(LONG)],
            "chosen": [*TALK, assistant(LONG)],
            "rejected": [*TALK, assistant(SHORT)],
        },
        {"messages": [*TALK, assistant(LONG)], "rejected_response": SHORT},  # ms-swift
        {"messages": [*TALK, assistant(LONG)], "rejected_messages": [*TALK, assistant(SHORT)]},
        {
            "input": {"messages": TALK, "parallel_tool_calls": True},  # OpenAI's
            "preferred_output": [assistant(LONG)],
            "non_preferred_output": [assistant(SHORT)],
        },
        {
            "messages": [*TALK, assistant(LONG)],  # a prompt column with the whole of the chosen
            "chosen": [*TALK, assistant(LONG)],
            "rejected": [*TALK, assistant(SHORT)],
        },
        {
            "prompt": json.dumps(TALK),
            "chosen": json.dumps([assistant(LONG)]),
            "rejected": str([assistant(SHORT)]),
        },
        {
            "prompt": json.dumps([{"type": "text", "text": ASK}]),
            "chosen": json.dumps([{"type": "text", "text": LONG}]),
            "rejected": json.dumps([{"type": "text", "text": SHORT}]),
        },
        {"prompt": ["How high is the tower?"], "chosen": [LONG], "rejected": [SHORT]},
        {
            "prompt": json.dumps([ASK]),
            "chosen": json.dumps([LONG]),
            "rejected": json.dumps([SHORT]),
        },
    ],
)
@pytest.mark.usefixtures("in_process")
def test_conversations_in_many_shapes(tmp_path: Path, row: Any) -> None:
    pair = only_pair(tmp_path, row)
    assert pair["prompt"] == TALK
    assert (pair["won"], pair["lost"]) == ([assistant(LONG)], [assistant(SHORT)])


SYSTEM = {"role": "system", "content": "Answer as a guide."}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"system": SYSTEM["content"], "question": ASK, **BOTH}, [SYSTEM, user(ASK)]),
        ({"system": "", "prompt": ASK, **BOTH}, [user(ASK)]),
        ({"system_prompt": SYSTEM["content"], "prompt": ASK, **BOTH}, [SYSTEM, user(ASK)]),
        ({"system": SYSTEM["content"], "conversations": SHARE, **GPT}, [SYSTEM, user(ASK)]),
        (
            {"system": SYSTEM["content"], "messages": [SYSTEM, *TALK], **BOTH},
            [SYSTEM, user(ASK)],
        ),
        (
            {
                "system": SYSTEM["content"],
                "prompt": ASK,
                "chosen": [*TALK, assistant(LONG)],
                "rejected": [*TALK, assistant(SHORT)],
            },
            [SYSTEM, user(ASK)],
        ),
        (
            {
                "system": SYSTEM["content"],
                "chosen": f"\n\nHuman: {ASK}\n\nAssistant: {LONG}",
                "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {SHORT}",
            },
            [SYSTEM, user(ASK)],
        ),
        (
            {"instruction": "Sum up.", "input": ASK, "system": SYSTEM["content"], **BOTH},
            [SYSTEM, user(f"Sum up.\n{ASK}")],
        ),
        (
            {"instruction": ASK, "history": [["Hello", "Good day."]], **BOTH},
            [user("Hello"), assistant("Good day."), user(ASK)],
        ),
    ],
)
@pytest.mark.usefixtures("in_process")
def test_system_input_and_history_have_their_place(tmp_path: Path, row: Any, prompt: Any) -> None:
    pair = only_pair(tmp_path, row)
    assert pair["prompt"] == prompt
    assert pair["won"] == [assistant(LONG)]


@pytest.mark.usefixtures("in_process")
def test_an_input_stands_below_its_instruction_in_text_too(tmp_path: Path) -> None:
    row = {"instruction": "Sum up.", "input": ASK, **BOTH}
    assert only_pair(tmp_path, row)["prompt"] == f"Sum up.\n{ASK}"
    for named in ({"prompt": "instruction"}, {"input": "input"}):
        assert layout(tmp_path, row, columns=named).columns["input"] == "input"
    assert "input" not in layout(tmp_path, row, columns={"input": None}).columns
    assert layout(tmp_path, row, columns={"prompt": "input"}).columns["prompt"] == "input"
    assert "input" not in layout(tmp_path, {"prompt": ASK, "input": "x", **BOTH}).columns


@pytest.mark.usefixtures("in_process")
def test_two_system_messages_that_differ_set_their_row_aside(tmp_path: Path) -> None:
    good = {"system": SYSTEM["content"], "messages": TALK, **BOTH}
    other = good | {"messages": [SYSTEM | {"content": "Be rude."}, *TALK]}
    path = write(tmp_path / "x.jsonl", [good, other])
    counts = prepare(Store(str(tmp_path / "o")), config(path, max_reject_fraction=0.5), seed=0)
    assert counts["rejects"] == {"two system messages": 1}


@pytest.mark.usefixtures("in_process")
def test_tools_travel_with_the_pair_and_are_part_of_it(tmp_path: Path) -> None:
    tool = {"name": "height", "parameters": {"type": "object"}}
    row = {"prompt": ASK, **BOTH, "tools": json.dumps([tool])}
    pair = only_pair(tmp_path, row)
    assert pair["tools"] == [{"type": "function", "function": tool}]
    assert pair["prompt"] == TALK
    first, second = pair["response_a"], pair["response_b"]
    assert pair["pair_id"] == pair_id(prompt_id(TALK, pair["tools"]), first, second)
    assert pair["pair_id"] != pair_id(prompt_id(TALK), first, second)


@pytest.mark.usefixtures("in_process")
def test_nested_columns_by_dotted_names(tmp_path: Path) -> None:
    row = {
        "talk": {"turns": TALK},
        "best": {"answer": LONG, "by": "x"},
        "choices": [{"text": LONG}, {"text": SHORT}],
        "as.it.is": SHORT,
    }
    names = {"prompt": "talk.turns", "chosen": "best.answer", "rejected": "choices.1.text"}
    assert only_pair(tmp_path, row, columns=names)["lost"] == [assistant(SHORT)]
    dotted = names | {"rejected": "as.it.is"}
    assert only_pair(tmp_path / ".", row, columns=dotted, limit=2)["lost"] == [assistant(SHORT)]
    with pytest.raises(ConfigError, match=r"columns\.rejected: .* no column 'choices\.2\.text'"):
        layout(tmp_path, row, columns=names | {"rejected": "choices.2.text"})


def test_a_path_leads_through_objects_lists_and_json() -> None:
    row = {"a": {"b": [1, {"c": "x"}]}, "j": '{"k": [2]}', "a.b": "whole", "bad": "{"}
    assert cell(row, "a.b") == "whole"
    assert cell({"a": row["a"]}, "a.b.1.c") == "x"
    assert cell(row, "j.k.0") == 2
    for nowhere in ("a.c", "a.b.9", "j.x", "bad.x", "none.x", "j.k.-1"):
        assert cell(row, nowhere) is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": ASK, "query": "x", **BOTH},
            r"columns\.prompt: .*'question' and 'query'.*say which",
        ),
        (
            {"prompt": ASK, "answer_a": "1", "answer_b": "2", "output_1": "3", "output_2": "4"},
            r"columns\.response_a: .*'answer_a, answer_b' and 'output_1, output_2'",
        ),
        (
            {"prompt": ASK, "winner": "a", "verdict": "b", "response_a": "1", "response_b": "2"},
            "'winner' and 'verdict'",
        ),
        (
            {"prompt": ASK, "answer_a": "1", "answer_b": "2", "answer_c": "3"},
            r"has 3 answers a row.*a row for each",
        ),
        (
            {"prompt": ASK, "responses": ["1", "2", "3", "4"], "ranks": [1, 2, 3, 4]},
            r"'responses' holds lists of up to 4 answers.*responses\.0",
        ),
        (
            {"prompt": ASK, "answers": [{"answer": "1", "rank": 1}, {"answer": "2", "rank": 2}]},
            "'answers' holds lists",
        ),
        (
            {"prompt": ASK, "completion": LONG, "label": True},
            r"one answer, 'completion', and 'label' says .*KTO.*score: label",
        ),
        (
            {"instruction": ASK, "output": LONG, "kto_tag": False},
            "one answer, 'output', and 'kto_tag'",
        ),
        ({"prompt": ASK, "response": LONG}, r"one answer, 'response'. Where other rows"),
        (
            {"prompt": ASK, "images": ["a.png"], **BOTH},
            r"none of the first 1 rows.*image, sound or video: images",
        ),
        ({"chosen": LONG, "rejected": SHORT}, r"columns\.prompt: .*no transcripts"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}
                ],
                **BOTH,
            },
            r"1 × image, sound or video: prompt \(a part of type 'image' in 1 rows\): pairs",
        ),
        (
            {"prompt": TALK, "chosen": [{"role": "Zuse", "content": "x"}], "rejected": "y"},
            r"unknown role: chosen \(role 'Zuse' in 1 rows\): roles are",
        ),
        ({"prompt": ASK, "tools": ["hammer"], **BOTH}, r"bad tools: tools \('hammer' in 1 rows\)"),
        (
            {"prompt": ASK, **BOTH, "votes_a": 1, "votes_b": 2, "label": "b"},
            r"columns\.votes_a: a label beside chosen",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        check(config(write(tmp_path / "x.jsonl", [row])))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"winner": "x"}, r"'winner' is unknown; choose from system, tools"),
        (
            {"chosen": {"from": "chosen", "a": 1, "b": 2}},
            r"columns\.chosen: a map of values is for label",
        ),
        ({"images": "x"}, "'images' is unknown"),
        ({"chosen": "best"}, r"columns\.chosen: .*no column 'best'"),
        ({"response_a": "chosen"}, r"columns\.response_b: .*no column 'response_b'"),
        ({"label": "x"}, r"columns\.label: it says nothing beside"),
        ({"label": {"from": ["x"], "a": 1, "b": 2}}, r"columns\.label: chosen and rejected say"),
    ],
)
def test_columns_that_are_named_wrongly(tmp_path: Path, columns: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        layout(tmp_path, {"prompt": ASK, "x": "a", **BOTH}, columns=columns)


def test_votes_that_nothing_ties_to_an_answer_can_be_left_out(tmp_path: Path) -> None:
    row = {"prompt": ASK, **BOTH, "votes_a": 1, "votes_b": 2, "label": "b"}
    found = layout(tmp_path, row, columns={"votes_a": None, "votes_b": None})
    assert set(found.columns) == {"prompt", "chosen", "rejected"}
    named = {"votes_chosen": "votes_b", "votes_rejected": "votes_a"}
    assert layout(tmp_path, row, columns=named).columns["votes_chosen"] == "votes_b"


def test_null_leaves_a_column_out(tmp_path: Path) -> None:
    row = {"prompt": ASK, "system": "x", "images": ["a.png"], **BOTH}
    found = layout(tmp_path, row, columns={"system": None, "images": None})
    assert "system" not in found.columns
    assert (found.media, found.format) == ((), "text")


def test_text_stays_text_only_where_it_can(tmp_path: Path) -> None:
    written = {"prompt": ASK, "chosen": json.dumps([assistant(LONG)]), "rejected": SHORT}
    with pytest.raises(ConfigError, match=r"format: text, but 'chosen' .* written as text"):
        layout(tmp_path, written, format="text")
    with pytest.raises(ConfigError, match=r"format: text, but .* has system \('system'\)"):
        layout(tmp_path, {"prompt": ASK, "system": "x", **BOTH}, format="text")


@pytest.mark.usefixtures("in_process")
def test_single_cells_that_hide_messages_or_are_cut_are_set_aside(tmp_path: Path) -> None:
    texts = [{"prompt": f"{ASK} {i}", **BOTH} for i in range(8)]
    hidden = {"prompt": "9", "chosen": json.dumps([assistant(LONG)]), "rejected": SHORT}
    path = write(tmp_path / "text.jsonl", [*texts, hidden])
    talks = [
        {x: json.dumps([user(f"{i} {ASK}"), assistant(BOTH[x])]) for x in BOTH} for i in range(8)
    ]
    cut = talks[0] | {"chosen": talks[0]["chosen"][:-9]}
    other = write(tmp_path / "talk.jsonl", [*talks, cut])
    counts = prepare(
        Store(str(tmp_path / "out")), config(path, other, max_reject_fraction=0.2), seed=0
    )
    assert counts["pairs"] == 16
    assert counts["rejects"] == {"messages as text: chosen": 1, "unreadable messages: chosen": 1}
    as_text = {"path": path, "format": "text"}
    assert prepare(Store(str(tmp_path / "t")), config(as_text), seed=0)["pairs"] == 9
