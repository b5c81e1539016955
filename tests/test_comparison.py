"""Comparing arms: trials and seeds, shared stages, rates that are chosen on validation."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_run import small_config

from cwpo_dist.config import Config, ConfigError, EvaluateConfig
from cwpo_dist.config.load import parse_config
from cwpo_dist.execution import comparison
from cwpo_dist.execution.comparison import compare
from cwpo_dist.graph import graph
from cwpo_dist.placement import Machine
from cwpo_dist.planning.fleet import Fleet
from cwpo_dist.planning.plan import plan
from cwpo_dist.report.comparison_page import (
    FIGURES,
)
from cwpo_dist.runs.checks import check_trials
from cwpo_dist.runs.cluster_share import need, share
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.joined import ScoresIn, pair_log_probs
from cwpo_dist.runs.output_key import members
from cwpo_dist.runs.trials import baseline, names, planned, trials, tuning
from cwpo_dist.storage import Store

DEMO = Path(__file__).parents[1] / "cwpo_dist" / "demo" / "demo.yaml"


def config(folder: Path, compare: dict[str, Any], **changes: Any) -> Config:
    return parse_config(small_config(folder, **changes) | {"compare": compare})


def test_trials_are_the_product_of_a_grid_and_name_what_differs(tmp_path: Path) -> None:
    grids = [
        {"arms": ["human", "cw"], "labelled_fractions": [0.3], "flipped_labels": [0.0, 0.1]},
        {"arms": ["cw"], "labelled_fractions": [0.2]},
    ]
    found = trials(config(tmp_path, {"seeds": [3, 4], "grids": grids}))
    assert list(names(found).values()) == [
        "human, 0 % flipped",
        "cw, 30 % labelled, 0 % flipped",
        "human, 10 % flipped",
        "cw, 30 % labelled, 10 % flipped",
        "cw, 20 % labelled, 0 % flipped",
    ]
    run = found[3].configured(config(tmp_path, {"grids": grids}), 4, 0.5)
    assert (run.seed, run.arms, run.align.learning_rate) == (4, ["cw"], 0.5)
    assert (run.prepare.labelled_fraction, run.prepare.flipped_labels) == (0.3, 0.1)


def test_an_arm_that_knows_all_labels_stands_once_whatever_the_share(tmp_path: Path) -> None:
    shares = {"labelled_fractions": [0.3, 0.2]}
    grids = [{"arms": ["human100", "cw"], **shares}, {"arms": ["cw", "human"], **shares}]
    made = config(tmp_path, {"grids": grids})
    assert list(names(trials(made)).values()) == [
        "human100",
        "cw, 30 % labelled",
        "cw, 20 % labelled",
        "human, 30 % labelled",
        "human, 20 % labelled",
    ]
    assert baseline(made, trials(made)) == "human100"

    given = made.model_copy(
        update={"compare": made.compare.model_copy(update={"baseline": "cw, 20% labelled"})}
    )
    assert baseline(given, trials(given)) == "cw, 20 % labelled"


def test_an_arm_of_both_parts_stands_once_a_share(tmp_path: Path) -> None:
    grids = [{"arms": ["semi", "human100"], "labelled_fractions": [0.2, 0.5]}]
    found = list(names(trials(config(tmp_path, {"grids": grids}))).values())
    assert found == ["semi, 20 % labelled", "human100", "semi, 50 % labelled"]


def test_arms_of_people_keep_to_the_pairs_that_the_annotator_can_read(tmp_path: Path) -> None:
    alone = config(tmp_path, {"grids": [{"arms": ["human", "ws_dpo"]}]})
    beside = config(tmp_path, {"grids": [{"arms": ["human"]}, {"arms": ["cw"]}]})
    for made, annotated in ((alone, False), (beside, True)):
        run = trials(made)[0].configured(made, 0)
        assert ("annotate" in graph(run, "human")) == annotated


def test_each_seed_of_a_comparison_has_an_ensemble_of_its_own(tmp_path: Path) -> None:
    made = config(tmp_path, {"grids": [{"arms": ["ensemble"]}]}, fit__seeds=[0, 1, 2])
    check_trials(made, trials(made))
    seeds = [trials(made)[0].configured(made, seed).fit.seeds for seed in range(3)]
    assert seeds == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize(
    ("compare", "changes", "fault"),
    [
        ({"learning_rates": [1e-3, 1e-4]}, {}, "prepare.validation_fraction"),
        ({"baseline": "cv"}, {}, "compare.baseline: 'cv' is unknown; choose from cw"),
        ({"grids": [{"arms": ["cw"], "losses": ["dpo"]}]}, {}, "compare.grids.0.losses: 'dpo'"),
        ({"grids": [{"arms": ["ensemble"]}]}, {}, "'ensemble' .* give fit.heads, fit.seeds"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, compare: dict[str, Any], changes: dict[str, Any], fault: str
) -> None:
    made = config(tmp_path, compare, **changes)
    with pytest.raises(ConfigError, match=fault):
        check_trials(made, trials(made))


@pytest.mark.parametrize(
    ("compare", "fault"),
    [
        ({"grids": [{"arms": ["cv"]}]}, r"compare\.grids\.0\.arms: 'cv' is unknown"),
        ({"seeds": [1, 0, 1]}, "compare.seeds: 1 appears twice"),
        ({"learning_rates": [1e-4, 1e-4]}, "compare.learning_rates: 0.0001 appears twice"),
    ],
)
def test_a_section_that_says_the_same_twice_or_nothing_known_is_refused(
    tmp_path: Path, compare: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ConfigError, match=fault):
        config(tmp_path, compare)


def test_a_plan_refuses_shares_that_leave_a_trial_nothing(tmp_path: Path) -> None:
    grids = [{"arms": ["labelled_only", "cw"], "labelled_fractions": [0, 0.5, 1]}]
    with pytest.raises(ConfigError) as caught:
        plan(config(tmp_path, {"grids": grids}))
    assert [line.split("; ")[0] for line in str(caught.value).splitlines()] == [
        "prepare.labelled_fraction: 0 leaves no labelled pair to fit an annotator on",
        "prepare.labelled_fraction: 0 leaves arm 'labelled_only' no pair of the labelled part to "
        "train on",
        "prepare.labelled_fraction: 1 leaves arm 'cw' no pair of the unlabelled part to train on",
    ]


def test_shared_stages_stand_once_and_rates_are_chosen_on_validation(tmp_path: Path) -> None:
    compare = {
        "seeds": [0, 1],
        "learning_rates": [1e-3, 1e-4],
        "grids": [{"arms": ["weak", "cw"], "losses": ["sigmoid", "ipo"]}],
    }
    made = config(tmp_path, compare, prepare__validation_fraction=0.2)
    runs = list(planned(made))
    assert len(runs) == 4 * 2 + 4 * 2, "each trial at each rate, then with each seed"
    outputs = {node.path for run, arm in runs for node in graph(run, arm).values()}
    counts = Counter(path.split("/")[0] for path in outputs)
    assert counts["prepare"] == counts["fit"] == counts["annotate"] == counts["sft"] == 2
    assert counts["reference"] == 2 + counts["align"] + 4, "tests of the rates, and of their best"
    # Two rates with seed 0, one with seed 1, by trial: testing the best trains nothing again.
    assert counts["align"] == 4 * 3
    first = tuning(made, trials(made)[0], 1e-4)
    assert (first.evaluate.split, first.evaluate.num_prompts, first.seed) == ("validation", 0, 0)
    stages_of = {stage.stage: stage for stage in plan(made).stages}
    assert stages_of["align"].work == "12 outputs"
    assert stages_of["align"].tokens > stages_of["fit"].tokens


def test_the_rate_with_the_best_validation_accuracy_is_taken_of_equal_ones_the_smallest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [1e-2, 1e-3, 1e-4, 1e-5]
    compare = {"seeds": [0], "learning_rates": rates, "grids": [{"arms": ["weak", "cw"]}]}
    made = config(tmp_path, compare, prepare__validation_fraction=0.2)
    right = {  # 1e-3 is best for `weak`; for `cw` 1e-4 is as good as 1e-2
        "weak": dict(zip(rates, (0.5, 0.9, 0.6, 0.4), strict=True)),
        "cw": dict(zip(rates, (0.8, 0.7, 0.8, 0.3), strict=True)),
    }

    def agreement(run: Config, arm: str) -> tuple[float, int]:
        assert run.evaluate.split == "validation"
        return right[arm][run.align.learning_rate], 20

    monkeypatch.setattr(comparison, "make_all", lambda jobs: None)
    monkeypatch.setattr(comparison, "_agreement", agreement)
    chosen, _ = comparison._rates(made, trials(made))
    assert {trial.arm: rate for trial, rate in chosen.items()} == {"weak": 1e-3, "cw": 1e-4}


def test_a_rate_that_decides_next_to_nothing_is_not_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smaller rate leaves 19 of 20 pairs tied, and is right in the other one."""
    rates = [1e-3, 1e-9]
    compare = {"seeds": [0], "learning_rates": rates, "grids": [{"arms": ["weak"]}]}
    made = config(tmp_path, compare, prepare__validation_fraction=0.2)
    told = {1e-3: (14, 6, 0), 1e-9: (1, 0, 19)}

    def evaluated(run: Config, arm: str) -> tuple[Store, dict[str, object]]:
        right, wrong, ties = told[run.align.learning_rate]
        share = right / (right + wrong) if right + wrong else None
        found = {"n": 20, "correct": right, "wrong": wrong, "ties": ties, "accuracy": share}
        place = Store(f"{tmp_path}/{run.align.learning_rate}")
        place.write("metrics.json", json.dumps({"policy": {"agreement": found}}).encode())
        return place, {}

    monkeypatch.setattr(comparison, "make_all", lambda jobs: None)
    monkeypatch.setattr(comparison, "evaluated", evaluated)
    chosen, tried = comparison._rates(made, trials(made))
    assert list(chosen.values()) == [1e-3]
    assert tried["tried"] == {"weak": {"0.001": 0.7, "1e-09": 0.525}}
    told[1e-9] = 0, 0, 20
    assert list(comparison._rates(made, trials(made))[0].values()) == [1e-3], "nobody lacks labels"


