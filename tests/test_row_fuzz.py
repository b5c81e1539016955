"""Ten thousand rows in many spellings, seeded: each arrives whole, or is set aside by its reason.

Every row says in its prompt which it is, and is made with what must come of it: the pair with all
of its messages, the answer that won, its votes and tools; or the reason of its reject. What is put
beside a row and nothing can read must be counted, by name, to the row.
"""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import config, pairs, rejects

from cwpo_dist.pairs.messages import ROLES
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store

Row = dict[str, Any]
ROWS_A_SHAPE = 700
BY_ROLE = {role: [n for n, ours in ROLES.items() if ours == role] for role in set(ROLES.values())}
BESIDE = ("grade", "url", "model name", "meta")
KEYS = ("weight", "id", "train")


@dataclass
class Expected:
    """What must come of one source.

    Attributes:
        good: by the row's name: prompt, winner (None: no label), other answer, tools.
        bad: reason by position.
        columns: rows with a value in a column that nothing reads.
        keys: rows whose messages have a key that nothing reads.
    """

    good: dict[str, Any] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)
    columns: Counter[str] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)


class Maker:
    """Makes the rows of one shape."""

    def __init__(self, seed: int, name: str) -> None:
        self.random = random.Random(f"{seed} {name}")
        self.name = name
        self.number = 0
        self.keys: set[str] = set()

    def pick(self, *given: Any) -> Any:
        return self.random.choice(given)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def words(self, what: str) -> str:
        return f"{what} {self.pick('é', '[x]', '{y}', '日本', 'a', '<b>')}\n{self.number}"

    def talk(self) -> list[Row]:
        """The messages of a prompt, ours: plain, with a system message, or with a tool call."""
        asked = {"role": "user", "content": f"{self.name}-{self.number}: {self.words('why')}"}
        earlier = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes?"}]
        system = [{"role": "system", "content": self.words("be brief")}]
        call = {"type": "function", "function": {"name": "look", "arguments": {"n": self.number}}}
        called = [
            {"role": "assistant", "content": self.pick(None, ""), "tool_calls": [call]},
            {"role": "tool", "content": "found", "name": "look"},
        ]
        return self.pick([asked], [*earlier, asked], [*system, asked], [asked, *called])

    def answers(self) -> tuple[list[Row], list[Row]]:
        won: Row = {"role": "assistant", "content": self.words("good")}
        lost: Row = {"role": "assistant", "content": self.words("poor")}
        if self.chance(0.2):
            won["reasoning_content"] = "think"
        return [won], [lost]

    def spelled(self, message: Row) -> Any:
        """A message as someone writes it."""
        role = self.pick(*BY_ROLE[message["role"]])
        role = self.pick(role, role.upper(), role.capitalize())
        where, what = self.pick(("role", "content"), ("from", "value"), ("role", "value"))
        content = message["content"]
        if content is not None and self.chance(0.2):
            half = len(content) // 2
            parts = [
                {"type": "text", "text": content[:half]},
                {"type": "text", "text": content[half:]},
            ]
            content = self.pick(parts, [content[:half], content[half:]])
        more = {k: v for k, v in message.items() if k not in ("role", "content")}
        if "tool_calls" in more and self.chance(0.5):
            more["tool_calls"] = json.dumps(more["tool_calls"])
        if self.chance(0.1):
            key = self.pick(*KEYS)
            more[key] = self.pick(0, "x", None)
            self.keys |= set() if more[key] is None else {key}
        made = {where: role, what: content, **more}
        return json.dumps(made) if self.chance(0.05) else made

    def spelled_all(self, messages: list[Row]) -> list[Any]:
        return [self.spelled(each) for each in messages]

    def one(self, messages: list[Row]) -> Any:
        """An answer: a list of one, the message alone, or what it says."""
        (message,) = messages
        if message.keys() == {"role", "content"} and self.chance(0.3):
            return message["content"]
        alone = self.spelled(message)
        return self.pick([alone], alone) if isinstance(alone, dict) else [alone]


