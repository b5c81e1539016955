"""`cwpo ask`: which pairs are asked for, against what one sees; and the answers come back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import world
import yaml
from hostile import Ended, refused
from prepared import pairs
from prepared import write as write_rows
from small_run import small_config, write_config
from test_weigh_pairing import Run, sampled
from tiny import save_tiny

from cwpo_dist.canonical import parquet_bytes
from cwpo_dist.cli import app
from cwpo_dist.config import Config, ConfigError, PrepareConfig
from cwpo_dist.config.load import parse_config
from cwpo_dist.execution import ask as asking
from cwpo_dist.execution.ask import AskSettings
from cwpo_dist.pairs.answers import read_compared
from cwpo_dist.pairs.estimate import census
from cwpo_dist.pairs.records import (
    HEADS_SCHEMA,
    HeadScores,
    prompt_of,
    table_of,
)
from cwpo_dist.pairs.stored import read_pairs
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store


def config_of(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Config:
    source = {"path": write_rows(folder / "rows.jsonl", rows), "into": "train"}
    told = {"sources": [source], "labelled_fraction": 1.0, "rows_per_shard": 4} | changes
    return parse_config({"output_dir": str(folder / "run"), "prepare": told})


def all_labels(config: Config) -> Config:
    return with_prepare(config, labelled_fraction=1.0)


def with_prepare(config: Config, **changes: Any) -> Config:
    told = {"prepare": config.prepare.model_dump() | changes}
    return parse_config(config.model_dump() | told)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("strategy", ["uncertain", "random"])
def test_the_pairs_that_are_asked_for_are_those_that_one_sees(
    tmp_path: Path, strategy: str
) -> None:
    """A whole pass over shards, of answers with scores of their own."""
    config = all_labels(sampled(tmp_path, prepare__test_fraction=0.2))
    run = Run(config)
    given = run.score(1, few=False)
    node, _ = asking._planned(config, 12, strategy, config.arms[0])
    counts = asking._make(run.context, node)
    place = run.context.place(node)
    asked = [json.loads(line) for line in place.read("questions.jsonl").decode().splitlines()]
    free = {row["pair_id"]: row for row in pairs(run.prepared) if row["split"] == "unlabelled"}
    assert (counts["candidates"], counts["asked"]) == (len(free), 12)
    assert {row["pair_id"] for row in asked} <= free.keys()
    if strategy == "random":
        return
    text = {row["pair_id"]: (row["prompt"], row["response_a"], row["response_b"]) for row in asked}
    assert all(
        text[name] == tuple(free[name][f] for f in ("prompt", "response_a", "response_b"))
        for name in text
    )
    margin = {
        name: abs(
            run.texts[row["prompt"], row["response_a"]]
            - run.texts[row["prompt"], row["response_b"]]
        )
        for name, row in free.items()
    }
    first = {min(own, key=lambda n: (margin[n], n)) for own in by_prompt(margin).values()}
    plain = sorted(first, key=lambda n: (margin[n], n))
    assert [row["pair_id"] for row in asked][: len(plain)] == plain[:12]
    assert counts["prompts_asked"] == min(12, len(plain))
    assert len(given) > 12


def by_prompt(names: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(prompt_of(name), []).append(name)
    return found


def test_several_annotators_decide_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Margins m and 3m of three pairs; one that lacks a score is counted."""
    bare = [row | {"label": None} for row in world.pairs("unlabelled")]
    given = world.pairs
    monkeypatch.setattr(
        world, "pairs", lambda split: bare if split == "unlabelled" else given(split)
    )
    told = {"prepare": {"labelled_fraction": 1.0}, "fit": {"seeds": [0, 1]}}
    made = world.World(tmp_path, ["ensemble"], **told)
    made.score("annotate_0")
    made.score("annotate_1", factor=3.0)

    def order(strategy: str, budget: int = 3) -> list[str]:
        node, _ = asking._planned(made.config, budget, strategy, "ensemble")
        counts = asking._make(made.context, node)
        assert counts["asked"] + counts["not_scored"] == budget
        lines = made.context.place(node).read("questions.jsonl").decode().splitlines()
        return [json.loads(line)["pair_id"] for line in lines]

    names = [f"unlabelled-{k}" for k in range(3)]
    assert order("disagree") == names, "σ(1) and σ(3) differ more than σ(2) and σ(6)"
    assert order("delta_ucb") == names[::-1]
    assert order("uncertain") == names
    assert order("delta_ucb", budget=1) == names[2:]
    place, name = made.place("annotate_1"), part("scores", 0)
    scores = place.read_table(name)
    lost = pc.equal(scores["answer_id"], world.named("unlabelled", 2, "b"))
    place.write(name, parquet_bytes(scores.filter(pc.invert(lost))))
    assert order("delta_ucb") == [names[1], names[0]]


