"""Log-linear policies of benchmarks/noise.py: at their optimum, and judged the right way round."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from cwpo_dist.objectives import LossSettings
from cwpo_dist.weighting import sigmoid

PROMPTS, ANSWERS, WIDTH = 60, 8, 6


@pytest.fixture(scope="module")
def noise() -> Any:
    """The benchmark as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import noise
    finally:
        sys.path.pop(0)
    return noise


@pytest.fixture(scope="module")
def world(noise: Any) -> Any:
    """Random states, of which the annotator sees a half; what is good lies along all of them."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(PROMPTS * ANSWERS, WIDTH))
    pairs = np.arange(PROMPTS * ANSWERS).reshape(-1, 2)
    prompts = np.repeat(np.arange(PROMPTS), ANSWERS // 2)
    names = np.array([f"{prompt:018x}{k:014x}" for k, prompt in enumerate(prompts)])
    strong = noise.Data(
        names=names,
        debates=prompts.astype(str),
        sides=pairs.T,
        labels=np.ones(len(names)),
        lengths=np.ones(len(states)),
        states=states,
        gold=states @ np.ones(WIDTH) / 10,
    )
    weak = noise.replace(strong, states=states[:, : WIDTH // 2])
    return noise.World(weak, strong)


def test_an_optimum_is_that_of_newtons_method_for_bradley_terry(noise: Any) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(50, WIDTH)), np.ones(50)
    ours = noise.trained(x, weight, 0.3, "sigmoid", LossSettings(noise.BETA))
    theirs = noise.fitted(x, np.ones(50), weight[None, :])[:, 0]
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "ropo", "dr_dpo"])
def test_no_step_from_an_optimum_gains(noise: Any, loss: str) -> None:
    """By a total written anew."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, WIDTH)) + 0.3
    # Weights are divided by their mean; Dr. DPO's level is of pairs without any.
    weight = np.ones(50) if loss == "dr_dpo" else rng.random(50)
    theta = noise.trained(x, weight, 1.0, loss, LossSettings(noise.BETA, 0.1))

    def total(theta: Any) -> float:
        right, wrong = -np.log(sigmoid(x @ theta)), -np.log(sigmoid(-x @ theta))
        smoothed = 0.9 * right + 0.1 * wrong
        sums = {
            "sigmoid": weight @ smoothed / weight.mean(),
            "robust": weight @ (0.9 * right - 0.1 * wrong) / 0.8 / weight.mean(),
            "ropo": 56 / 225 * weight @ (right + 14 * np.exp(-wrong)) / weight.mean(),
            "dr_dpo": -50 * np.log(np.exp(-smoothed).mean()),
        }
        return float(sums[loss] + theta @ theta / 2)

    for step in np.vstack([np.eye(WIDTH), -np.eye(WIDTH)]) * 0.1:
        assert total(theta + step) > total(theta)


def test_gold_accuracy_by_hand(noise: Any) -> None:
    def of(score: list[float], gold: list[float], beta: float = 1.0) -> float:
        return float(noise.gold_accuracy(np.array([score]), np.array([gold]), beta)[0])

    gold = [0.0, 1.0, 2.0, 2.0]
    assert of([0, 0, 0, 0], gold) == pytest.approx(0.5)
    # Surely the last: above two, equal to itself and its like.
    assert of([0, 0, 0, 99], gold) == pytest.approx(0.75)
    assert of([99, 0, 0, 0], gold) == pytest.approx(0.125)
    # Probabilities ⅓ and ⅔; beside them a place that holds no answer.
    assert of([0, np.log(4), -np.inf], [0, 1, 5], 2.0) == pytest.approx(1 / 3 * 0.25 + 2 / 3 * 0.75)


def test_policies_are_judged_at_one_divergence_however_sure_they_are(noise: Any) -> None:
    score = np.random.default_rng(0).normal(size=(20, ANSWERS))
    beta = noise.beta_of(score, 1.0)
    chance = np.exp(score / beta) / np.exp(score / beta).sum(axis=1, keepdims=True)
    assert (chance * np.log(chance * ANSWERS)).sum(axis=1).mean() == pytest.approx(1.0)
    assert noise.beta_of(3 * score, 1.0) == pytest.approx(3 * beta)
    fewer = np.hstack([score, np.full((20, 2), -np.inf)])
    assert noise.beta_of(fewer, 1.0) == pytest.approx(beta)


