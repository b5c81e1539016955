"""Accuracies by people, by gold and by both: whose choices they are of, and that they are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import world as made_up
from world import World, answer, named, reference

from cwpo_dist.evaluation.prediction_powered import Powered, powered
from cwpo_dist.pairs.records import SCORE_SCHEMA, Score, table_of
from cwpo_dist.report.judged_table import judged_tables
from cwpo_dist.results.items import with_gold
from cwpo_dist.runs import scored_by
from cwpo_dist.runs.agreed import AGREED, AGREED_SCHEMA, Agreed
from cwpo_dist.scoring.pipeline import ShardJob, part
from cwpo_dist.stages import evaluate
from cwpo_dist.storage import Store

RULE = {"gold_function": "test_agreed:likes_b_but_in_the_third"}
SIDES = "bba"  # which answers gold prefers


def likes_b_but_in_the_third(prompt: str, text: str) -> float:
    k = int(prompt.split()[-1].rstrip(":"))
    return float(text == answer("test", k, SIDES[k]))


@pytest.fixture
def few_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the test pairs people chose a, found the second equal, and judged no third one."""
    whole = made_up.pairs

    def pairs(split: str) -> list[dict[str, Any]]:
        rows = whole(split)
        nobody = dict.fromkeys(("label", "votes_a", "votes_b"))
        return [rows[0], rows[1] | nobody | {"tie": True}, rows[2] | nobody | {"tie": False}]

    monkeypatch.setattr(made_up, "pairs", pairs)


def measured(folder: Path, **judge: Any) -> World:
    """Evaluated: the annotator scores b, a, b higher; the policy raises the text of a, a, b."""
    world = World(folder, ["cw"], evaluate=judge)
    world.score()
    world.log_probs("reference", None, reference)
    raised = {answer("test", k, side) for k, side in enumerate("aab")}
    world.log_probs("aligned", None, lambda text: reference(text) + (text in raised))
    evaluate.make(world.context, world.node("evaluate"))
    return world


BY_HAND = {  # by people and by gold: b, a, b and a, a, b against a, equal, unknown and b, b, a
    "annotator": [(0.0, 1.0), (0.5, 0.0), (None, 0.0)],
    "policy": [(1.0, 0.0), (0.5, 0.0), (None, 0.0)],
}


def agreed_of(world: World) -> dict[str, list[tuple[float | None, float | None]]]:
    found: dict[str, list[tuple[float | None, float | None]]] = {}
    rows = world.place("evaluate").read_table(AGREED).to_pylist()
    for row in sorted(rows, key=lambda row: row["pair_id"]):
        found.setdefault(row["of"], []).append((row["people"], row["gold"]))
    return found


@pytest.mark.usefixtures("few_labels")
def test_each_choice_is_held_against_people_and_a_gold_function(tmp_path: Path) -> None:
    world = measured(tmp_path, **RULE)
    assert agreed_of(world) == BY_HAND
    found = with_gold([world.place("evaluate")])
    assert {of: told["people"]["value"] for of, told in found.items()} == {
        "annotator": 0.25,
        "policy": 0.75,
    }
    assert [(told["judged"], told["items"]) for told in found.values()] == [(2, 3)] * 2


@pytest.mark.usefixtures("few_labels")
def test_a_gold_model_scores_the_split_s_own_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_shards(job: ShardJob, *_: Any) -> dict[str, Any]:
        (answers, *_) = job.make_worker.args  # type: ignore[attr-defined]  # a partial
        here = {row.name for index in range(job.shards) for row in answers.read(index)}
        assert here == {named("test", k, side) for k in range(3) for side in "ab"}
        for index in range(job.shards):
            sides = [(named("test", k, side), side == SIDES[k]) for k in range(3) for side in "ab"]
            rows = [Score(name, "gold", float(won), None) for name, won in sides if index]
            job.output.create_table(part("scores", index), table_of(rows, SCORE_SCHEMA))
        return {}

    monkeypatch.setattr(scored_by, "run_shards", run_shards)
    model = {"model_name_or_path": str(tmp_path / "model"), "chat_template": "plain"}
    assert agreed_of(measured(tmp_path, gold_model=model)) == BY_HAND


