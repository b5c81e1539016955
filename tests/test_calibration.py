"""Temperatures and calibration errors against an optimiser, a grid and numbers worked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from cwpo_dist.evaluation.accuracy import annotator_accuracy
from cwpo_dist.evaluation.annotators import HeldOut, annotator_figures
from cwpo_dist.evaluation.calibration import (
    Calibration,
    CalibrationError,
    calibration,
    fit_scale,
    fit_temperature,
    people_share,
)
from cwpo_dist.evaluation.shares import Floats
from cwpo_dist.pairs.stored import Told


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def simulated(seed: int, temperature: float, n: int = 2000) -> tuple[Floats, Floats]:
    """Margins that are `temperature` times too loud, and what one person chose of each pair."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(0, 1.5, n)
    return honest * temperature, (rng.random(n) < _sigmoid(honest)).astype(float)


def by_lbfgs(margin: Floats, people: Floats) -> float:
    """The same likelihood in log T, by torch's optimiser."""
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    x, y = torch.from_numpy(margin), torch.from_numpy(people)
    optimiser = torch.optim.LBFGS([log_t], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimiser.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x / log_t.exp(), y)
        loss.backward()
        return loss

    optimiser.step(closure)
    return float(log_t.detach().exp())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(4))
def test_temperature_equals_an_optimisers_and_finds_the_truth(
    seed: int, temperature: float
) -> None:
    margin, people = simulated(seed, temperature)
    found = fit_temperature(margin, people)
    assert found.value == pytest.approx(by_lbfgs(margin, people), rel=1e-4)
    assert found.value == pytest.approx(temperature, rel=0.2)
    assert found.nll_after <= found.nll_before
    logits = torch.from_numpy(margin / found.value)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.from_numpy(people)
    )
    assert found.nll_after == pytest.approx(float(expected))


def test_votes_are_shares_and_a_grid_finds_the_same_temperature() -> None:
    margin = np.array([2.0, 1.0, -1.5, 0.5, -0.2, 3.0])
    people = np.array([0.8, 0.4, 0.2, 0.6, 0.5, 1.0])
    grid = np.exp(np.linspace(math.log(0.2), math.log(20), 200_001))
    x = margin[:, None] / grid
    nll = (
        people[:, None] * np.log1p(np.exp(-x)) + (1 - people)[:, None] * np.log1p(np.exp(x))
    ).sum(0)
    assert fit_temperature(margin, people).value == pytest.approx(grid[nll.argmin()], rel=1e-4)


def test_share_of_people() -> None:
    def share(label: Any, a: int | None, b: int | None, tie: int | None = None) -> float | None:
        return people_share(Told(label, False, a, b, tie, None, None, None, None))

    assert share("a", None, None) == 1.0
    assert share("b", 0, 0) == 0.0
    assert share("a", 3, 1) == 0.75
    assert share("a", 3, 1, 4) == 5 / 8, "who voted for neither is half for each"
    assert share("b", 0, 1, 0) == 0.0
    assert share(None, None, None) is None


def test_interval_holds_the_truth_also_where_prompts_repeat() -> None:
    rng, held, naive = np.random.default_rng(3), 0, 0
    for _ in range(300):
        honest = np.repeat(rng.normal(0, 1.5, 60), 5)
        # all five pairs of a prompt are decided alike: 60 decisions, not 300
        people = np.repeat(rng.random(60) < _sigmoid(honest[::5]), 5).astype(float)
        prompts = np.repeat(np.arange(60), 5).tolist()
        found = fit_temperature(2 * honest, people, prompts)
        single = fit_temperature(2 * honest, people)
        assert found.low is not None
        assert found.high is not None
        assert single.low is not None
        assert single.high is not None
        held += found.low <= 2 <= found.high
        naive += single.low <= 2 <= single.high
    assert 0.91 <= held / 300 <= 0.99
    assert naive / 300 < 0.8


def test_the_interval_of_few_prompts_holds_the_truth_as_often_as_it_says() -> None:
    """The normal's would in 89 of a hundred: of five prompts, whose pairs err to one side."""
    rng, groups, held = np.random.default_rng(1), np.repeat(np.arange(5), 20), 0
    for _ in range(300):
        margin = rng.normal(0, 1, 100)
        honest = _sigmoid(margin)
        shared = 2 * (rng.random(5) - 0.5)[groups] * np.sign(margin)
        people = honest + shared * np.minimum(honest, 1 - honest)
        found = fit_temperature(2 * margin, people, groups.tolist())
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 2 <= found.high
    assert 0.92 <= held / 300 <= 0.98


