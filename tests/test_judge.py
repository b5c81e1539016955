"""Win rates by people and a model: the estimate against its formula, and the way of a verdict."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from prepared import write as write_rows
from test_direction_judged import ZS
from world import World, reference

from cwpo_dist.config import CompareConfig, ConfigError
from cwpo_dist.evaluation.prediction_powered import powered
from cwpo_dist.evaluation.student import student
from cwpo_dist.execution import judge
from cwpo_dist.pairs.records import ANSWER_SCHEMA
from cwpo_dist.report.judged_table import judged_tables
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages import evaluate
from cwpo_dist.storage import MANIFEST, Store


def drawn() -> tuple[Any, Any]:
    """What people say of 60 items, and a model of 240."""
    rng = np.random.default_rng(7)
    model = np.round(rng.random(240), 2)
    people = (rng.random(240) < 0.15 + 0.7 * model).astype(float)
    return np.where(np.arange(240) < 60, people, np.nan), model


def test_the_estimate_is_its_formula() -> None:
    """Where no prompt repeats: θ, λ, the variance and Wilson's interval, term by term."""
    people, model = drawn()
    found = powered(people, model, np.arange(240))
    y, f, g = people[:60], model[:60], model[60:]
    weight = np.cov(y, f, ddof=0)[0, 1] / 60 / (f.var() / 60 + g.var() / 180)
    assert found.weight == pytest.approx(weight)
    assert found.both.value == pytest.approx(y.mean() + weight * (g.mean() - f.mean()))
    gaps = np.concatenate([(f.mean() - f) / 60, (g - g.mean()) / 180])
    errors = weight * gaps + np.concatenate([(y - y.mean()) / 60, np.zeros(180)])
    variance = 60 / 59 * np.sum((errors / (1 - gaps**2 / np.sum(gaps**2))) ** 2)
    plain = (y - weight * f).var() / 58 + weight**2 * g.var() / 180
    assert variance == pytest.approx(plain, rel=0.05), "leverages are small"
    ends = []
    for share, error2, freedom in (
        (found.both.value, variance, 58),
        (y.mean(), y.var(ddof=1) / 60, 59),
    ):
        worth, t2 = share * (1 - share) / error2, student(0.975, freedom) ** 2
        half = math.sqrt(t2 * share * (1 - share) / worth + t2**2 / (4 * worth**2))
        ends += [(share + t2 / (2 * worth) + side * half) / (1 + t2 / worth) for side in (-1, 1)]
    assert [found.both.low, found.both.high, found.people.low, found.people.high] == pytest.approx(
        ends
    )
    assert found.narrower == pytest.approx(1 - (ends[1] - ends[0]) / (ends[3] - ends[2]))
    assert found.model.value == pytest.approx(model.mean())


def test_the_estimate_is_that_of_the_authors() -> None:
    """By ppi_py 0.2.3 on the same numbers with lam=0.41280497, whose interval is the normal's."""
    people, model = drawn()
    found = powered(people, model, np.arange(240))
    assert found.weight == pytest.approx(0.41280497)
    assert found.both.value == pytest.approx(0.56135214, abs=1e-8)
    assert (found.both.low, found.both.high) == pytest.approx((0.44040655, 0.68229773), abs=0.01)


def test_what_a_model_is_worth_where_it_is_worth_nothing() -> None:
    people, model = drawn()
    every = np.arange(240)
    for useless in (np.full(240, 0.3), 1 - model):
        found = powered(people, useless, every)
        assert (found.weight, found.both, found.narrower) == (0.0, found.people, 0.0)
    all_said = powered(np.nan_to_num(people, nan=1.0), model, every)
    assert all_said.both == all_said.people, "the model knows of no item that people do not"
    nobody = powered(np.full(240, np.nan), model, every)
    assert (nobody.people.value, nobody.both.value, nobody.narrower) == (None, None, None)
    one = powered(np.where(every < 1, 1.0, np.nan), model, every)
    assert (one.people.value, one.people.low) == (1.0, None)
    agreed = powered(np.where(every < 20, 1.0, np.nan), model, every)
    assert agreed.people.low == pytest.approx(20 / (20 + student(0.975, 19) ** 2)), "Wilson's of 20"
    assert agreed.both == agreed.people