def test_a_plan_says_how_many_trials_and_what_they_cost(tmp_path: Path) -> None:
    compare = {"seeds": [0, 1], "grids": [{"arms": ["weak", "cw"]}]}
    made = config(tmp_path, compare)
    one = parse_config(small_config(tmp_path, arms=["weak", "cw"]))
    all_trials, single = (plan(each, fleet=Fleet({"": 2.0})) for each in (made, one))
    assert any(note.startswith("2 trials × 2 seeds; times count") for note in all_trials.notes)
    hours, stored = all_trials.fleet_lines()
    assert re.search(r"fit [\d.e-]+, .* at 2 an hour$", hours)
    assert stored.startswith("storage: about ")
    outputs = {stage.stage: stage for stage in all_trials.stages}
    (fit,) = [stage for stage in single.stages if stage.stage == "fit"]
    assert outputs["fit"].stored == 2 * fit.stored, "one a seed"
    assert outputs["fit"].checkpoints == fit.checkpoints > 0, "they go when a training is done"
    assert re.search(r"; up to \S+ [kM]B of checkpoints beside each training$", stored)


def test_the_implicit_annotator_is_the_weak_model_after_sft_and_dpo(tmp_path: Path) -> None:
    made = parse_config(small_config(tmp_path, arms=["weak", "ws_dpo"]))
    ws, weak = graph(made, "ws_dpo"), graph(made, "weak")
    (scores,) = members(ws["weigh"])
    assert scores.stage == "implicit"
    assert "fit" not in ws
    assert ws["teacher_align"].settings.identity()["model"]["num_hidden_layers"] == 1
    assert ws["teacher_align"].settings.identity()["learning_rate"] == made.fit.learning_rate
    assert ws["teacher_sft"].settings.identity()["splits"] == ["labelled"]
    assert ws["prepare"].key == weak["prepare"].key
    assert ws["sft"].key != weak["sft"].key, "its labels are others"
    elsewhere = made.model_copy(update={"evaluate": EvaluateConfig(split="validation")})
    assert graph(elsewhere, "ws_dpo")["annotate"].key == scores.key, "wherever it is measured"
    stages = {stage.stage: stage for stage in plan(made).stages}
    teacher = stages["sft (teacher_sft)"]
    assert teacher.stored == stages["fit"].stored == stages["align (teacher_align)"].stored
    assert teacher.checkpoints == stages["fit"].checkpoints, "on the annotator's schedule"
    assert teacher.stored < stages["sft"].stored