@pytest.mark.usefixtures("in_process")
def test_states_tell_what_is_asked_for_together(tmp_path: Path) -> None:
    """States of a pair's answers: a number each; what is labelled is known in its direction."""
    rows = [
        {"prompt": f"Q{k}?", "response_a": f"yes {k}", "response_b": f"no {k}"} for k in range(9)
    ]
    rows[0]["label"] = rows[1]["label"] = "a"
    save_tiny(tmp_path / "model", "llama", 0)
    weak = {"weak": {"model_name_or_path": str(tmp_path / "model")}}
    config = parse_config(config_of(tmp_path, rows).model_dump() | weak)
    node, needed = asking._planned(config, 4, "information", "weak")
    assert [each.stage for each in needed] == ["prepare", "fit"]
    assert node.inputs["states"].path.startswith("states/")
    context = asking.Context(Store(config.output_dir))
    store, states = (context.place(node.inputs[name]) for name in ("prepare", "states"))
    store.create_json("manifest.json", {"counts": prepare(store, config.prepare, config.seed)})
    direction: dict[str, int] = {}  # of each pair: nine of four
    for index in range(context.shards(node)):
        given = read_compared(store, index)
        number = {pair.pair_id: int(str(pair.prompt)[1]) for pair in read_pairs(store, index)}
        told = []
        for pair in given:
            direction[pair.pair_id] = number[pair.pair_id] % 4
            state = np.eye(4)[direction[pair.pair_id]] * (3 + number[pair.pair_id] / 100)
            told += [(pair.answer_a, [*state, 0.1]), (pair.answer_b, [0.0] * 5)]
        if index == 0:
            told.pop()  # which the annotator could not read
        scores = [HeadScores(name, "m", 0.0, None, heads) for name, heads in told]
        states.create_table(part("scores", index), table_of(scores, HEADS_SCHEMA))
    counts = asking._make(context, node)
    lines = context.place(node).read("questions.jsonl").decode().splitlines()
    asked = [direction[json.loads(line)["pair_id"]] for line in lines]
    assert (counts["asked"], counts["candidates"] + counts["not_scored"]) == (4, 7)
    assert set(asked[:2]) == {2, 3}, "where nothing is labelled"


def messages(*said: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)]


CALL = {"name": "find", "arguments": {"id": 9007199254740993, "share": 1.0}}
CONVERSATIONS = [
    {
        "prompt": messages(f"Find {k}."),
        "response_a": [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": CALL}],
            }
        ],
        "response_b": messages("", f"It is {k}.")[1:],
        "tools": [{"type": "function", "function": {"name": "find", "parameters": {"n": 1e30}}}],
    }
    for k in range(3)
]
TEXTS = [{"prompt": f"Q{k}?", "response_a": f"yes {k}", "response_b": f"no {k}"} for k in range(9)]