# -- shapes: a row and the pair that it is


def chosen_after_prompt(make: Maker) -> tuple[Row, Any]:
    talk, (won, lost) = make.talk(), make.answers()
    row = {"messages": make.spelled_all(talk), "chosen": make.one(won), "rejected": make.one(lost)}
    return row, (talk, won, lost, None, None)


def whole_conversations(make: Maker) -> tuple[Row, Any]:
    talk, (won, lost) = make.talk(), make.answers()
    row = {
        "chosen": make.spelled_all([*talk, *won]),
        "rejected": make.spelled_all([*talk, *lost]),
    }
    return row, (talk, won, lost, None, None)


def with_tools(make: Maker) -> tuple[Row, Any]:
    row, (talk, won, lost, _, _) = chosen_after_prompt(make)
    bare = {"name": "look", "parameters": {"z": 1, "a": make.number}}
    tools = [{"type": "function", "function": bare}]
    spelled = make.pick(tools, [bare], json.dumps(tools), json.dumps([bare]), None, "")
    return row | {"tools": spelled}, (talk, won, lost, tools if spelled else None, None)


def labelled(make: Maker) -> tuple[Row, Any]:
    talk, (won, lost) = make.talk(), make.answers()
    first_won = make.chance(0.5)
    answers = (won, lost) if first_won else (lost, won)
    a, b = make.pick((None, None), (3, 1), ("2", "0"), (4.0, 4.0))
    label = make.pick("model_a" if first_won else "model_b", "A" if first_won else "b", None, "tie")
    row = {
        "conversations": make.spelled_all(talk),
        "answer_a": make.one(answers[0]),
        "answer_b": make.one(answers[1]),
        "winner": label,
        "votes_a": a,
        "votes_b": b,
    }
    votes = None if a is None else (int(float(a)), int(float(b)))
    said = {None: None, "tie": "tie"}.get(label, "won")
    if label is None and votes == (4, 4):  # asked, and split evenly
        said = "tie"
    by_answer = votes if first_won or votes is None else votes[::-1]
    return row, (talk, won, lost, None, (said, by_answer))


def both_spellings(make: Maker) -> tuple[Row, Any]:
    row, (talk, won, lost, _, (_, votes)) = labelled(make)
    a_is_won = json.dumps(row["answer_a"], sort_keys=True).find("good") >= 0
    names = {"response_a": row["answer_a"], "response_b": row["answer_b"]}
    more = {"votes_a": row["votes_a"], "votes_b": row["votes_b"]}
    more |= {"label": make.pick("a" if a_is_won else "b", None)}
    made = {"prompt": row["conversations"], "chosen": make.one(won), "rejected": make.one(lost)}
    return made | names | more, (talk, won, lost, None, ("won", votes))


def alpaca(make: Maker) -> tuple[Row, Any]:
    (won, lost) = make.answers()
    won = [{k: won[0][k] for k in ("role", "content")}]
    text, more = f"{make.name}-{make.number}: {make.words('do')}", make.pick("", None, "with this")
    system = make.pick("", None, "be kind")
    talk = [{"role": "user", "content": "\n".join(filter(None, [text, more]))}]
    talk = [{"role": "system", "content": system}, *talk] if system else talk
    row = {"instruction": text, "input": more, "system": system}
    row |= {"chosen": won[0]["content"], "rejected": lost[0]["content"]}
    return row, (talk, won, lost, None, None)


def transcripts(make: Maker) -> tuple[Row, Any]:
    (won, lost) = make.answers()
    won = [{k: won[0][k] for k in ("role", "content")}]
    asked = f"{make.name}-{make.number}: {make.words('say')}"
    start = f"\n\nHuman: {asked}\n\nAssistant: "
    row = {"chosen": start + won[0]["content"], "rejected": start + lost[0]["content"]}
    return row, ([{"role": "user", "content": asked}], won, lost, None, None)


