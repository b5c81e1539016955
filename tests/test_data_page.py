"""docs/data.md says what the code does: its recipes are run, its tables are those of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prepared import config, pairs, said, write

from cwpo_dist.pairs import column_names
from cwpo_dist.pairs.layout import FIELDS
from cwpo_dist.pairs.messages import CALLS, ROLES
from cwpo_dist.pairs.records import MESSAGE_KEYS
from cwpo_dist.pairs.rejects import REMEDIES
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
ASK = "How long does rice take?"
WON, LOST = "About twelve minutes, then let it rest.", "Rice is white."
MORE = "Brown rice."
TALK = [{"role": "user", "content": ASK}]
BE = "You are a cook."
SYSTEM = {"role": "system", "content": BE}
BOTH = {"chosen": WON, "rejected": LOST}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def told(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def hh(answer: str) -> str:
    return f"\n\nHuman: {ASK}\n\nAssistant: {answer}"


def both(a: str, b: str, **more: Any) -> list[dict[str, Any]]:
    """A row in which the first answer won, and one in which the second did."""
    values = {name: value for name, value in more.items() if isinstance(value, tuple)}
    rest = {name: value for name, value in more.items() if name not in values}
    return [
        rest | {a: order[0], b: order[1]} | {name: value[k] for name, value in values.items()}
        for k, order in enumerate(((WON, LOST), (LOST, WON)))
    ]


def judges(*said_by: int) -> dict[str, int]:
    return {f"annotator{k}": value for k, value in enumerate(said_by, 1)}


# By the set's name on the page: rows of our own in its shape, WON the better answer of each.
SETS: dict[str, list[dict[str, Any]]] = {
    "TRL's preference formats": [{"prompt": ASK, **BOTH}],
    "Anthropic HH": [{"chosen": hh(WON), "rejected": hh(LOST)}],
    "UltraFeedback, binarized": [
        {
            "prompt": ASK,
            "prompt_id": "1",
            "chosen": [*TALK, told(WON)],
            "rejected": [*TALK, told(LOST)],
            "messages": [*TALK, told(WON)],
            "score_chosen": 8.0,
        }
    ],
    "LLaMA-Factory, ShareGPT": [
        {
            "conversations": [{"from": "human", "value": ASK}],
            "chosen": gpt(WON),
            "rejected": gpt(LOST),
            "system": BE,
            "tools": '[{"name": "timer", "parameters": {}}]',
        }
    ],
    "LLaMA-Factory, Alpaca": [
        {"instruction": ASK, "input": MORE, **BOTH, "system": BE, "history": [["Hi", "Hello"]]}
    ],
    "LLaMA-Factory, before 2024": [{"instruction": ASK, "input": "", "output": [WON, LOST]}],
    "axolotl `chat_template.default`": [
        {"messages": [SYSTEM, *TALK], "chosen": told(WON), "rejected": told(LOST)}
    ],
    "axolotl `chatml.intel`, `llama3.icr`": [{"system": BE, "question": ASK, **BOTH}],
    "axolotl `chatml.argilla`": [
        {"system": BE, "instruction": ASK, "chosen_response": WON, "rejected_response": LOST}
    ],
    "ms-swift": [{"messages": [*TALK, told(WON)], "rejected_response": LOST}],
    "OpenAI preference files": [
        {
            "input": {"messages": TALK, "tools": []},
            "preferred_output": [told(WON)],
            "non_preferred_output": [told(LOST)],
        }
    ],
    "LLMBar": both("output_1", "output_2", input=ASK, label=(1, 2)),
    "PandaLM": [
        row | judges(*each)
        for row, each in zip(
            both("response1", "response2", instruction=ASK, input="", idx=7),
            [(1, 1, 0), (2, 0, 2)],
            strict=True,
        )
    ],
    "Auto-J": [
        *both("response 1", "response 2", usrmsg=ASK, label=(0, 1), scenario="cooking"),
        {"usrmsg": ASK, "response 1": WON, "response 2": LOST, "label": 2},
    ],
    "RMB": [
        {
            "conversation_input": TALK,
            "chosen": {"answer": WON, "llm_name": "x"},
            "reject": {"answer": LOST, "llm_name": "y"},
        }
    ],
    "HelpSteer2 and 3, preferences": [
        *both("response1", "response2", context=TALK, overall_preference=(-2, 3)),
        {"context": TALK, "response1": WON, "response2": LOST, "overall_preference": 0},
    ],
    "Chatbot Arena, MT-Bench people": [
        row | {x: [*TALK, told(row[x])] for x in ("conversation_a", "conversation_b")}
        for row in both(
            "conversation_a",
            "conversation_b",
            winner=("model_a", "model_b"),
            model_a="alpha",
            model_b="beta",
        )
    ],
    "LMSYS Arena 55k": [
        {
            name: value if isinstance(value, int) else json.dumps([value])
            for name, value in row.items()
        }
        for row in both(
            "response_a",
            "response_b",
            prompt=ASK,
            winner_model_a=(1, 0),
            winner_model_b=(0, 1),
            winner_tie=(0, 0),
        )
    ],
    "PKU-SafeRLHF": both("response_0", "response_1", prompt=ASK, better_response_id=(0, 1)),
    "Summaries with comparisons": [
        {"info": {"post": ASK}, "summaries": [{"text": row["a"]}, {"text": row["b"]}], "choice": k}
        for k, row in enumerate(both("a", "b"))
    ],
    "SHP": both("human_ref_A", "human_ref_B", history=ASK, labels=(1, 0)),
}


RATED = [(LOST, 2.5, 1, "1"), (WON, 4.0, 9, "5"), ("Rice.", 3.0, 5, "3")]
# The same of rows with lists of responses.
LISTS: dict[str, dict[str, Any]] = {
    "UltraFeedback": {
        "instruction": ASK,
        "models": ["x", "y", "z"],
        "completions": [
            {
                "response": text,
                "fine-grained_score": fine,
                "overall_score": 10.0 - overall,
                "annotations": {"helpfulness": {"Rating": rating, "Rationale": "so"}},
            }
            for text, fine, overall, rating in RATED
        ],
    },
    "Nectar": {
        "prompt": hh(""),
        "answers": [
            {"answer": text, "rank": 10.0 - good, "model": "x"} for text, _, good, _ in RATED
        ],
        "turns": 1,
        "num_responses": 3,
    },
    "Sampled and scored": {
        "prompt": ASK,
        "responses": [text for text, *_ in RATED],
        "scores": [good for _, good, *_ in RATED],
    },
}
LISTS["UltraFeedback, one aspect"] = LISTS["UltraFeedback"]


def table(heading: str, first: str = "") -> list[list[str]]:
    """The cells of the table below a heading: the one whose first column has that name."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    start = next((k for k, line in enumerate(lines) if line.startswith(f"| {first} ")), 0)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[start + 1 :]]