def asked_of(config: Config, budget: int = 99) -> list[dict[str, Any]]:
    """The questions of strategy `random`, by a run that has prepared its pairs."""
    node, _ = asking._planned(config, budget, "random", config.arms[0])
    context = asking.Context(Store(config.output_dir))
    place = context.place(node.inputs["prepare"])
    place.create_json("manifest.json", {"counts": prepare(place, config.prepare, config.seed)})
    asking._make(context, node)
    lines = context.place(node).read("questions.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines]


def voted(row: dict[str, Any], a: int, b: int, tie: int = 0) -> dict[str, Any]:
    return row | {"votes_a": a, "votes_b": b, "votes_tie": tie, "annotator": "Ann"}


def answered(config: Config, people: list[list[dict[str, Any]]]) -> PrepareConfig:
    """The same sources, and a file of each person, as `cwpo ask` says that they are named."""
    folder, sources = Path(config.output_dir).parent, [config.prepare.sources[0].model_dump()]
    for k, said in enumerate(people):
        form = "text" if isinstance(said[0]["prompt"], str) else "conversational"
        file = write_rows(folder / f"answers-{k}.jsonl", said)
        sources.append({"path": file, "format": form, "into": "labelled"})
    return with_prepare(config, sources=sources).prepare


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("rows", [TEXTS, CONVERSATIONS], ids=["texts", "conversations"])
def test_votes_that_come_back_label_the_pairs_that_were_asked_for(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    """Copies of the same pairs, whatever they hold; three people's votes make one label."""
    config = config_of(tmp_path, rows, labelled_fraction=0.0)  # which hides no answer
    asked = asked_of(config)
    assert len(asked) == len(rows)
    first, second, third = asked[:3]
    people = [
        [voted(first, 1, 0), voted(second, 0, 1), voted(third, 0, 0, 1)],
        [voted(first, 1, 0), voted(second, 0, 1), voted(third, 1, 0)],
        [voted(first, 0, 1)],
    ]
    again = answered(config, people)
    store = Store(str(tmp_path / "again"))
    counts = prepare(store, again, config.seed)
    by_id = {row["pair_id"]: row for row in pairs(store)}
    assert len(by_id) == len(rows), "each answer is a copy of its pair"
    assert [by_id[row["pair_id"]]["label"] for row in (first, second, third)] == ["a", "b", None]
    assert by_id[third["pair_id"]]["tie"]
    assert by_id[first["pair_id"]]["split"] == "labelled"
    told = by_id[first["pair_id"]]
    assert (told["votes_a"], told["votes_b"], told["votes_tie"]) == (2, 1, 0)
    assert counts["splits"]["labelled"] == 2
    assert not any(counts["rejects"].values())


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("flipped", [0.0, 0.5])
def test_a_hidden_label_is_the_answer_to_its_question(tmp_path: Path, flipped: float) -> None:
    """What was asked for is a source without labels: copies of pairs that have some."""
    rows = [
        {
            "prompt": f"Q{k}?",
            "response_a": f"yes {k}",
            "response_b": f"no {k}",
            "label": "ab"[k % 2],
        }
        for k in range(40)
    ]
    config = config_of(tmp_path, [*rows, *TEXTS], labelled_fraction=0.5, flipped_labels=flipped)
    nodes = asking.nodes_until(config, "weak", "prepare")
    node = asking.ask_node(AskSettings("random", 9, config.seed, hidden=True), nodes)
    context = asking.Context(Store(config.output_dir))
    place = context.place(node.inputs["prepare"])
    before = prepare(place, config.prepare, config.seed)
    place.create_json("manifest.json", {"counts": before})
    counts = asking._make(context, node)
    assert counts["candidates"] == before["labelled"]["unlabelled"] > 9
    asked = {"path": context.place(node).child("questions.jsonl").uri, "into": "labelled"}
    sources = [config.prepare.sources[0].model_dump(), asked | {"format": "text"}]
    again = with_prepare(config, sources=sources).prepare
    store = Store(str(tmp_path / "again"))
    after = prepare(store, again, config.seed)
    assert after["splits"]["labelled"] == before["splits"]["labelled"] + 9
    first, second = ({row["pair_id"]: row for row in pairs(each)} for each in (place, store))
    assert {k: v["label"] for k, v in first.items()} == {k: v["label"] for k, v in second.items()}
    moved = {name for name in first if first[name]["split"] != second[name]["split"]}
    assert len(moved) == 9
    counted = census(again, config.seed)
    assert counted.splits["labelled"] == after["splits"]["labelled"]


@pytest.mark.usefixtures("in_process")
def test_who_was_asked_is_not_asked_again(tmp_path: Path) -> None:
    """Labels and ties are answers."""
    rows = [*TEXTS[:4], TEXTS[4] | {"label": "a"}, TEXTS[5] | {"label": "tie"}]
    config = config_of(tmp_path, rows)
    assert {row["prompt"] for row in asked_of(config)} == {row["prompt"] for row in TEXTS[:4]}
    (tmp_path / "all").mkdir()
    answered = config_of(tmp_path / "all", [row | {"label": "b"} for row in TEXTS])
    with pytest.raises(ConfigError, match="every training pair has a label"):
        asked_of(answered)


@pytest.mark.usefixtures("in_process")
def test_pairs_of_single_responses_keep_their_columns_when_answered(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Q{k}?", "response": f"{word} {k}", "topic": f"t{k}"}
        for k in range(3)
        for word in ("yes", "no")
    ]
    config = config_of(tmp_path, rows, pairing="all", keep_columns=["topic"])
    asked = asked_of(config)
    again = answered(config, [[voted(row, 1, 0) for row in asked]])
    store = Store(str(tmp_path / "again"))
    prepare(store, again, config.seed)
    found = pairs(store)
    assert [row["label"] for row in found] == ["a"] * 3
    assert {row["topic"] for row in found} == {"t0", "t1", "t2"}
    assert {row["source"] for row in found} == {config.prepare.sources[0].path}


@pytest.mark.usefixtures("in_process")
def test_texts_that_look_like_something_else_come_back_as_they_are(tmp_path: Path) -> None:
    """Transcripts as plain text, and tools that few rows have, far down."""
    like = "\n\nHuman: q\n\nAssistant:"
    rows = [*TEXTS, {"prompt": like, "response_a": f"{like} x", "response_b": f"{like} y"}]
    config = config_of(tmp_path, rows)
    asked = asked_of(config)
    only = [voted(row, 1, 0) for row in asked if row["prompt"] == like]
    store = Store(str(tmp_path / "again"))
    counts = prepare(store, answered(config, [only]), config.seed)
    assert (counts["pairs"], counts["merged_duplicates"]) == (10, 1)
    few = [*({k: v for k, v in row.items() if k != "tools"} for row in CONVERSATIONS[:2])]
    (tmp_path / "few").mkdir()
    asked = asked_of(config_of(tmp_path / "few", [*few, CONVERSATIONS[2]]))
    assert ["tools" in row for row in asked] == [True] * 3


def test_what_could_not_be_used_is_refused(tmp_path: Path) -> None:
    plan = asking._planned
    for arm, said in {
        "nope": "unknown arm 'nope'",
        "ws_dpo": "no scores of unlabelled",
        "human_weighed": "no scores of unlabelled",
    }.items():
        with pytest.raises(ConfigError, match=f"--arm: .*{said}"):
            plan(config_of(tmp_path, TEXTS), 1, "random", arm)
    config = all_labels(sampled(tmp_path / "one"))
    with pytest.raises(ConfigError, match=r"--strategy: 'disagree' needs 2 annotators"):
        plan(config, 1, "disagree", "cw")


def unlabelled(folder: Path) -> Path:
    """A configuration of pairs that nobody has judged."""
    made = small_config(folder, prepare__labelled_fraction=1.0, prepare__test_fraction=0.0)
    source = Path(made["prepare"]["sources"][0]["path"])
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    texts = ("prompt", "response_a", "response_b")
    write_rows(source, [{name: row[name] for name in texts} for row in rows])
    return write_config(folder / "run.yaml", made)


@pytest.fixture
def by_command(ray_local: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """`cwpo ask` here, however long what it does first takes."""

    def ended(*arguments: object) -> Ended:
        with pytest.raises(SystemExit) as found:
            app.main(["ask", *map(str, arguments)])
        return Ended(found.value.code, "".join(capsys.readouterr()))

    return ended


def test_the_command_asks_before_there_is_any_label(
    tmp_path: Path, by_command: Callable[..., Ended]
) -> None:
    """By lot, of what `prepare` makes first; an annotator that nobody can train is refused."""
    config = unlabelled(tmp_path)
    by_lot = (config, "--strategy", "random", "--budget", 7)
    ended = by_command(*by_lot)
    assert ended.code == 0, ended.said
    said = " ".join(ended.said.split())
    assert "7 of 96 pairs without a label" in said
    (place,) = (tmp_path / "run" / "ask").iterdir()
    assert str(place / "page.html") in said
    lines = (place / "questions.jsonl").read_text().splitlines()
    assert len(lines) == len(json.loads((place / "label_studio.json").read_text())) == 7
    assert by_command(*by_lot).code == 0
    refused(by_command(config), "--strategy: 'uncertain'", "begin with --strategy random")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_from_no_label_to_an_annotator_that_asks_itself(
    tmp_path: Path, by_command: Callable[..., Ended]
) -> None:
    """Ask by lot, label, train on the answers, ask what the annotator is unsure of."""
    config = unlabelled(tmp_path)
    assert by_command(config, "--strategy", "random", "--budget", 30).code == 0
    (first,) = (tmp_path / "run" / "ask").iterdir()
    asked = [json.loads(line) for line in (first / "questions.jsonl").read_text().splitlines()]
    answers = write_rows(tmp_path / "answers-ann.jsonl", [voted(row, 1, 0) for row in asked])
    made = yaml.safe_load(config.read_text())
    made["prepare"]["sources"].append({"path": answers, "into": "train"})
    write_config(config, made)
    ended = by_command(config, "--budget", 10)
    assert ended.code == 0, ended.said
    assert "10 of 66 pairs without a label" in ended.said
    (second,) = {*(tmp_path / "run" / "ask").iterdir()} - {first}
    again = [json.loads(line) for line in (second / "questions.jsonl").read_text().splitlines()]
    assert not {row["pair_id"] for row in again} & {row["pair_id"] for row in asked}