def test_two_trainings_run_at_once_only_where_both_fit(tmp_path: Path) -> None:
    made = parse_config(small_config(tmp_path, fit__num_workers=3))
    fit = graph(made, "cw")["fit"]
    assert need(fit, {"CPU": 8.0, "GPU": 0.0}) == {"CPU": 1.5}
    assert need(fit, {"CPU": 8.0, "GPU": 4.0}) == {"CPU": 1.5, "GPU": 3.0}
    alone = need(fit, {"CPU": 1.0, "GPU": 0.0})
    assert alone["CPU"] == 1.0, "more than all is waited for alone"
    assert share({"CPU": 1.5, "GPU": 3.0}, {"CPU": 6.0, "GPU": 4.0}) == 0.75
    assert share({"CPU": 0.5}, {"CPU": 0.0, "GPU": 0.0}) == 1.0, "a head without workers, as yet"


def test_a_plan_counts_runs_side_by_side_as_they_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = SimpleNamespace(seconds=lambda cost: 60.0)
    monkeypatch.setattr("cwpo_dist.planning.plan.Rates", lambda machines: rate)
    made = config(tmp_path, {"seeds": [0, 1]}, arms=["weak", "cw"])
    worker = made.align.cpus_per_worker * made.align.max_workers

    def minutes(cpus: float) -> float:
        monkeypatch.setattr("cwpo_dist.runs.checks.available", lambda: [Machine(cpus, 0.0)])
        (align,) = [stage for stage in plan(made).stages if stage.stage == "align"]
        return align.seconds / 60

    assert minutes(1.5 * worker) == 4, "one after the other"
    assert minutes(2 * worker) == pytest.approx(2)
    assert minutes(4 * worker) == pytest.approx(1)