def test_copies_of_a_prompt_add_nothing() -> None:
    people, model = drawn()
    once = powered(people, model, np.arange(240))
    twice = powered(people.repeat(2), model.repeat(2), np.arange(240).repeat(2))
    assert twice.both == once.both
    assert (twice.judged, twice.items) == (120, 480)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Two arms that answered three prompts; `cw` has the more z in the first and second."""
    gold = {"num_prompts": 3, "gold_function": "test_direction_judged:counted_zs"}
    made = World(tmp_path, ["cw", "human"], evaluate=gold)
    texts = {
        "cw": ZS | {"answers_aligned": ["zzzz cw", "zzz cw", "z cw"]},
        "human": ZS | {"answers_aligned": ["z human", "z human", "zzz human"]},
    }
    laid = set()
    for arm, answers in texts.items():
        for role, given in answers.items():
            if made.node(role, arm).path in laid:
                continue
            laid.add(made.node(role, arm).path)
            ids = [f"test-{k}" for k in range(3)]
            table = pa.table({"pair_id": ids, "answer": given}, schema=ANSWER_SCHEMA)
            made.place(role, arm).create_table(part("answers", 0), table)
        for role in ("reference", "aligned"):
            if made.node(role, arm).path not in laid:
                laid.add(made.node(role, arm).path)
                made.log_probs(role, arm, reference)
        made.score(arm=arm) if arm == "cw" else None
        evaluate.make(made.context, made.node("evaluate", arm))
        made.place("evaluate", arm).create_json(MANIFEST, {"counts": {}})
    Store(made.config.output_dir).write("metrics.json", b"{}")
    monkeypatch.setattr(judge, "show", lambda runs: runs[0])
    return made


def asked(world: World) -> list[dict[str, Any]]:
    (place,) = (Path(world.config.output_dir) / "judge").iterdir()
    return [json.loads(line) for line in (place / "questions.jsonl").read_text().splitlines()]


def told(world: World) -> list[dict[str, Any]]:
    return json.loads((Path(world.config.output_dir) / "metrics.json").read_text())["judged"]


@pytest.mark.parametrize(("liked", "share"), [("cw", 1.0), ("human", 0.0)])
def test_a_verdict_is_counted_for_whose_answer_it_is(
    world: World, tmp_path: Path, liked: str, share: float
) -> None:
    lines = judge.ask_judges(world.config, "cw", "human", 99)
    assert lines[0].startswith("3 of 3 prompts, drawn by lot, that cw and human answered")
    rows = asked(world)
    said = [row | {"label": "a" if liked in row["response_a"] else "b"} for row in rows]
    other = {"prompt": "p", "response_a": "x", "response_b": "y", "label": "a"}
    blank = rows[0] | {"label": None}
    file = write_rows(tmp_path / "answers-Ann.jsonl", [*said, other, blank])
    judge.show_judged(world.config, "cw", "human", [file])
    (found,) = told(world)
    assert (found["ours"], found["theirs"]) == ("cw", "human")
    assert (found["judged"], found["items"]) == (3, 3)
    assert found["people"]["value"] == share
    assert found["model"]["value"] == pytest.approx(2 / 3), "by the gold reward cw won two"
    assert found["left_out"] == {"without a verdict": 1, "about other answers": 1}
    (table,) = judged_tables({"judged": told(world)})
    assert [cell.text for cell in table.rows[0][:4]] == [
        "cw against human",
        "3 of 3",
        f"{100 * share:.1f} %",
        "66.7 %",
    ]
    judge.show_judged(world.config, "cw", "human", [file])
    assert len(told(world)) == 1, "given again, it takes the place of the first"


def test_votes_of_several_people_are_shares_and_sides_say_nothing(
    world: World, tmp_path: Path
) -> None:
    judge.ask_judges(world.config, "cw", "own_sft", 2)
    rows = asked(world)
    assert len(rows) == 2
    ours = ["cw" in row["response_a"] for row in rows]
    for k, who in enumerate("AB"):  # both like the first question's cw; they differ on the second
        votes = [(1, 0) if ours[0] else (0, 1), (1, 0) if k else (0, 1)]
        said = [
            row | {"votes_a": a, "votes_b": b, "votes_tie": 0, "annotator": who}
            for row, (a, b) in zip(rows, votes, strict=True)
        ]
        write_rows(tmp_path / f"answers-{who}.jsonl", said)
    judge.show_judged(world.config, "cw", "own_sft", [str(tmp_path / "answers-*.jsonl")])
    (found,) = told(world)
    assert (found["judged"], found["people"]["value"]) == (2, 0.75)


def test_what_cannot_be_judged_is_refused(world: World, tmp_path: Path) -> None:
    other = {"prompt": "p", "response_a": "x", "response_b": "y", "label": "a"}
    file = write_rows(tmp_path / "other.jsonl", [other])
    with pytest.raises(ConfigError, match="no verdict is about answers of cw and human"):
        judge.show_judged(world.config, "cw", "human", [file])
    with pytest.raises(ConfigError, match="unknown arm 'weak'"):
        judge.ask_judges(world.config, "weak", "human", 9)
    with pytest.raises(ConfigError, match="no two different answers"):
        judge.ask_judges(world.config, "cw", "cw", 9)


def test_an_empty_answer_is_judged_like_any_other(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out it would be the worst answers of a model that nobody counts."""
    read = judge.read_sampled

    def emptied(*where: Any) -> dict[str, str]:
        return {name: "" if text == "z cw" else text for name, text in read(*where).items()}

    monkeypatch.setattr(judge, "read_sampled", emptied)
    judge.ask_judges(world.config, "cw", "human", 99)
    rows = asked(world)
    assert sum(judge.NO_WORDS in (row["response_a"], row["response_b"]) for row in rows) == 1
    said = [row | {"label": "a" if "human" in row["response_a"] else "b"} for row in rows]
    judge.show_judged(world.config, "cw", "human", [write_rows(tmp_path / "said.jsonl", said)])
    (found,) = told(world)
    assert (found["judged"], found["people"]["value"], found["left_out"]) == (3, 0.0, {})


