"""Trials that lose stop early: the rule by hand, the order of work, and what is said of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import small_config
from test_comparison_page import sample_comparison

from cwpo_dist.config import Config, ConfigError
from cwpo_dist.config.load import parse_config
from cwpo_dist.evaluation.paired import Items, paired
from cwpo_dist.evaluation.stopping import looks, lost
from cwpo_dist.evaluation.student import student_tails
from cwpo_dist.execution import comparison
from cwpo_dist.report.outcomes import verdicts
from cwpo_dist.report.trial_tables import tables
from cwpo_dist.runs.trials import Trial, section, trials


def seeds_of(*values: float) -> dict[int, Items]:
    """Seeds in which all of forty items have one value."""
    names = [str(k) for k in range(40)]
    return {seed: Items(names, names, np.full(40, value)) for seed, value in enumerate(values)}


def test_the_rule_by_hand() -> None:
    """Mean −0.11, standard error 0.01 / √3: t = −19.05, and of two degrees p = 1 − √(t²/(t²+2))."""
    zeros = seeds_of(0, 0, 0)
    worse = paired(seeds_of(-0.10, -0.12, -0.11), zeros)
    t = 0.11 / (0.01 / math.sqrt(3))
    p = 1 - math.sqrt(t**2 / (t**2 + 2))
    assert worse.p == pytest.approx(p, rel=1e-4)
    assert student_tails(t, 2) == pytest.approx(p, rel=1e-4)
    assert [*looks(5)] == [3, 4]
    assert lost(worse, 5), "2 looks × 0.0027 is below 0.05"
    assert lost(worse, 21)
    assert not lost(worse, 24), "21 × 0.0027 is above"
    assert not lost(paired(zeros, seeds_of(-0.10, -0.12, -0.11)), 5), "above, and not below"
    assert not lost(paired(seeds_of(-0.1, -0.3, -0.05), zeros), 5)
    assert not lost(paired(zeros, zeros), 5)


def made_by(
    monkeypatch: pytest.MonkeyPatch, config: Config, accuracy: dict[str, list[float]]
) -> tuple[list[list[tuple[str, int]]], list[tuple[str, int]]]:
    """What was to be made, call by call, and what is left of it in the end."""
    called: list[list[tuple[str, int]]] = []

    def items_of(runs: dict[tuple[Trial, int], Config], trial: Trial) -> dict[str, Any]:
        known = [seed for other, seed in runs if other == trial]
        assert {*known} <= {seed for call in called for arm, seed in call if arm == trial.arm}
        return {"accuracy": seeds_of(*(accuracy[trial.arm][seed] for seed in known))}

    monkeypatch.setattr(comparison, "items_of", items_of)
    monkeypatch.setattr(comparison, "make_all", lambda jobs: called.append(sorted({*jobs})))
    monkeypatch.setattr(comparison, "_jobs", lambda run, arm: [(arm, run.seed)])
    runs = {
        (trial, seed): trial.configured(config, seed)
        for trial in trials(config)
        for seed in section(config).seeds
    }
    kept = comparison._made(config, runs)
    return called, [(trial.arm, seed) for trial, seed in kept]


def test_a_trial_that_lost_gets_no_more_seeds_and_the_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared(*, stop: bool) -> Config:
        grids = [{"arms": ["human", "weak", "cw"]}]
        compare = {"seeds": [0, 1, 2, 3, 4], "grids": grids, "stop_losers": stop}
        return parse_config(small_config(tmp_path) | {"compare": compare})

    accuracy = {
        "human": [0.60, 0.61, 0.62, 0.60, 0.61],  # never stopped, though the best
        "weak": [0.50, 0.49, 0.51, 0.9, 0.9],  # lost after three
        "cw": [0.50, 0.63, 0.61, 0.59, 0.62],
    }
    called, kept = made_by(monkeypatch, compared(stop=True), accuracy)
    arms = [{arm for arm, _ in call} for call in called]
    assert arms == [{"human", "weak", "cw"}, {"human", "cw"}, {"human", "cw"}]
    assert [max(seed for _, seed in call) for call in called] == [2, 3, 4]
    assert sorted(kept) == sorted(
        [*(("weak", k) for k in range(3)), *((a, k) for a in ("human", "cw") for k in range(5))]
    )
    assert made_by(monkeypatch, compared(stop=True), accuracy)[1] == kept, "again the same"
    called, kept = made_by(monkeypatch, compared(stop=False), accuracy)
    assert (len(called), len(kept)) == (1, 15), "all at once, as before"


def test_a_stopped_trial_is_told_by_its_own_seeds_and_its_p_counts_the_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = {"seeds": [0, 1, 2, 3, 4], "grids": [{"arms": ["human", "weak"]}]}
    config = parse_config(small_config(tmp_path) | {"compare": compare})
    human, weak = trials(config)
    run = {(human, seed): config for seed in range(5)} | {(weak, seed): config for seed in range(3)}
    values = {human: seeds_of(0, 0, 0, 0, 0), weak: seeds_of(-0.10, -0.12, -0.11)}
    monkeypatch.setattr(comparison, "items_of", lambda runs, trial: {"accuracy": values[trial]})
    monkeypatch.setattr(comparison, "_by_seed", lambda trial, runs: {})
    monkeypatch.setattr(comparison, "_devices", lambda runs: {"cpu"})
    found: Any = comparison.collect(config, run, {})["trials"]
    assert [found[arm]["stopped_after"] for arm in ("human", "weak")] == [None, 3]
    once = paired(values[weak], values[human])
    assert once.p is not None
    against = found["weak"]["against"]["human"]["accuracy"]
    assert (against["seeds"], against["p"]) == (3, pytest.approx(2 * once.p))
    assert found["human"]["against"]["weak"]["accuracy"]["p"] == pytest.approx(2 * once.p)


def test_nothing_is_to_be_stopped_with_three_seeds(tmp_path: Path) -> None:
    compare = {"seeds": [0, 1, 2], "stop_losers": True}
    config = parse_config(small_config(tmp_path) | {"compare": compare})
    with pytest.raises(ConfigError, match=r"compare\.stop_losers: .* fewer than 4 compare\.seeds"):
        section(config)


def test_a_stopped_trial_is_named_wherever_it_stands() -> None:
    found = sample_comparison()
    found["seeds"] = [0, 1, 2, 3, 4]
    found["trials"]["soft"]["stopped_after"] = 3
    found["trials"]["soft"]["against"]["human"]["accuracy"] |= {"p": 0.012}
    (table,) = [table for table in tables(found) if table.title == "Stopped early"]
    assert [cell.text for cell in table.rows[0]] == ["soft", "3 of 5", "* −5.0", "= 0.012"]
    told = [line for verdict in verdicts(found) for line in verdict.lines]
    assert [line for line in told if line.startswith("soft (stopped after 3 seeds): 5.0 points")]
    assert not [table for table in tables(sample_comparison()) if table.title == "Stopped early"]
