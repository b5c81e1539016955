"""`compare.ask`: annotators that learned what each strategy asked for, held against each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import small_config

from cwpo_dist.config import Config, ConfigError
from cwpo_dist.config.load import parse_config
from cwpo_dist.evaluation.paired import Items
from cwpo_dist.execution.asked_labels import NOTHING, Asks, Learned, _row
from cwpo_dist.execution.comparison import compare
from cwpo_dist.planning.plan import plan
from cwpo_dist.report.comparison_page import FIGURES, PAGE
from cwpo_dist.results.show import show_comparison
from cwpo_dist.runs.checks import check_trials
from cwpo_dist.runs.trials import section, starting, trials
from cwpo_dist.storage import Store

ASK = [{"strategy": "random", "budgets": [4, 8]}, {"strategy": "uncertain", "budgets": [8]}]


def config(folder: Path, compare: dict[str, Any], **changes: Any) -> Config:
    return parse_config(small_config(folder, **changes) | {"compare": compare})


def learned(labels: int, right: list[float]) -> Learned:
    names = [f"{k:032x}" for k in range(len(right))]
    values = np.array(right)
    nll = np.logaddexp(0, -values)
    items = {"accuracy": Items(names, names, (1 + np.sign(values)) / 2)}
    return Learned(labels, items | {"nll": Items(names, names, nll)})


def found_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    run = {"output_dir": "run", "simulated_labels": False, "versions": {}, "device": "cpu"}
    nothing = {"trials": {}, "baseline": "", "tried": {}, "single_runs": {}}
    return nothing | {"run": run, "seeds": [0, 1], "asked": rows, "config": {}}


def test_an_annotator_is_held_against_one_of_as_many_labels_by_lot(tmp_path: Path) -> None:
    found = {
        NOTHING: {0: learned(10, [1.0, -1.0]), 1: learned(12, [1.0, -1.0])},
        Asks("random", 8): {0: learned(18, [1.0, -1.0]), 1: learned(20, [2.0, -1.0])},
        Asks("uncertain", 8): {0: learned(18, [1.0, 1.0]), 1: learned(20, [1.0, 0.0])},
        Asks("uncertain", 4): {0: learned(14, [1.0, 1.0]), 1: learned(16, [1.0, 0.0])},
    }
    rows = [_row(asks, found) for asks in found]
    before, by_lot, unsure, fewer = json.loads(json.dumps(rows))
    assert (before["strategy"], before["labels"], before["accuracy"]["mean"]) == (None, 11.0, 0.5)
    assert "accuracy_less_random" not in {**before, **by_lot, **fewer}
    assert (unsure["labels"], unsure["accuracy"]["mean"]) == (19.0, 0.875)
    assert unsure["accuracy_less_random"]["mean"] == pytest.approx(0.375)
    assert unsure["nll_less_random"]["mean"] < 0

    root = Store(str(tmp_path))
    root.write(FIGURES, json.dumps(found_of(rows)).encode())
    page = Path(show_comparison(root)).read_text()
    assert "Comparison of 3 trials" in page
    assert "87.5 %" in page
    assert "Annotators by labels asked for" in page
    assert "What came out" not in page


def test_alone_it_compares_no_arm_and_beside_grids_these(tmp_path: Path) -> None:
    assert trials(config(tmp_path, {"ask": ASK})) == []
    both = config(tmp_path, {"ask": ASK, "grids": [{"arms": ["weak"]}]})
    assert [trial.arm for trial in trials(both)] == ["weak"]
    start = starting(both, 3)
    assert (start.seed, start.policy, section(both).ask[0].budgets) == (3, None, [4, 8])
    assert set(check_trials(both, trials(both)).sizes) == {"weak", "policy"}


@pytest.mark.parametrize(
    ("ask", "changes", "fault"),
    [
        (
            "disagree",
            {},
            r"compare\.ask\.0\.strategy: 'disagree' needs 2 annotators, and there is 1",
        ),
        ("random", {"prepare__labelled_fraction": 1.0}, "labels that are hidden; give a share"),
        ("random", {"annotate__model": {"model_name_or_path": "x"}}, "annotate.model is ready"),
        ("random", {"weak": None}, "weak: compare.ask compares annotators"),
        ("random", {"prepare__test_fraction": 0.0}, r"prepare\.test_fraction: 0, but compare.ask"),
        ("random", {"evaluate__split": "validation"}, r"prepare\.validation_fraction: 0, but"),
    ],
)
def test_what_could_not_learn_or_choose_is_refused(
    tmp_path: Path, ask: str, changes: dict[str, Any], fault: str
) -> None:
    made = config(tmp_path, {"ask": [{"strategy": ask, "budgets": [4]}]}, **changes)
    with pytest.raises(ConfigError, match=fault):
        plan(made)


def test_a_plan_counts_the_annotator_that_asks_and_names_the_others(tmp_path: Path) -> None:
    found = plan(config(tmp_path, {"ask": [*ASK, ASK[0]], "seeds": [0, 1]}))
    assert [stage.stage for stage in found.stages] == ["prepare", "fit", "annotate"]
    (note,) = (note for note in found.notes if note.startswith("compare.ask"))
    assert note.startswith("compare.ask: 3 trials × 2 seeds = 6 annotators")


def test_a_plan_says_what_such_a_comparison_cannot_show(tmp_path: Path) -> None:
    asks = [{"strategy": "random", "budgets": [4]}, {"strategy": "uncertain", "budgets": [4, 5000]}]
    _, by_lot, most = (
        note for note in plan(config(tmp_path, {"ask": asks})).notes if note.startswith("compare.a")
    )
    assert by_lot == "compare.ask: no `random` with budgets 5000, so no differences from it there"
    assert most.startswith("compare.ask: budget 5,000, but about ")


@pytest.mark.parametrize("given", [{"baseline": "cw"}, {"stop_losers": True}])
def test_what_only_grids_read_is_refused_without_them(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=rf"compare\.{next(iter(given))}: .* read with grids"):
        plan(config(tmp_path, {"ask": ASK, "seeds": [0, 1, 2, 3], **given}))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_strategies_are_compared_by_labels_that_were_hidden(ray_local: Any, tmp_path: Path) -> None:
    """Every stage; the same command again makes nothing anew."""
    ask = [{"strategy": "random", "budgets": [8]}, {"strategy": "information", "budgets": [8]}]
    made = config(tmp_path, {"seeds": [0], "ask": ask})
    page = compare(made)
    root = tmp_path / "run"
    rows = json.loads((root / FIGURES).read_text())["asked"]
    assert [(row["strategy"], row["budget"]) for row in rows] == [
        *((None, 0), ("random", 8), ("information", 8))
    ]
    assert rows[1]["labels"] == rows[2]["labels"] == rows[0]["labels"] + 8
    assert all(0 < row["accuracy"]["mean"] < 1 for row in rows)
    assert rows[2]["accuracy_less_random"]["items"] == rows[0]["accuracy"]["items"]
    assert Path(page).name == PAGE
    outputs = {path: path.stat().st_mtime_ns for path in root.glob("*/*/manifest.json")}
    stages = sorted(path.parts[-3] for path in outputs)
    assert stages == ["annotate"] * 3 + ["ask"] * 2 + ["fit"] * 3 + ["prepare"] * 3 + ["states"]
    compare(made)
    again = {path: path.stat().st_mtime_ns for path in root.glob("*/*/manifest.json")}
    assert again == outputs
