"""Comparing arms: trials and seeds, shared stages, honest intervals."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_run import small_config

from cwpo_dist.config import Config, ConfigError, EvaluateConfig
from cwpo_dist.config.load import parse_config
from cwpo_dist.evaluation.paired import (
    Items,
    holm,
    length_balanced,
    over_seeds,
    paired,
)
from cwpo_dist.evaluation.student import student, student_tails
from cwpo_dist.evaluation.win_rates import answer_figures, length_controlled, won
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


def items(values: list[float], prompts: list[str] | None = None, first: int = 0) -> Items:
    ids = [f"pair {first + k}" for k in range(len(values))]
    return Items(ids, prompts or ids, np.array(values, dtype=np.float64))


def test_students_quantiles_are_those_of_the_tables() -> None:
    for freedom, value in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (30, 2.0423)):
        assert student(0.975, freedom) == pytest.approx(value, rel=1e-3)
    assert student(0.8, 4) == pytest.approx(0.9410, abs=1e-3)
    assert student(0.2, 4) == pytest.approx(-0.9410, abs=1e-3)


def test_p_values_are_those_of_the_tables_and_go_with_the_interval() -> None:
    assert student_tails(2.7764, 4) == pytest.approx(0.05, rel=1e-3)
    assert student_tails(-10, 4) == pytest.approx(5.62e-4, rel=1e-3)
    assert student_tails(1.96, math.inf) == pytest.approx(0.05, rel=1e-3)
    rng = np.random.default_rng(3)
    apart = []
    for _ in range(60):
        shift = rng.normal(0.15, 0.05)
        ours, theirs = (
            {seed: items(rng.normal(mean + rng.normal(0, 0.05), 0.5, 40).tolist()) for seed in "ab"}
            for mean in (shift, 0)
        )
        found = paired(ours, theirs)
        assert found.low is not None
        assert found.p is not None
        apart.append(not found.low <= 0 <= found.high)
        assert apart[-1] == (found.p < 0.05)
    assert {*apart} == {True, False}


def test_holms_correction_by_hand() -> None:
    """4 × 0.005, 3 × 0.01, 2 × 0.03; 1 × 0.04 is below what stands before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_mean_over_seeds_worked_by_hand() -> None:
    """Means 0.5, 0.75, 1.0: their standard error is 0.25 / √3, and t with 2 degrees is 4.303."""
    seeds = [items([0.5] * 40), items([0.75] * 40), items([1.0] * 40)]
    found = over_seeds(seeds)
    assert found.mean == pytest.approx(0.75)
    half = 4.3027 * 0.25 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.75 - half, 0.75 + half), rel=1e-3)
    assert found.smallest == pytest.approx((4.3027 + 1.0607) * 0.25 / math.sqrt(3), rel=1e-3)


