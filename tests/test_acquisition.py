"""Which pairs people should label next: by hand and by plain ways."""

from __future__ import annotations

import math
import random
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest

from cwpo_dist.acquisition import STRATEGIES, Candidates, informative, most_worth, whitened
from cwpo_dist.config import Strategies
from cwpo_dist.pairs.records import PROMPT_DIGITS, prompt_of


def worth(strategy: str, *margins: tuple[float, ...], seed: int = 0) -> list[float]:
    names = [f"{k:032x}" for k in range(len(margins))]
    rule = STRATEGIES[strategy].worth
    assert rule is not None
    return rule(Candidates(names, np.array(margins), seed)).tolist()


def test_what_a_label_is_worth_by_hand() -> None:
    assert set(get_args(Strategies)) == STRATEGIES.keys(), "each can be asked for by its name"
    assert worth("uncertain", (2.0,), (-0.5,), (0.0,)) == [-2.0, -0.5, 0.0]
    assert worth("uncertain", (3.0, -1.0), (1.0, 1.0)) == [-1.0, -1.0]
    sigma = [1 / (1 + math.exp(-m)) for m in (2.0, -2.0)]
    assert worth("disagree", (2.0, -2.0), (9.0, 9.0)) == pytest.approx([sigma[0] - 0.5, 0.0])
    sure, unsure = worth("disagree", (10.0, 20.0), (1.0, -1.0))
    assert sure < unsure, "who are sure of one answer agree, however sure"
    assert worth("delta_ucb", (3.0, 1.0), (-4.0, -2.0), (1.0, -1.0)) == [3.0, 4.0, 1.0]
    drawn = worth("random", *[()] * 50)
    assert drawn == worth("random", *[()] * 50)
    assert drawn != worth("random", *[()] * 50, seed=1)


@pytest.mark.parametrize("seed", range(5))
def test_a_design_is_that_of_plain_determinants(seed: int) -> None:
    """Each pick against all that could be picked; a prompt's second pair behind all first ones."""
    rng = np.random.default_rng(seed)
    x, chance = rng.normal(size=(14, 3)), rng.uniform(0.01, 0.25, 14)
    prompts = rng.integers(0, 5, 14) if seed else np.arange(14)
    past = np.eye(3) + np.outer(x[0], x[0])
    plain: list[int] = []
    while len(plain) < 10:
        rounds = [sum(prompts[k] == prompts[j] for j in plain) for k in range(14)]
        left = [k for k in range(14) if k not in plain]
        first = [k for k in left if rounds[k] == min(rounds[j] for j in left)]
        m = past + sum(chance[k] * np.outer(x[k], x[k]) for k in plain)
        gains = {k: np.linalg.det(m + chance[k] * np.outer(x[k], x[k])) for k in first}
        plain.append(max(gains, key=lambda k: gains[k]))
    assert informative(x, chance, past, prompts, 10) == plain
    assert len(informative(x, chance, past, prompts, 99)) == 14


def test_a_ridge_asks_for_no_unit_of_states() -> None:
    """One number a thousand times as large, and one that says nothing."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 4)) * np.array([1000.0, 1.0, 1.0, 0.0])
    found = whitened(x.astype(np.float32)).astype(np.float64)
    assert found.T @ found / 500 == pytest.approx(np.eye(3) / 3, abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_second_pairs_of_a_prompt_come_behind_all_first_ones(seed: int) -> None:
    """Against plain rounds: of each prompt that has one left the best, the best of these first."""
    draw = random.Random(seed)
    names = [f"{draw.randint(0, 6):0{PROMPT_DIGITS}x}{k:014x}" for k in range(40)]
    value = {name: float(draw.randint(0, 3)) for name in names}
    left: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (-value[name], name)):
        left.setdefault(prompt_of(name), []).append(name)
    plain: list[str] = []
    while any(left.values()):
        of_round = [mine.pop(0) for mine in left.values() if mine]
        plain += sorted(of_round, key=lambda name: (-value[name], name))
    for budget in (1, 7, 23, 99):
        shuffled = draw.sample(names, len(names))
        given = np.array([value[name] for name in shuffled]), pa.chunked_array([shuffled])
        places = most_worth(*given, budget)
        assert [shuffled[place] for place in places] == plain[:budget]