def test_flipped_labels_make_worse_policies_and_all_turned_round_turn_them(
    noise: Any, world: Any
) -> None:
    cases = [noise.Case("human100", share) for share in (0.0, 0.3, 1.0)]
    found = [noise.one(world, dict.fromkeys(cases, 0.3), seed) for seed in range(5)]
    clean, some, turned = (np.mean([of[case].values.mean() for of in found]) for case in cases)
    assert 0.9 > clean > some + 0.02
    assert some > 0.55
    assert turned < 0.25


def test_an_annotator_with_careful_labels_does_not_hear_of_the_flips(
    noise: Any, world: Any
) -> None:
    def right(flipped: float, careful: bool) -> tuple[float, float]:
        people, annotator = noise.sides_of(world, noise.Case("weak", flipped, 0.3, careful), 0)
        return people, annotator

    clean, noisy, careful = right(0.0, False), right(0.4, False), right(0.4, True)
    assert clean[0] > 0.8 > 0.65 > noisy[0] == careful[0]
    assert noisy[1] < clean[1] == careful[1]


def test_what_does_not_hear_of_the_flips_is_trained_once(noise: Any, world: Any) -> None:
    flipped, careful = (noise.Case("semi", 0.4, 0.3, careful) for careful in (False, True))
    assert flipped.plain == flipped
    assert careful.plain == noise.Case("semi", 0.0, 0.3, False)
    trainer = noise.Trainer(world, 0)
    for ours, theirs in zip(trainer.pairs(careful), trainer.pairs(careful.plain), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    everybody = noise.Case("human100", 0.4, 0.3, True)
    assert everybody.plain == everybody
    places, labels, _ = trainer.pairs(everybody)
    known, unknown = trainer.drawn.parts(0.3)
    right = labels == trainer.drawn.labels[places]
    assert right[np.isin(places, known)].all()
    assert 0.4 < right[np.isin(places, unknown)].mean() < 0.8


def test_rows_hold_a_case_against_what_differs_by_its_method_alone(noise: Any) -> None:
    def items(value: float) -> Any:
        names = [str(k) for k in range(9)]
        return noise.Items(names, names, value + np.arange(9) / 100)

    cases = [noise.Case(name, 0.1, 0.2) for name in ("weak", "cw_mean", "human100")]
    worth = dict(zip(cases, (0.5, 0.6, 0.8), strict=True))
    found = [{case: items(worth[case] + seed / 10) for case in cases} for seed in range(3)]
    rows = {row["method"]: row for row in noise.rows(cases, found, dict.fromkeys(cases, 1.0), {})}
    assert rows["cw_mean"]["less_weak"]["mean"] == pytest.approx(0.1)
    assert rows["cw_mean"]["less_human100"]["mean"] == pytest.approx(-0.2)
    assert "less_cw_mean" not in rows["cw_mean"]
    assert "less_human" not in rows["cw_mean"]


def test_methods_read_the_pairs_that_they_say(noise: Any, world: Any) -> None:
    trainer = noise.Trainer(world, 0)
    known, unknown = (set(part.tolist()) for part in trainer.drawn.parts(0.3))
    people = trainer.drawn.flipped(0.2)

    def of(method: str) -> tuple[set[int], Any, Any, Any]:
        places, labels, weight = trainer.pairs(noise.Case(method, 0.2))
        return set(places.tolist()), places, labels, weight

    everything, places, labels, _ = of("human100")
    assert everything == known | unknown
    assert (labels == people[places]).all()
    assert of("human")[0] == of("weak")[0] == of("cw_mean")[0] == unknown
    cleaned, places, labels, _ = of("human, cleaned")
    margin = trainer.judged(0.2, 0.3, False, "one").margin
    assert cleaned < unknown
    assert (labels * margin[places] >= 0).all()
    top, places, labels, _ = of("top 30 %")
    assert len(top) == np.ceil(0.3 * len(unknown))
    rest = np.abs(margin[sorted(unknown - top)])
    assert np.abs(margin[places]).min() >= rest.max()
    assert (labels == np.sign(margin[places])).all()
    only, places, labels, _ = of("labelled_only")
    assert only == known
    assert (labels == people[places]).all()
    both, places, labels, weight = of("semi")
    theirs = np.isin(places, list(known))
    assert both == known | unknown
    assert (labels == np.where(theirs, people[places], np.sign(margin[places]))).all()
    assert (weight[theirs] == 1).all()
    assert (weight[~theirs] < 1).all()
    _, places, _, weight = of("cw_mean")
    np.testing.assert_allclose(weight, 2 * (sigmoid(np.abs(margin[places])) - 0.5))