@pytest.mark.long
def test_the_implicit_annotator_labels_and_stages_run_side_by_side(
    ray_local: Any, tmp_path: Path
) -> None:
    """Two losses of two arms on four CPUs: alignments of half a CPU run at once, from Ray tasks."""
    grids = [{"arms": ["labelled_only", "ws_dpo"], "losses": ["sigmoid", "ipo"]}]
    made = config(
        tmp_path,
        {"seeds": [0], "grids": grids, "learning_rates": [1e-3, 3e-3]},
        prepare__validation_fraction=0.2,
        evaluate__num_prompts=0,
    )
    compare(made)
    found = json.loads((Path(made.output_dir) / FIGURES).read_text())
    assert set(found["tried"]) == set(found["trials"])
    for name, trial in found["trials"].items():
        told = found["tried"][name]
        best = max(told.values())
        assert told[f"{trial['learning_rate']:g}"] == best
        assert ("labels_right" in trial["by_seed"]) == (trial["arm"] == "ws_dpo")
    run = trials(made)[1].configured(made, 0)
    assert trials(made)[1].arm == "ws_dpo"
    (scores,) = members(graph(run, "ws_dpo")["weigh"])
    nodes = graph(run, "ws_dpo")
    context = Context(Store(run.output_dir))
    prepared = context.place(nodes["prepare"])
    told = ScoresIn(context.place(scores), 0, prepared).read(0)
    after, before = (
        pair_log_probs(context.place(nodes[f"teacher_{when}"]), prepared, 0)
        for when in ("after", "before")
    )
    assert told
    for pair_id, margin in told.items():
        (a, b), (old_a, old_b) = after[pair_id].sums, before[pair_id].sums
        reward = made.align.beta * ((a - old_a) - (b - old_b))
        assert margin == pytest.approx(reward, abs=1e-4)
