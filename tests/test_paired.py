"""Figures of several seeds and items: means, intervals that hold what they say, and differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cwpo_dist.evaluation.paired import (
    Items,
    holm,
    length_balanced,
    over_seeds,
    paired,
)
from cwpo_dist.evaluation.student import student, student_tails
from cwpo_dist.evaluation.win_rates import answer_figures, length_controlled, won


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