def rated(key: str) -> Callable[[Maker], tuple[Row, Any]]:
    """A list of two responses in either order, one of them twice at times, and a rating of each."""

    def make_row(make: Maker) -> tuple[Row, Any]:
        talk, (won, lost) = make.talk(), make.answers()
        more, less = make.pick((2, 1), (0.5, "-0.5"), ("9", 8.75))
        good, poor = (less, more) if key == "ranks" else (more, less)
        rated_ones = [(make.one(won), good), (make.one(lost), poor)]
        rated_ones += [make.pick(*rated_ones)] if make.chance(0.3) else []
        make.random.shuffle(rated_ones)
        row = {"messages": make.spelled_all(talk), "candidates": [x for x, _ in rated_ones]}
        return row | {key: [y for _, y in rated_ones]}, (talk, won, lost, None, None)

    return make_row


def objects(make: Maker) -> tuple[Row, Any]:
    row, pair = rated("ranks")(make)
    both = zip(row["candidates"], row["ranks"], strict=True)
    asked = {"messages": row["messages"]}
    return asked | {"answers": [{"answer": x, "rank": y} for x, y in both]}, pair


def dumped(make: Maker) -> tuple[Row, Any]:
    row, pair = rated("scores")(make)
    return row | {"candidates": [json.dumps(each) for each in row["candidates"]]}, pair


def unrated(make: Maker) -> tuple[Row, Any]:
    row, (talk, won, lost, _, _) = rated("scores")(make)
    del row["scores"]
    return row, (talk, won, lost, None, ("nobody", None))


def cells(make: Maker) -> tuple[Row, Any]:
    row, pair = rated("scores")(make)
    return {name: json.dumps(value) for name, value in row.items()}, pair


def written(spell: Callable[[Any], str]) -> Callable[[Maker], tuple[Row, Any]]:
    def make_row(make: Maker) -> tuple[Row, Any]:
        row, pair = whole_conversations(make)
        return {name: spell(value) for name, value in row.items()}, pair

    return make_row


SHAPES: dict[str, Callable[[Maker], tuple[Row, Any]]] = {
    "after.jsonl": chosen_after_prompt,
    "whole.jsonl": whole_conversations,
    "tools.jsonl": with_tools,
    "label.jsonl": labelled,
    "both.jsonl": both_spellings,
    "alpaca.jsonl": alpaca,
    "alpaca.csv": alpaca,
    "hh.jsonl": transcripts,
    "json.csv": written(json.dumps),
    "python.csv": written(str),
    "json.parquet": written(json.dumps),
    "list.parquet": chosen_after_prompt,
    "whole.parquet": whole_conversations,
    "tools.parquet": with_tools,
    "label.parquet": labelled,
    "scored_list.jsonl": rated("scores"),
    "ranked_list.jsonl": rated("ranks"),
    "objects_list.jsonl": objects,
    "unrated_list.jsonl": unrated,
    "cells_list.csv": cells,
    "scored_list.parquet": dumped,
}


def spoiled_list(make: Maker, row: Row, name: str) -> tuple[Row, str]:
    """A row with a list of which no pair can be made, and the reason."""
    spell = json.dumps if name.endswith(".csv") else lambda value: value
    key = "answers" if "answers" in row else "candidates"
    rating = next((each for each in ("scores", "ranks") if each in row), None)
    two, blank = ["x", "y"], [" ", ""]
    if name.endswith(".parquet"):  # each response is JSON there
        two, blank = [list(map(json.dumps, each)) for each in (two, blank)]
    empty = "one response: responses" if rating is None else f"differing lengths: {rating}"
    cases: list[tuple[Row, str]] = [({key: spell([])}, empty)]
    if name.endswith(".jsonl"):
        nothing = "missing field: responses"  # text has no objects, of which each has its text
        cases += [({key: "x"}, "wrong type: responses" if key == "candidates" else nothing)]
        cases += [({key: None}, nothing)]
    if rating is not None:
        cases += [({rating: spell([1])}, f"differing lengths: {rating}")]
        cases += [({key: spell(two), rating: spell([1, "?"])}, "one response: responses")]
        cases += [({key: spell(blank), rating: spell([1, 2])}, "empty answer: responses")]
    change, reason = make.pick(*cases)
    return row | change, reason


