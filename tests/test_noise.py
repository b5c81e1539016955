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
    gold = np.array([0.0, 1.0, 2.0, 2.0])
    assert noise.gold_accuracy(np.zeros(4), gold) == pytest.approx(0.5)
    # Surely the last: above two, equal to itself and its like.
    assert noise.gold_accuracy(np.array([0, 0, 0, 99.0]), gold) == pytest.approx(0.75)
    assert noise.gold_accuracy(np.array([99.0, 0, 0, 0]), gold) == pytest.approx(0.125)


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
    _, places, _, weight = of("cw_mean")
    np.testing.assert_allclose(weight, 2 * (sigmoid(np.abs(margin[places])) - 0.5))
