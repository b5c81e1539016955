"""Weights on the paths that few runs take: temperatures, several annotators, a least confidence."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from prepared import said
from world import HIGHER, LABELS, World, margin

from cwpo_dist.config import ARMS
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.runs import annotations
from cwpo_dist.runs.annotations import decided_pairs
from cwpo_dist.runs.arms import weighting
from cwpo_dist.runs.weighing_checks import weighing_faults
from cwpo_dist.stages import weigh
from cwpo_dist.weighting import WEIGHT_FUNCTIONS, Scale, weights

SIGN = {"a": 1, "b": -1}


def weighed(world: World, arm: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The counts of `weigh`, and what it wrote by pair id."""
    counts = weigh.make(world.context, world.node("weigh", arm))
    store = world.place("weigh", arm)
    table = pa.concat_tables([store.read_table(name) for name in store.names("preferences")])
    return counts, {row["pair_id"]: row for row in table.to_pylist()}


def confidence(value: float) -> float:
    return math.tanh(value / 2)


def test_margins_are_divided_by_a_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is given, or one that is fitted to people's choices of the calibration split."""
    world = World(tmp_path, ["cw"], weigh={"temperature": 4.0})
    world.score()
    _, rows = weighed(world)
    for k in range(3):
        assert rows[f"unlabelled-{k}"]["margin"] == pytest.approx(margin(k) / 4)
        assert rows[f"unlabelled-{k}"]["weight"] == pytest.approx(confidence(margin(k) / 4))

    fitted_to: list[Any] = []

    def fit_scale(margins_NK: Any, people: Any, prompts: Any, names: Any) -> Any:
        fitted_to.append((margins_NK[:, 0].tolist(), people.tolist(), names))
        return SimpleNamespace(scale=Scale((1.0,), 2.0))

    monkeypatch.setattr(annotations, "fit_scale", fit_scale)
    world = World(tmp_path / "fitted", ["cw_calibrated"])
    world.score()
    seen: list[str] = []
    given = annotations.held_out
    monkeypatch.setattr(
        annotations, "held_out", lambda read, split: (seen.append(split), given(read, split))[1]
    )
    counts, rows = weighed(world)
    assert seen == ["validation"]
    ((margins, people, names),) = fitted_to
    assert margins == [SIGN[HIGHER[k]] * margin(k) for k in range(3)]
    assert people == [1.0, 1 - 3 / 4, 1 - 3 / 5]
    assert names == [world.node("annotate").path]
    assert counts["temperatures"] == [2.0]
    for k in range(3):
        assert rows[f"unlabelled-{k}"]["weight"] == pytest.approx(confidence(margin(k) / 2))


def test_an_ensembles_disagreement_takes_weight_from_a_pair(tmp_path: Path) -> None:
    """Margins m and 3m: their mean is 2m, their deviation m, and C(2m − m) is left."""
    world = World(tmp_path, ["ensemble", "cw"], fit={"seeds": [0, 1]})
    world.score("annotate_0")
    world.score("annotate_1", factor=3.0)
    counts, rows = weighed(world)
    for k in range(3):
        row = rows[f"unlabelled-{k}"]
        assert row["label"] == HIGHER[k]
        assert row["margin"] == pytest.approx(2 * margin(k))
        assert row["disagreement"] == pytest.approx(margin(k))
        assert row["confidence"] == pytest.approx(confidence(2 * margin(k)))
        assert row["weight"] == pytest.approx(confidence(margin(k)))
    mean = {name: sum(row[name] for row in rows.values()) / 3 for name in ("weight", "confidence")}
    assert counts["mean_weight"] == pytest.approx(mean["weight"])
    assert counts["mean_confidence"] == pytest.approx(mean["confidence"])
    assert counts["ensemble"]["mean_disagreement"] == pytest.approx(sum(map(margin, range(3))) / 3)
    _, plain = weighed(world, "cw")
    assert plain["unlabelled-0"]["weight"] == pytest.approx(confidence(2 * margin(0)))


def test_a_least_confidence_keeps_pairs_at_or_above_it(tmp_path: Path) -> None:
    least = (confidence(margin(0)) + confidence(margin(1))) / 2
    world = World(tmp_path, ["cw", "human"], weigh={"min_confidence": least})
    world.score()
    counts, rows = weighed(world)
    assert set(rows) == {"unlabelled-1", "unlabelled-2"}
    assert (counts["pairs"], counts["selected"]) == (3, 2)
    assert len(weighed(world, "human")[1]) == 3, "people are certain"


@pytest.mark.parametrize("top_fraction", [None, 0.5])
def test_people_decide_the_labelled_part_and_the_annotator_the_rest(
    tmp_path: Path, top_fraction: float | None
) -> None:
    """Arm `semi`; its annotator has scored no labelled pair, and nobody reads a hidden label."""
    world = World(tmp_path, ["semi", "cw"], weigh={"top_fraction": top_fraction})
    world.score()
    counts, rows = weighed(world)
    people = {f"labelled-{k}" for k in range(3)}
    assert people <= rows.keys(), "what is certain is kept first"
    for k in range(3):
        row = rows[f"labelled-{k}"]
        assert said(row["chosen"]).startswith("won"), k
        assert said(row["rejected"]).startswith("lost")
        assert (row["label"], row["weight"]) == (LABELS[k], 1.0)
        assert (row["margin"], row["confidence"], row["probability"]) == (None, None, None)
    if top_fraction is not None:
        assert rows.keys() == people
        return
    assert counts["pairs"] == len(rows) == 6
    _, alone = weighed(world, "cw")
    assert {name: rows[name] for name in alone} == alone, "as arm `cw` has them"
    for k in range(3):
        row = rows[f"unlabelled-{k}"]
        assert row["label"] == HIGHER[k]
        assert row["weight"] == pytest.approx(confidence(margin(k)))
    assert counts["mean_weight"] == pytest.approx((3 + sum(map(weight, range(3)))) / 6)


def weight(k: int) -> float:
    return confidence(margin(k))


@pytest.mark.parametrize("name", WEIGHT_FUNCTIONS)
def test_what_is_certain_has_the_largest_weight_of_every_function(name: str) -> None:
    margins, none = np.array([np.inf, 50.0]), np.zeros(2)
    certain, sure = weights(name, margins, none)
    assert certain == pytest.approx(sure)
    assert certain == pytest.approx(1.0)


@pytest.mark.parametrize(
    "weigh_section",
    [{"from": "columns"}, {"from": "both"}, {"pairing": "best_worst"}, {"top_fraction": 0.5}],
)
def test_what_would_choose_by_margins_of_peoples_pairs_is_refused(
    tmp_path: Path, weigh_section: dict[str, Any]
) -> None:
    (name,) = weigh_section
    for arm, refused in (("semi", True), ("cw", False)):
        found = list(weighing_faults(World(tmp_path / arm, [arm], weigh=weigh_section).config))
        assert any(fault.startswith(f"weigh.{name}: arm 'semi'") for fault in found) == refused


def test_plan_counts_the_labelled_pairs_that_have_a_label(tmp_path: Path) -> None:
    chooser = weighting(World(tmp_path, ["semi"]).config, ARMS["semi"]).chooser
    counted = Census({"labelled": 41, "unlabelled": 38}, {"labelled": 20}, 0, True, ())
    assert decided_pairs(chooser, counted) == 58