def test_a_larger_scale_is_a_larger_temperature_and_nothing_else() -> None:
    margin, people = simulated(0, 1.0, 300)
    one, ten = fit_temperature(margin, people), fit_temperature(10 * margin, people)
    assert ten.value == pytest.approx(10 * one.value)
    assert ten.low == pytest.approx(10 * (one.low or math.nan))
    assert ten.nll_after == pytest.approx(one.nll_after)


@pytest.mark.parametrize(
    ("margin", "people", "message"),
    [
        ([], [], "no pair of .* has both .* labelled pairs with into: validation"),
        ([1.0, 2.0], [0.0, 0.0], "no better than a coin"),
        ([0.0], [1.0], "no better than a coin"),
        ([1.0, -2.0], [1.0, 0.0], r"on all of 2 pairs.*prepare\.validation_fraction"),
    ],
)
def test_labels_that_allow_no_temperature_are_refused(
    margin: list[float], people: list[float], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        fit_temperature(margin, people)


def test_one_prompt_has_no_interval() -> None:
    found = fit_temperature([1.0, 2.0, 1.0], [1.0, 1.0, 0.0], ["p"] * 3)
    assert found.low is found.high is None


def test_calibration_by_hand_with_votes() -> None:
    # σ(2) = .8808 and σ(2.2) = .9002, of which .8 and, the prediction being b, 1 − .3 agree
    margin, people = np.array([2.0, -2.2]), np.array([0.8, 0.3])
    found = calibration(margin, people, np.arange(2))
    assert [group.n for group in found.reliability] == [0, 0, 0, 0, 0, 0, 0, 1, 1, 0]
    assert found.reliability[8].accuracy == pytest.approx(0.7)
    gaps = [0.8807970780 - 0.8, 0.9002495109 - 0.7]
    assert found.expected_calibration_error == pytest.approx(sum(gaps) / 2)
    assert found.mean_probability == pytest.approx((0.8807970780 + 0.9002495109) / 2)
    # Two pairs, two prompts: the error of a mean is half of what they differ by. Student's of one
    # degree of freedom; an error is no less than 0.
    half = 12.7062 * (gaps[1] - gaps[0]) / 2
    assert found.ece_interval == pytest.approx((0, sum(gaps) / 2 + half), rel=1e-3)
    # (1 − P)² for who agrees and P² for who does not; so many people each
    brier = [0.8 * 0.1192029220**2 + 0.2 * 0.8807970780**2]
    brier += [0.7 * 0.0997504891**2 + 0.3 * 0.9002495109**2]
    assert found.brier.value == pytest.approx(sum(brier) / 2)
    spread = 12.7062 * (brier[1] - brier[0]) / 2
    assert found.brier.high == pytest.approx(sum(brier) / 2 + spread, rel=1e-3)
    nll = [-0.8 * math.log(0.8807970780) - 0.2 * math.log(0.1192029220)]
    nll += [-0.7 * math.log(0.9002495109) - 0.3 * math.log(0.0997504891)]
    assert found.nll.value == pytest.approx(sum(nll) / 2)
    alone = calibration(margin, people, np.zeros(2, dtype=np.intp))
    assert (alone.ece_interval, alone.brier.low, alone.nll.high) == (None, None, None)
    nothing = calibration(margin[:0], people[:0], np.arange(0))
    assert nothing.brier.value is nothing.nll.value is nothing.expected_calibration_error is None


def test_intervals_of_calibration_hold_the_truth_where_prompts_repeat() -> None:
    """Margins thrice too loud, three pairs of one difficulty a prompt; truth by 10⁶ pairs."""
    rng = np.random.default_rng(3)

    def drawn(prompts: int) -> Calibration:
        honest = np.repeat(rng.normal(0, 1, prompts), 3)
        people = np.repeat(rng.random(prompts) < _sigmoid(honest[::3]), 3).astype(float)
        return calibration(3 * honest, people, np.repeat(np.arange(prompts), 3))

    truth, held = drawn(333_333), np.zeros(3)
    for _ in range(300):
        found = drawn(150)
        for k, (low, high, value) in enumerate(
            (
                (*(found.ece_interval or ()), truth.expected_calibration_error),
                (found.brier.low, found.brier.high, truth.brier.value),
                (found.nll.low, found.nll.high, truth.nll.value),
            )
        ):
            held[k] += low <= value <= high
    assert (held / 300 > 0.9).all(), held / 300


def test_calibrated_figures_are_those_of_divided_margins() -> None:
    margin, people = simulated(1, 5.0)
    labels = ["a" if share else "b" for share in people]
    nothing = np.zeros(len(margin))
    loud = annotator_accuracy(margin, labels, nothing, nothing, temperature=5.0)
    honest = annotator_accuracy(margin / 5, labels, nothing, nothing)
    assert loud.calibrated is not None
    assert loud.calibrated.reliability == honest.reliability
    assert loud.calibrated.expected_calibration_error == honest.expected_calibration_error
    assert loud.agreement == honest.agreement
    assert loud.expected_calibration_error is not None
    assert honest.expected_calibration_error is not None
    assert loud.expected_calibration_error > 0.1 > 0.05 > honest.expected_calibration_error


def two_annotators(seed: int, n: int = 1500) -> HeldOut:
    """One annotator twice, one four times too loud, with errors of their own."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 1.5, n)
    people = (rng.random(n) < _sigmoid(truth)).astype(float)
    noise = rng.normal(0, 0.7, (n, 2))
    margins_NK = (truth[:, None] + noise) * np.array([2.0, 4.0])
    margins_NK[::10, 1] = np.nan
    labels = ["a" if share else "b" for share in people]
    lengths = rng.integers(1, 100, (2, n)).astype(float)
    return HeldOut(margins_NK, labels, people, *lengths, [str(i) for i in range(n)])


def test_scale_of_several_annotators() -> None:
    held = two_annotators(0)
    prompts = held.prompts
    found = fit_scale(held.margins_NK, held.people, prompts, ["x", "y"])
    known = np.isfinite(held.margins_NK[:, 1])
    assert found.members[0] == fit_temperature(held.margins_NK[:, 0], held.people, prompts)
    loud = fit_temperature(held.margins_NK[known, 1], held.people[known])
    assert found.members[1].value == loud.value
    mean = (held.margins_NK[known] / np.array(found.scale.members)).mean(axis=1)
    expected = fit_temperature(mean, held.people[known]).value
    assert found.scale.joint == pytest.approx(expected, rel=1e-9)
    raw = fit_scale(held.margins_NK, held.people, prompts, ["x", "y"], by_member=False)
    assert raw.scale.members == (1.0, 1.0)
    single = fit_scale(held.margins_NK[:, :1], held.people, prompts, ["x"])
    assert (single.members, single.scale.members) == ((), (1.0,))


def test_figures_of_an_ensemble_and_its_members() -> None:
    held, other = two_annotators(0), two_annotators(1)
    found = annotator_figures(held, other, ["x", "y"], by_member=True)
    assert [member["name"] for member in found["members"]] == ["x", "y"]
    assert found["members"][0]["agreement"]["n"] == 1500
    assert found["agreement"]["n"] == found["members"][1]["agreement"]["n"] == 1350
    parts = found["ensemble"]
    assert parts["alone"] == 150
    assert parts["unanimous"]["n"] + parts["contested"]["n"] == 1350
    assert parts["unanimous"]["accuracy"] > parts["contested"]["accuracy"]
    assert found["temperature"]["n"] == 1350
    assert found["calibrated"]["expected_calibration_error"] < 0.05
    for by_member in (True, False):
        known = [other.margins_NK, other.people, other.prompts, ["x", "y"]]
        joint = fit_scale(*known, by_member=by_member).joint.value
        figures = annotator_figures(held, other, ["x", "y"], by_member=by_member)
        assert figures["temperature"]["value"] == joint
    alone = HeldOut(held.margins_NK[:, :1], *list(vars(held).values())[1:])
    assert "members" not in annotator_figures(alone, None, ["x"], by_member=False)


def test_why_there_is_no_temperature_is_said() -> None:
    held = two_annotators(0, n=40)
    same = annotator_figures(held, None, ["x", "y"], by_member=False)
    assert same["temperature"] is same["calibrated"] is None
    assert "same split" in same["no_temperature"]
    none = held.select(np.zeros(40, dtype=bool))
    empty = annotator_figures(held, none, ["x", "y"], by_member=True)
    why = "x: no pair of the split that a temperature is fitted on has both a human label and"
    assert empty["no_temperature"].startswith(why)
