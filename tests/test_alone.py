"""Rows of one response each: their pairs are those of lists, and what stands in none is kept."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from prepared import Rows, config, files, pairs, rejects, whole, write
from small_run import small_config
from test_row_forms import ASK, FAIR, FOUR, GOOD, POOR, SCORES, WHO_WINS, WORST, labelled

from cwpo_dist.config import ConfigError
from cwpo_dist.config.load import parse_config
from cwpo_dist.pairs import sources
from cwpo_dist.pairs.answers import read_answers
from cwpo_dist.pairs.estimate import census
from cwpo_dist.pairs.records import answer_id, prompt_id
from cwpo_dist.pairs.row_forms import growth
from cwpo_dist.pairs.splits import SPLITS
from cwpo_dist.runs.checks import check
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store

NAMED = {"response": "completion"}


def one(text: Any, score: Any = None, prompt: str = ASK, **more: Any) -> dict[str, Any]:
    rated = {} if score is None else {"score": score}
    return {"prompt": prompt, "completion": text, **rated, **more}


def prepared(
    folder: Path, rows: Rows, pairing: str, seed: int = 0, **changes: Any
) -> tuple[Store, Any]:
    source = write(folder / "x.jsonl", rows)
    store = Store(str(folder / f"out-{pairing}"))
    given: dict[str, Any] = {"max_reject_fraction": 1.0} | changes
    source_given = {"path": source, "columns": NAMED}
    return store, prepare(store, config(source_given, pairing=pairing, **given), seed)


def add_up(counts: Any, store: Store) -> None:
    """Every row is in a pair, in an answer that stands in none, a copy, or a reject."""
    alone = counts["alone"]
    of_rows = sum(counts["rejects"].values())
    assert len(rejects(store)) == of_rows
    made = counts["rows_in"] - alone["rows"] + alone["pairs"]
    assert made == counts["pairs"] + counts["merged_duplicates"] + of_rows
    assert counts["pairs"] == len(pairs(store))
    assert sum(counts["answers_alone"].values()) == alone["in_no_pair"] == len(left(store))


def left(store: Store) -> dict[str, str]:
    """The answers that stand in no pair → their split."""
    shards = range(len(store.names("answers")))
    answers = [answer for index in shards for answer in read_answers(store, index)]
    assert len({answer.answer_id for answer in answers}) == len(answers), "each once"
    return {str(answer.answer): answer.alone for answer in answers if answer.alone is not None}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("pairing", list(WHO_WINS))
def test_the_higher_score_wins(tmp_path: Path, pairing: str) -> None:
    rows = [one(text, score) for text, score in zip(FOUR, SCORES, strict=True)]
    store, counts = prepared(tmp_path, rows, pairing)
    assert sorted(labelled(store)) == sorted(WHO_WINS[pairing])
    add_up(counts, store)
    by_score = dict(zip(FOUR, SCORES, strict=True))
    for pair in pairs(store):
        assert [pair["score_a"], pair["score_b"]] == [
            by_score[pair["response_a"]],
            by_score[pair["response_b"]],
        ]
    in_pairs = {text for both in WHO_WINS[pairing] for text in both}
    assert left(store).keys() == {*FOUR} - in_pairs


@pytest.mark.usefixtures("in_process")
def test_the_lower_rank_wins_and_is_no_score(tmp_path: Path) -> None:
    rows = [
        {"prompt": ASK, "completion": text, "rank": rank}
        for text, rank in ((POOR, 3), (GOOD, 1), (FAIR, 2))
    ]
    store, counts = prepared(tmp_path, rows, "adjacent")
    assert sorted(labelled(store)) == sorted([(GOOD, FAIR), (FAIR, POOR)])
    assert {pair["score_a"] for pair in pairs(store)} == {None}
    assert counts["numbers"] == {}


@pytest.mark.usefixtures("in_process")
def test_true_and_false_are_scores(tmp_path: Path) -> None:
    rows = [
        {"prompt": ASK, "completion": text, "label": good}
        for text, good in ((POOR, False), (GOOD, True), (FAIR, True), (WORST, False))
    ]
    source = {
        "path": write(tmp_path / "x.jsonl", rows),
        "columns": {"response": "completion", "score": "label"},
    }
    store = Store(str(tmp_path / "out"))
    prepare(store, config(source, pairing="all"), seed=0)
    assert set(labelled(store)) == {(a, b) for a in (GOOD, FAIR) for b in (POOR, WORST)}


def some_rows(seed: int, prompts: int = 40) -> tuple[Rows, Rows]:
    """Prompts with one to six responses, some with one score: as lists, and shuffled by row."""
    draw = random.Random(seed)
    lists, alone = [], []
    for k in range(prompts):
        texts = [f"answer {j} to {k}" for j in range(draw.randint(1, 6))]
        scores = [draw.randint(0, 4) for _ in texts]
        prompt = f"What is {k}?"
        if len(texts) > 1:
            lists.append({"prompt": prompt, "responses": texts, "scores": scores})
        alone += [one(*each, prompt=prompt) for each in zip(texts, scores, strict=True)]
    draw.shuffle(alone)
    return lists, alone


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("pairing", list(WHO_WINS))
@pytest.mark.parametrize("buckets", [1, 3])
def test_their_pairs_are_those_of_the_same_responses_in_lists(
    tmp_path: Path, pairing: str, buckets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if buckets > 1:
        monkeypatch.setattr(sources, "BUCKET_BYTES", 2000)
    lists, alone = some_rows(5)
    shares = {"labelled_fraction": 0.5, "validation_fraction": 0.2, "test_fraction": 0.2}
    more = {**shares, "rows_per_shard": 16}
    listed = Store(str(tmp_path / "listed"))
    source = write(tmp_path / "lists.jsonl", lists)
    of_lists = prepare(listed, config(source, pairing=pairing, **more), seed=3)
    store, counts = prepared(tmp_path, alone, pairing, seed=3, **more)
    assert counts["shards"] > buckets
    drop = ["source"]
    ours, theirs = whole(store).drop_columns(drop), whole(listed).drop_columns(drop)
    assert ours.equals(theirs)
    assert counts["alone"]["ties"] == of_lists["lists"]["ties"] > 0
    for name in ("pairs", "splits", "labelled", "prompts", "answers", "numbers"):
        assert counts[name] == of_lists[name], name
    add_up(counts, store)
    paired = {text for pair in pairs(store) for text in (pair["response_a"], pair["response_b"])}
    assert left(store).keys() == {row["completion"] for row in alone} - paired
    assert set(left(store).values()) <= {"unlabelled", "validation", "test"}


@pytest.mark.usefixtures("in_process")
def test_the_order_of_rows_changes_nothing(tmp_path: Path) -> None:
    _, alone = some_rows(7)
    found = []
    for name in ("one", "other"):
        (folder := tmp_path / name).mkdir()
        store, _ = prepared(folder, alone, "all", rows_per_shard=16)
        names = [name for name in sorted(files(store)) if name.endswith(".parquet")]
        tables = [store.read_table(name) for name in names]
        found.append([table.drop_columns(["source"]) for table in tables if len(table.columns) > 3])
        random.Random(1).shuffle(alone)
    assert all(a.equals(b) for a, b in zip(*found, strict=True))


@pytest.mark.usefixtures("in_process")
def test_without_pairing_they_are_answers_in_no_pair(tmp_path: Path) -> None:
    _, alone = some_rows(1)
    shares = {"validation_fraction": 0.2, "test_fraction": 0.2, "rows_per_shard": 16}
    store, counts = prepared(tmp_path, alone, "given", **shares)
    assert counts["pairs"] == 0
    add_up(counts, store)
    sides = left(store)
    assert sides.keys() == {row["completion"] for row in alone}
    assert set(sides.values()) == {"unlabelled", "validation", "test"}
    of_prompts: dict[str, set[str]] = defaultdict(set)
    for text, split in sides.items():
        of_prompts[text.split(" to ")[1]].add(split)
    assert all(len(splits) == 1 for splits in of_prompts.values())
    assert sum(counts["prompts_alone"].values()) == len(of_prompts)
    shards = range(counts["shards"])
    assert counts["shards"] > 4
    scored = AnswersIn(store, ("unlabelled", "test"), alone=True)
    read = [row.given for index in shards for row in scored.read(index)]
    assert {row.answer for row in read} == {t for t, s in sides.items() if s != "validation"}
    assert {row.answer_id for row in read} == {
        answer_id(prompt_id(row.prompt), row.answer) for row in read
    }
    for given in (AnswersIn(store), AnswersIn(store, SPLITS)):
        assert not any(given.read(index) for index in shards), "trainings read pairs alone"


@pytest.mark.usefixtures("in_process")
def test_copies_and_ratings_that_differ_or_are_missing(tmp_path: Path) -> None:
    rows = [
        one(GOOD, 3),
        one(GOOD, 3),
        one(FAIR, 1),
        one(FAIR, 2),  # rated twice: not rated
        one(POOR, 1),
        one(WORST),
        one("so-so", prompt="Another?", score=1),
    ]
    store, counts = prepared(tmp_path, rows, "best_worst")
    assert list(labelled(store)) == [(GOOD, POOR)]
    assert left(store).keys() == {FAIR, WORST, "so-so"}
    alone = counts["alone"]
    assert (alone["rows"], alone["answers"], alone["rated_twice"]) == (7, 5, 1)
    add_up(counts, store)
    store, counts = prepared(tmp_path, rows, "all")
    found = {frozenset((p["response_a"], p["response_b"])): p["label"] for p in pairs(store)}
    assert len(found) == 6
    assert [both for both, label in found.items() if label] == [frozenset((GOOD, POOR))]
    assert left(store).keys() == {"so-so"}
    add_up(counts, store)


@pytest.mark.usefixtures("in_process")
def test_a_pair_that_is_given_and_made_is_one(tmp_path: Path) -> None:
    given = [
        {"prompt": ASK, "chosen": GOOD, "rejected": POOR},
        {"prompt": ASK, "chosen": WORST, "rejected": FAIR},
    ]
    rows = [one(text, score) for text, score in zip(FOUR, SCORES, strict=True)]
    listed = [
        {"path": write(tmp_path / "pairs.jsonl", given)},
        {"path": write(tmp_path / "x.jsonl", rows), "columns": NAMED},
    ]
    store = Store(str(tmp_path / "out"))
    counts = prepare(store, config(*listed, pairing="all"), seed=0)
    assert (counts["pairs"], counts["merged_duplicates"]) == (6, 2)
    assert counts["conflicting_labels"] == 1
    found = {frozenset((p["response_a"], p["response_b"])): p for p in pairs(store)}
    assert found[frozenset((WORST, FAIR))]["label"] is None
    agreed = found[frozenset((GOOD, POOR))]
    assert agreed[f"response_{agreed['label']}"] == GOOD
    assert {agreed["score_a"], agreed["score_b"]} == {9.0, 2.0}
    add_up(counts, store)


@pytest.mark.usefixtures("in_process")
def test_a_prompt_on_two_sides_keeps_one_and_names_what_goes(tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", [one(GOOD, 2), one(POOR, 1)])
    train = write(tmp_path / "train.jsonl", [one(FAIR, 2), one("soon", 1, prompt="When?")])
    listed = [
        {"path": test, "into": "test", "columns": NAMED},
        {"path": train, "into": "train", "columns": NAMED},
    ]
    store = Store(str(tmp_path / "out"))
    counts = prepare(store, config(*listed, pairing="all", max_reject_fraction=1.0), seed=0)
    assert list(labelled(store)) == [(GOOD, POOR)]
    (reject,) = rejects(store)
    assert reject["reason"].startswith("prompt in the test part") or "test" in reject["reason"]
    assert FAIR in reject["row"]
    assert "response_b" not in reject["row"]
    assert left(store) == {"soon": "unlabelled"}
    add_up(counts, store)


@pytest.mark.usefixtures("in_process")
def test_kept_columns_are_those_on_which_both_agree(tmp_path: Path) -> None:
    rows = [one(GOOD, 2, model="x", topic="rice"), one(POOR, 1, model="y", topic="rice")]
    store, _ = prepared(tmp_path, rows, "all", keep_columns=["model", "topic"])
    (pair,) = pairs(store)
    assert (pair["model"], pair["topic"]) == (None, "rice")


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("pairing", ["given", *WHO_WINS])
@pytest.mark.parametrize("into", [None, "test", "labelled"])
def test_the_census_counts_what_prepare_makes(
    tmp_path: Path, pairing: str, into: str | None
) -> None:
    _, alone = some_rows(11)
    _, more = some_rows(11, prompts=12)
    given = [
        {"prompt": f"What is {k}?", "chosen": f"answer 0 to {k}", "rejected": f"answer 1 to {k}"}
        for k in range(10)
    ]
    listed = [
        {"path": write(tmp_path / "x.jsonl", alone), "columns": NAMED},
        {"path": write(tmp_path / "y.jsonl", more), "columns": NAMED},
        {"path": write(tmp_path / "pairs.jsonl", given)},
    ]
    if into is not None:
        listed[1]["into"] = into
    told = config(*listed, pairing=pairing, labelled_fraction=0.5, max_reject_fraction=1.0)
    store = Store(str(tmp_path / "out"))
    counts = prepare(store, told, seed=2)
    seen = census(told, seed=2)
    assert seen.exact
    assert seen.alone.__dict__ == counts["alone"]
    assert seen.merged == counts["merged_duplicates"]
    assert seen.rejects == sum(counts["rejects"].values())
    assert (seen.rejects > 0) == (into is not None)
    for name in ("splits", "labelled", "prompts", "answers", "answers_alone", "prompts_alone"):
        told_there = {split: number for split, number in counts[name].items() if number}
        found = {split: number for split, number in getattr(seen, name).items() if number}
        assert found == told_there, name
    assert seen.own.get("scores", {}) == {} or sum(seen.own["scores"].values()) == sum(
        pair["score_a"] is not None for pair in pairs(store)
    )
    add_up(counts, store)


@pytest.mark.usefixtures("in_process")
def test_an_answer_keeps_the_source_and_columns_of_its_own_row(tmp_path: Path) -> None:
    listed = [
        {"path": write(tmp_path / f"{name}.jsonl", [one(text, score, id=name)]), "columns": NAMED}
        for name, text, score in (("x", GOOD, 2), ("y", POOR, 1))
    ]
    listed.append({"path": write(tmp_path / "z.jsonl", [one("soon", prompt="When?", id="z")])})
    store = Store(str(tmp_path / "out"))
    prepare(store, config(*listed, pairing="all", keep_columns=["id"]), seed=0)
    table = store.read_table("answers/part-00000.parquet")
    found = {row["answer"]: row for row in table.to_pylist()}
    for name, text in (("x", GOOD), ("y", POOR), ("z", "soon")):
        assert (found[text]["source"], found[text]["id"]) == (str(tmp_path / f"{name}.jsonl"), name)
    assert [found[text]["split"] for text in (GOOD, POOR)] == [None, None]
    assert found["soon"]["split"] is not None


@pytest.mark.usefixtures("in_process")
def test_true_and_false_in_cells_are_scores(tmp_path: Path) -> None:
    (path := tmp_path / "x.csv").write_text(
        f"prompt,completion,label\np,{GOOD},True\np,{POOR},False\n"
    )
    source = {"path": str(path), "columns": {"response": "completion", "score": "label"}}
    store = Store(str(tmp_path / "out"))
    prepare(store, config(source, pairing="all"), seed=0)
    assert list(labelled(store)) == [(GOOD, POOR)]


@pytest.mark.usefixtures("in_process")
def test_a_rating_that_nobody_reads_takes_no_answer_out(tmp_path: Path) -> None:
    rows = [one(GOOD, "n/a", reward="?"), one(POOR, 3)]
    store, counts = prepared(tmp_path, rows, "given", max_reject_fraction=0.0)
    assert left(store).keys() == {GOOD, POOR}
    assert counts["rejects"] == {}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, "chosen": GOOD, "rejected": POOR, "answer": "x", "output": "y"},
        {
            "prompt": ASK,
            "responses": [GOOD, POOR],
            "scores": [2, 1],
            "response": "x",
            "answer": "y",
        },
        {"prompt": ASK, "responses": [GOOD, POOR], "scores": [2, 1], "answer": "x", "score": 1},
    ],
)
def test_what_has_pairs_or_lists_is_no_response_a_row(tmp_path: Path, row: dict[str, Any]) -> None:
    lists = {"prompt": "Which?", "responses": [FAIR, WORST], "scores": [1, 0]}
    listed = [write(tmp_path / "x.jsonl", [row]), write(tmp_path / "y.jsonl", [lists])]
    planned = sources.plan(config(*listed, pairing="all"))
    assert not any("response" in piece.layout.columns for piece in planned.pieces)


def test_what_makes_no_pair_is_refused_before_it_is_scored(tmp_path: Path) -> None:
    given = small_config(tmp_path)
    write(Path(given["prepare"]["sources"][0]["path"]), [one(GOOD), one(POOR)])
    given["prepare"]["sources"][0]["columns"] = NAMED
    with pytest.raises(ConfigError, match=r"prepare\.pairing: given, but its sources have one"):
        check(parse_config(given), "weigh")


def test_many_responses_to_a_prompt_are_parted_into_more_buckets(tmp_path: Path) -> None:
    rows = [one("x" * 600 + str(k), prompt=f"{k // 60}") for k in range(600)]
    source = {"path": write(tmp_path / "x.jsonl", rows), "columns": NAMED}
    layout = sources.plan(config(source, pairing="all")).pieces[0].layout
    assert growth(rows, layout) == pytest.approx(600 * 59 / 2 * 300 / (600 * 660), rel=0.1)
    assert growth(rows[::60], layout) == 1.0