def spoiled(make: Maker, row: Row, name: str) -> tuple[Row, str]:
    """A row with one thing wrong, and the reason that must be given for it."""
    first = next(x for x in ("chosen", "answer_a") if x in row)
    other = {"chosen": "rejected", "answer_a": "answer_b"}[first]
    ours = {"answer_a": "response_a", "answer_b": "response_b"}.get(first, first)
    their = {"answer_b": "response_b"}.get(other, other)
    text = name.startswith(("alpaca", "hh", "json", "python"))
    cases: list[tuple[Row, str]] = [
        ({first: None}, f"missing field: {ours}"),
        ({other: row[first]}, "identical answers"),
    ]
    if name.endswith(".csv"):
        cases = cases[1:]
    if name.startswith("alpaca"):
        cases += [
            ({first: " \n"}, f"empty answer: {ours}"),
            ({"instruction": " ", "input": ""}, "empty prompt"),
        ]
        cases += [
            ({other: '[{"role": "assistant", "content": "x"}]'}, f"messages as text: {their}")
        ]
    if name.startswith("hh"):
        cases += [
            ({first: "Hello."}, "not a transcript"),
            ({first: row[first] + "\n\nHuman: ?"}, "no assistant turn"),
        ]
    if name.startswith(("json", "python")):
        cases += [({first: row[first][:-3]}, f"unreadable messages: {ours}")]
        cases += [({first: "[3]"}, f"no message: {ours}"), ({first: "{}"}, f"no message: {ours}")]
    if not text:
        told = [{"role": "assistant", "content": "x"}]
        cases += [
            ({first: []}, f"empty answer: {ours}"),
            ({first: [{**told[0], "role": "narrator"}]}, f"unknown role: {ours}"),
            ({first: [{**told[0], "content": None}]}, f"no content: {ours}"),
            ({first: [{"content": "x"}]}, f"no message: {ours}"),
            (
                {first: [{**told[0], "content": [{"type": "image", "url": "x"}]}]},
                f"image, sound or video: {ours}",
            ),
            ({first: [{**told[0], "tool_calls": "nothing"}]}, f"bad tools: {ours}"),
            ({first: [{**told[0], "content": "\ud800"}]}, f"invalid Unicode: {ours}"),
            ({first: [{**told[0], "name": 3}]}, f"not text: {ours}"),
            (
                {first: [{**told[0], "role": "user"}]},
                "no assistant turn",
            ),
            ({first: 3}, f"wrong type: {ours}"),
        ]
    if name.startswith("tools"):
        cases += [
            ({"tools": "hammer"}, "bad tools: tools"),
            ({"tools": [{"n": 1}]}, "bad tools: tools"),
        ]
    if name.startswith("label"):
        cases += [({"winner": make.pick("c", 7, True, "c a")}, "bad label value")]
    if name.startswith(("label", "both")):
        cases += [({"votes_a": make.pick(-1, 0.5, "many"), "votes_b": 1}, "bad votes: votes_a")]
    if name.startswith("both"):
        cases += [
            ({"votes_a": 1, "votes_b": 2, "response_a": "x", "response_b": "y"}, "whose votes")
        ]
    change, reason = make.pick(*cases)
    return row | change, reason