def test_the_page_has_a_recipe_for_each_shape() -> None:
    assert [row[0] for row in table("Recipes for public sets")] == list(SETS)


@pytest.mark.parametrize("name", list(SETS))
@pytest.mark.usefixtures("in_process")
def test_a_recipe_reads_rows_of_its_shape(tmp_path: Path, name: str) -> None:
    (lines,) = [row[2] for row in table("Recipes for public sets") if row[0] == name]
    given = {} if lines == "none" else yaml.safe_load(lines.strip("`"))
    rows = [
        json.loads(json.dumps(row).replace(ASK, f"{ASK} {k}.")) for k, row in enumerate(SETS[name])
    ]
    store = Store(str(tmp_path / "out"))
    counts = prepare(store, config({"path": write(tmp_path / "x.jsonl", rows), **given}), seed=0)
    assert (counts["pairs"], counts["rejects"]) == (len(rows), {})
    for pair in pairs(store):
        is_tie = f"{ASK} 2." in said(pair["prompt"])  # a third row of a shape is one
        assert pair["tie"] is is_tie
        assert is_tie or said(pair[f"response_{pair['label']}"]) == WON


def test_the_page_has_a_recipe_for_each_shape_of_lists() -> None:
    assert {row[0] for row in table("Lists of responses", "set")} == set(LISTS)


@pytest.mark.parametrize("name", list(LISTS))
@pytest.mark.usefixtures("in_process")
def test_a_recipe_reads_lists_of_its_shape(tmp_path: Path, name: str) -> None:
    (lines,) = [row[2] for row in table("Lists of responses", "set") if row[0] == name]
    given = {} if lines == "none" else yaml.safe_load(lines.strip("`"))
    store, path = Store(str(tmp_path / "out")), write(tmp_path / "x.jsonl", [LISTS[name]])
    counts = prepare(store, config({"path": path, **given}, pairing="best_worst"), seed=0)
    assert (counts["rejects"], counts["lists"]["set_aside"]) == ({}, {})
    (pair,) = pairs(store)
    other = "b" if pair["label"] == "a" else "a"
    assert said(pair[f"response_{pair['label']}"]) == WON
    assert said(pair[f"response_{other}"]) == LOST


@pytest.mark.usefixtures("in_process")
def test_nothing_of_a_shape_is_lost_on_the_way(tmp_path: Path) -> None:
    """System, input, history and tools of the two formats of LLaMA-Factory."""
    for name, prompt, tools in (
        ("LLaMA-Factory, ShareGPT", [SYSTEM, *TALK], ["timer"]),
        (
            "LLaMA-Factory, Alpaca",
            [SYSTEM, user("Hi"), told("Hello"), user(f"{ASK}\n{MORE}")],
            [],
        ),
    ):
        store = Store(str(tmp_path / name[-6:]))
        prepare(store, config(write(tmp_path / "x.jsonl", SETS[name])), seed=0)
        (pair,) = pairs(store)
        assert pair["prompt"] == prompt
        assert [tool["function"]["name"] for tool in pair["tools"] or []] == tools


def test_reasons_and_their_remedies_are_those_of_the_code() -> None:
    assert dict(table("Reasons of rejects")) == {str(r): text for r, text in REMEDIES.items()}


def test_all_fields_and_their_other_names_stand_on_the_page() -> None:
    rows = table("Columns")
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(FIELDS)
    by_field = {row[0]: row[1] for row in rows}
    for field, names in column_names.OTHERS.items():
        (cell,) = [text for fields, text in by_field.items() if f"`{field}`" in fields]
        assert {f"`{name}`" for name in names} <= set(re.findall(r"`[\w.]+`", cell))
    for name in (*column_names.PROMPTS, *column_names.CONVERSATIONS):
        assert f"`{name}`" in by_field["`prompt`"]
    for name in column_names.LISTS:
        assert name == "responses" or f"`{name}`" in by_field["`responses`"]
    for field, names in column_names.RATINGS.items():
        assert {f"`{name}`" for name in names} - {f"`{field}`"} == set(
            by_field[f"`{field}`"].split(", ")
        )
    for name in column_names.IN_LISTS:
        assert f"`{name}`" in PAGE
    for name in column_names.MEDIA:
        assert f"`{name}`" in PAGE


def test_roles_and_keys_of_messages_stand_on_the_page() -> None:
    section = PAGE.partition("## Conversations\n")[2].partition("\n## ")[0]
    for name in (*ROLES, *MESSAGE_KEYS, CALLS[0]):
        assert re.search(rf"\b{name}\b", section), name