@pytest.mark.usefixtures("few_labels")
def test_pairs_that_gold_cannot_read_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the third pair one answer has no score."""

    def run_shards(job: ShardJob, *_: Any) -> dict[str, Any]:
        for index in range(job.shards):
            sides = [(named("test", k, side), side == SIDES[k]) for k in range(3) for side in "ab"]
            rows = [Score(name, "gold", float(won), None) for name, won in sides[:5] if index]
            job.output.create_table(part("scores", index), table_of(rows, SCORE_SCHEMA))
        return {}

    monkeypatch.setattr(scored_by, "run_shards", run_shards)
    model = {"model_name_or_path": str(tmp_path / "model"), "chat_template": "plain"}
    world = measured(tmp_path, gold_model=model)
    assert agreed_of(world) == {of: [*rows[:2], (None, None)] for of, rows in BY_HAND.items()}
    found = with_gold([world.place("evaluate")])
    told = [(each["judged"], each["items"], each["unread"]) for each in found.values()]
    assert told == [(2, 2, 1)] * 2
    (table,) = judged_tables({"arms": {"cw": {"with_gold": found}}})
    judged = [(row[1].text, row[1].details) for row in table.rows]
    assert judged == [("2 of 2", ("1 left out",))] * 2


def test_where_gold_has_nothing_to_add_nothing_changes(tmp_path: Path) -> None:
    with_rule, without = measured(tmp_path / "a", **RULE), measured(tmp_path / "b")
    places = [world.place("evaluate") for world in (with_rule, without)]
    files = [{name: place.read(name) for name in place.names()} for place in places]
    assert files[0] == files[1]
    assert set(files[0]) == {"metrics.json", evaluate.ITEMS}


def test_seeds_are_put_together_prompt_by_prompt(tmp_path: Path) -> None:
    """Ten prompts are in both: θ = ȳ + λ(f̄ elsewhere − f̄ here), by sums over prompts."""
    rng, stores, rows = np.random.default_rng(3), [], list[Agreed]()
    for seed in range(2):
        gold = rng.random(60) < 0.6
        people = np.where(rng.random(60) < 0.8, gold, ~gold)
        told = [
            Agreed(
                f"{k // 2 + 20 * seed:018d}-{k}", "policy", None if k % 3 else float(y), float(f)
            )
            for k, (y, f) in enumerate(zip(people, gold, strict=True))
        ]
        stores.append(Store(str(tmp_path / str(seed))))
        stores[-1].create_table(AGREED, table_of(told, AGREED_SCHEMA))
        rows += told
    judged, other = ([row for row in rows if (row.people is None) == none] for none in (0, 1))
    y, f, g = (
        np.mean([row[at] for row in of]) for of, at in ((judged, 2), (judged, 3), (other, 3))
    )
    alone, gap = np.zeros(50), np.zeros(50)  # of each prompt
    for row in judged:
        alone[int(row.pair_id[:18])] += (row.people - y) / 40
        gap[int(row.pair_id[:18])] -= (row.gold - f) / 40
    for row in other:
        gap[int(row.pair_id[:18])] += (row.gold - g) / 80
    weight = -alone @ gap / (gap @ gap)
    assert 0 < weight < 1
    found = with_gold([*stores, Store(str(tmp_path / "nothing"))])["policy"]
    assert found["weight"] == pytest.approx(weight)
    assert found["both"]["value"] == pytest.approx(y + weight * (g - f))
    assert (found["people"]["value"], found["judged"], found["items"]) == (y, 40, 120)


def simulated(draw: int, agrees: float, copies: float) -> Powered:
    """People and an annotator that is right in 70 %; gold, which may copy the annotator."""
    rng = np.random.default_rng([draw, int(10 * agrees), int(10 * copies)])
    right = rng.random(600) < 0.7
    people_too = np.where(rng.random(600) < agrees, right, ~right)
    gold = np.where(rng.random(600) < copies, True, people_too)
    return powered(
        np.where(np.arange(600) < 150, right, np.nan), gold.astype(float), np.arange(600)
    )


@pytest.mark.parametrize(
    ("agrees", "copies", "least", "most"),
    [(0.95, 0.0, 0.25, 0.5), (0.5, 0.0, -0.02, 0.02), (0.95, 0.4, 0.1, 0.5)],
)
def test_gold_narrows_or_does_no_harm_and_never_biases(
    agrees: float, copies: float, least: float, most: float
) -> None:
    """That agrees; that throws coins; that sides with the annotator in two of five pairs."""
    found = [simulated(draw, agrees, copies) for draw in range(400)]
    narrower = np.mean([each.narrower for each in found])
    assert least < narrower < most
    values = np.array([each.both.value for each in found])
    assert abs(values.mean() - 0.7) < 3 * values.std() / np.sqrt(400)
    if copies:
        assert np.mean([each.model.value for each in found]) > 0.78, "gold itself is far off"


def test_arms_that_share_an_annotator_share_its_row() -> None:
    told = [simulated(draw, 0.9, 0.0).as_dict() for draw in range(3)]
    arms = {
        "weak": {"with_gold": {"annotator": told[0], "policy": told[1]}},
        "cw": {"with_gold": {"annotator": told[0], "policy": told[2]}},
        "human": {},
    }
    (table,) = judged_tables({"arms": arms})
    names = [row[0].text for row in table.rows]
    assert names == ["annotator: weak, cw", "policy: weak", "policy: cw"]
    shares = [f"{100 * told[0][of]['value']:.1f} %" for of in ("people", "model", "both")]
    assert [cell.text for cell in table.rows[0][1:5]] == ["150 of 600", *shares]
    assert all(cell.details for cell in table.rows[0][2:5])