def test_each_vote_counts_once_in_whatever_row_it_stands(world: World, tmp_path: Path) -> None:
    """Three of four for ours and one more against; beside it most say that both are equal."""
    judge.ask_judges(world.config, "cw", "own_sft", 2)
    first, second = asked(world)
    sides = ["ab" if "cw" in row["response_a"] else "ba" for row in (first, second)]
    ours, theirs = sides[0]
    said = [
        first | {f"votes_{ours}": 3, f"votes_{theirs}": 1, "votes_tie": 0},
        first | {f"votes_{ours}": 0, f"votes_{theirs}": 1, "votes_tie": 0},
        second | {f"votes_{sides[1][0]}": 2, f"votes_{sides[1][1]}": 1, "votes_tie": 3},
    ]
    judge.show_judged(world.config, "cw", "own_sft", [write_rows(tmp_path / "said.jsonl", said)])
    assert told(world)[0]["people"]["value"] == pytest.approx((3 / 5 + 3.5 / 6) / 2)


def test_prompts_that_gold_could_not_read_are_counted(world: World) -> None:
    store = world.place("evaluate", "human")
    rows = store.read_table(evaluate.ANSWERS)
    gold = [None if row["pair_id"] == "test-1" else row["gold"] for row in rows.to_pylist()]
    at, field = rows.schema.get_field_index("gold"), rows.schema.field("gold")
    Path(store.root, evaluate.ANSWERS).unlink()
    store.create_table(evaluate.ANSWERS, rows.set_column(at, field, pa.array(gold)))
    lines = judge.ask_judges(world.config, "cw", "human", 99)
    assert lines[0].startswith("2 of 2 prompts")
    assert lines[1] == "1 more of them are in no win rate, as gold could not read both answers"
    lines = judge.ask_judges(world.config, "cw", "own_sft", 99)
    assert not any("in no win rate" in line for line in lines)


def test_a_report_of_other_models_gets_no_verdicts(world: World, tmp_path: Path) -> None:
    judge.ask_judges(world.config, "cw", "human", 3)
    file = write_rows(tmp_path / "said.jsonl", [row | {"label": "a"} for row in asked(world)])
    root = Store(world.config.output_dir)
    root.write("metrics.json", b'{"arms": {"cw": {"keys": {"evaluate": "another"}}}}')
    with pytest.raises(ConfigError, match="is of other settings than these"):
        judge.show_judged(world.config, "cw", "human", [file])


def test_a_comparison_of_other_models_gets_no_verdicts(world: World) -> None:
    config = world.config.model_copy(update={"compare": CompareConfig(seeds=[world.config.seed])})
    trial: dict[str, Any] = {"learning_rate": config.align.learning_rate, "stopped_after": None}
    figures = {"trials": {"human": trial}}
    Store(config.output_dir).write("comparison.json", json.dumps(figures).encode())
    judge._check_same(config, "human", figures)  # an older one, which has not kept its keys
    trial["keys"] = judge._keys(config, "human")
    judge._check_same(config, "human", figures)
    trial["keys"] = ["another"]
    with pytest.raises(ConfigError, match="give `cwpo compare` these again"):
        judge._check_same(config, "human", figures)


def test_a_comparison_in_the_folder_of_a_run_shows_its_own_page(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge.ask_judges(world.config, "cw", "human", 1)
    said = [row | {"label": "a"} for row in asked(world)]
    matches = judge._matches(world.config, "cw", "human")
    monkeypatch.setattr(judge, "_matches", lambda *_: matches)
    monkeypatch.setattr(judge, "show_comparison", lambda root: f"{root.uri}/comparison.html")
    Store(world.config.output_dir).write("comparison.json", b'{"trials": {}}')
    config = world.config.model_copy(update={"compare": CompareConfig(seeds=[0])})
    shown = judge.show_judged(config, "cw", "human", [write_rows(tmp_path / "said.jsonl", said)])
    assert shown.endswith("comparison.html")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="the comparison has no 'cw' yet; `cwpo compare` again"):
        judge.ask_judges(config, "cw", "human", 1)