def test_one_seed_has_the_interval_of_its_items_and_prompts_are_clusters() -> None:
    values = [1.0, 0.0] * 50
    alone = over_seeds([items(values)])
    assert alone.seeds == 1
    assert alone.high is not None
    assert alone.high - 0.5 == pytest.approx(1.9842 * math.sqrt(0.25 / 99), rel=1e-3)
    doubled = over_seeds(
        [items([v for v in values for _ in "ab"], [str(k // 2) for k in range(200)])]
    )
    assert doubled.high == pytest.approx(alone.high, rel=1e-6), "copies add nothing"
    assert over_seeds([items([])]).mean is None
    assert over_seeds([items([1.0])]).low is None


def test_the_interval_of_few_prompts_misses_the_truth_as_often_as_it_says() -> None:
    """The normal's would miss it in 9 of a hundred: of eight prompts, four pairs each."""
    rng, prompts = np.random.default_rng(8), [str(k // 4) for k in range(32)]
    missed = 0
    for _ in range(2000):
        values = np.repeat(rng.normal(size=8), 4) + rng.normal(size=32)
        found = over_seeds([items(values.tolist(), prompts)])
        assert found.low is not None
        assert found.high is not None
        missed += not found.low < 0 < found.high
    assert 0.04 <= missed / 2000 <= 0.06


def test_the_interval_over_seeds_with_one_test_set_holds_what_its_prompts_share() -> None:
    """The wider of seeds and items alone would miss the truth in 11 of a hundred."""
    rng = np.random.default_rng(9)
    missed = 0
    for _ in range(1000):
        of_prompts, of_seeds = rng.normal(0, 1, 50), rng.normal(0, math.sqrt(10 / 50), 10)
        seeds = [items((of_prompts + one + rng.normal(0, 0.2, 50)).tolist()) for one in of_seeds]
        found = over_seeds(seeds)
        assert found.low is not None
        assert found.high is not None
        missed += not found.low < 0 < found.high
    assert 0.04 <= missed / 1000 <= 0.07


def test_length_balanced_counts_both_sides_alike() -> None:
    """By hand: 3 of 4 right where the longer is preferred, 1 of 2 where the shorter is."""
    values = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    found = length_balanced(items(values), np.array([5, 9, 1, 2, -3, -1, 0]))
    assert over_seeds([found]).mean == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert "pair 6" not in found.names, "of equal length"
    assert not length_balanced(items([1.0, 0.0]), np.array([1, 2])).names
    rng = np.random.default_rng(0)
    longer_by = np.where(rng.random(5000) < 0.8, 7, -7)
    by_length = length_balanced(items((longer_by > 0).astype(float).tolist()), longer_by)
    assert over_seeds([by_length]).mean == 0.5, "a judge of nothing but length"

    right = (rng.random(5000) < np.where(longer_by > 0, 0.9, 0.4)).astype(float)
    whole = over_seeds([length_balanced(items(right.tolist()), longer_by)])
    sides = right[longer_by > 0], right[longer_by < 0]
    error = math.sqrt(sum(side.var() / len(side) for side in sides)) / 2
    assert whole.mean is not None
    assert whole.high is not None
    assert whole.high - whole.mean == pytest.approx(1.96 * error, rel=2e-3), "of two strata"


def test_pairing_takes_away_what_both_share() -> None:
    """Items differ widely, the difference is the same everywhere but in one item of each seed."""
    rng = np.random.default_rng(0)
    base = {seed: rng.normal(0, 5, 200) for seed in range(3)}
    theirs = {seed: items(v.tolist()) for seed, v in base.items()}
    ours = {seed: items((v + 0.5).tolist()) for seed, v in base.items()}
    for seed in ours:
        ours[seed].values[seed] += 1
    found = paired(ours, theirs)
    assert (found.seeds, found.items) == (3, 600)
    assert found.mean == pytest.approx(0.505)
    assert found.low is not None
    assert found.low > 0.49
    alone = over_seeds(list(ours.values()))
    assert alone.high is not None
    assert alone.mean is not None
    assert alone.high - alone.mean > 20 * (0.505 - found.low)
    only = paired({0: items([1.0, 2.0], first=1)}, {0: items([0.0, 0.0], first=2), 1: items([9.0])})
    assert (only.items, only.mean) == (1, 2.0), "items and seeds that both have"


def test_a_win_that_length_bought_is_no_win_at_equal_length() -> None:
    rng = np.random.default_rng(1)
    longer = rng.normal(60, 50, 4000)
    bought = (rng.random(4000) < 1 / (1 + np.exp(-3 * np.tanh(longer / 50)))).astype(float)
    assert bought.mean() > 0.7
    value = length_controlled(bought, longer)
    assert value == pytest.approx(0.5, abs=0.04)
    assert length_controlled(np.ones(50), np.zeros(50)) == pytest.approx(1.0, abs=0.02)
    assert length_controlled(np.array([]), np.array([])) is None
    equal = length_controlled(np.array([1.0, 0.5, 0.0, 1.0]), np.zeros(4))
    assert equal == pytest.approx(0.625, abs=0.01)
    assert won(np.array([2.0, 1.0, 0.0]), np.ones(3)).tolist() == [1.0, 0.5, 0.0]
    figures = answer_figures([10, 20], [20, 20])
    assert (figures.length, figures.baseline_length, figures.length_controlled) == (15, 20, None)
    gold = answer_figures([10] * 4, [10] * 4, [1, 1, 1, 0], [0, 0, 0, 1])
    assert gold.length_controlled == pytest.approx(0.75, abs=0.01), "it won three of four"


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