def make_source(folder: Path, name: str, seed: int) -> tuple[str, Expected]:
    """A file of one shape, a fifth of its rows spoiled, and what must come of each."""
    make, expected, rows = Maker(seed, name), Expected(), []
    spoil = spoiled_list if "_list." in name else spoiled
    for position in range(1, ROWS_A_SHAPE + 1):
        make.number, make.keys = position, set()
        row, pair = SHAPES[name](make)
        if position > 20 and make.chance(0.2):  # the first rows show how the source is spelled
            row, expected.bad[position] = spoil(make, row, name)
        else:
            expected.good[f"{name}-{position}"] = pair
            expected.keys.update(make.keys)
        beside = {each: make.pick("x", "y z", None, "") for each in BESIDE if make.chance(0.3)}
        nothing = (None,) if name.endswith(".parquet") else (None, "")  # a footer counts nulls
        expected.columns.update(each for each, value in beside.items() if value not in nothing)
        rows.append({**{each: None for each in BESIDE}, **row, **beside})
    return _write(folder / name, rows), expected


def _write(path: Path, rows: list[Row]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:  # what has no one type in Arrow is JSON there, as `datasets` writes it
        columns = {name: [row.get(name) for row in rows] for name in rows[0]}
        pq.write_table(pa.table({n: _column(cells) for n, cells in columns.items()}), path)
    return str(path)


def _column(cells: list[Any]) -> pa.Array:
    if all(cell is None or isinstance(cell, str) for cell in cells):
        return pa.array(cells, pa.string())
    if all(cell is None or isinstance(cell, list) for cell in cells):
        spelled = [cell if cell is None else [_json(item) for item in cell] for cell in cells]
        return pa.array(spelled, pa.list_(pa.string()))
    spell = json.dumps if any(isinstance(cell, dict) for cell in cells) else str
    return pa.array([None if cell is None else spell(cell) for cell in cells], pa.string())


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def check(name: str, expected: Expected, written_rows: list[Row], set_aside: list[Row]) -> None:
    found = {
        row["prompt"][-1]["content"].partition(":")[0]
        if row["prompt"][-1]["role"] == "user"
        else row["prompt"][-3]["content"].partition(":")[0]: row
        for row in written_rows
    }
    assert found.keys() == expected.good.keys()
    assert {row["position"]: row["reason"] for row in set_aside} == expected.bad
    for key, (talk, won, lost, tools, said) in expected.good.items():
        row = found[key]
        first = "a" if row["response_a"] == won else "b"
        other = "b" if first == "a" else "a"
        assert (row["prompt"], row[f"response_{first}"]) == (talk, won), key
        assert (row[f"response_{other}"], row["tools"]) == (lost, tools), key
        verdict, votes = said or ("won", None)
        assert (row["score_a"] is not None) == ("scored_list" in name or name == "cells_list.csv")
        assert row["tie"] is (verdict == "tie")
        assert row["label"] == (first if verdict == "won" else None)
        assert votes == (
            None if row["votes_a"] is None else (row[f"votes_{first}"], row[f"votes_{other}"])
        )


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 6))]
)
def test_ten_thousand_rows_of_messages_and_columns(tmp_path: Path, seed: int) -> None:
    made = {name: make_source(tmp_path, name, seed) for name in SHAPES}
    store = Store(str(tmp_path / "out"))
    paths = [path for path, _ in made.values()]
    counts = prepare(store, config(*paths, max_reject_fraction=1.0, pairing="all"), seed=seed)
    assert counts["rows_in"] == ROWS_A_SHAPE * len(SHAPES) > 10_000
    written_rows, set_aside = pairs(store), rejects(store)
    assert counts["lists"]["rows"] == counts["lists"]["pairs"], "each of them is one pair"
    assert counts["lists"]["set_aside"] == {}
    assert counts["rows_in"] == len(written_rows) + counts["merged_duplicates"] + len(set_aside)
    assert counts["merged_duplicates"] == 0
    for name, (path, expected) in made.items():
        check(
            name,
            expected,
            [row for row in written_rows if row["source"] == path],
            [row for row in set_aside if row["source"] == path],
        )
        unread = counts["not_read"][path]
        assert unread["columns"] == expected.columns
        assert unread["message_keys"] == expected.keys
