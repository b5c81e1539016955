"""Evaluation figures against numbers worked by hand, simulations and plain-Python oracles."""

from __future__ import annotations

import json
import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwpo_dist.evaluation.accuracy import annotator_accuracy, gra, policy_accuracy
from cwpo_dist.evaluation.length import correlation, margin_by_length
from cwpo_dist.evaluation.shares import (
    Accuracy,
    agreement,
    estimate,
    independent_decisions,
    wilson,
)
from cwpo_dist.evaluation.student import student
from cwpo_dist.weighting import sigmoid

# Six pairs; the third is a tie, the last has no label
MARGINS = [2.0, -1.0, 0.0, 0.5, -3.0, 1.0]
LABELS = ["a", "a", "b", "a", "b", None]
LENGTH_A = [10, 5, 5, 3, 4, 9]
LENGTH_B = [5, 10, 5, 2, 8, 1]


def test_agreement_by_hand() -> None:
    found = annotator_accuracy(MARGINS, LABELS, LENGTH_A, LENGTH_B)
    low, high = wilson(3, 4)
    assert found.agreement == Accuracy(5, 3, 1, 1, 0.75, low, high)
    # longer wins: right, wrong, tie, right, right
    assert found.length_baseline == Accuracy(5, 3, 1, 1, 0.75, low, high)
    confidences = [math.tanh(m / 2) for m in (2, 1, 0, 0.5, 3, 1)]
    assert found.mean_confidence == pytest.approx(statistics.mean(confidences))
    # predicted answers' probabilities, decided pairs only
    probabilities = [1 / (1 + math.exp(-m)) for m in (2, 1, 0.5, 3)]
    assert found.mean_probability == pytest.approx(statistics.mean(probabilities))


def test_intervals_of_few_prompts_hold_the_truth_as_often_as_they_say() -> None:
    """The normal's would in 88 and in 86 of a hundred: of five prompts, thirty pairs each."""
    rng, groups = np.random.default_rng(5), np.repeat(np.arange(5), 30)
    truth = sigmoid(0.8 + rng.normal(0, 1, 400_000)).mean()
    held = []
    for _ in range(1000):
        right = (rng.random(150) < sigmoid(0.8 + rng.normal(0, 1, 5))[groups]).astype(float)
        share, mean = agreement(2 * right - 1, np.ones(150), groups), estimate(right, groups)
        held.append([found.low <= truth <= found.high for found in (share, mean)])
    assert (np.mean(held, axis=0) > 0.91).all()


def test_quarters_by_hand() -> None:
    found = annotator_accuracy(MARGINS, LABELS, LENGTH_A, LENGTH_B)
    # by confidence: 0.5 (right), 1 (wrong), 2 (right), 3 (right)
    assert [group.accuracy for group in found.by_quarter] == [1.0, 0.0, 1.0, 1.0]
    assert [group.n for group in found.by_quarter] == [1, 1, 1, 1]
    assert found.by_quarter[2].mean == pytest.approx(math.tanh(1))
    assert found.by_quarter[2].lower == found.by_quarter[2].upper


def test_confident_half_by_hand() -> None:
    found = annotator_accuracy(MARGINS, LABELS, LENGTH_A, LENGTH_B)
    # two less confident: right, wrong; two more confident: right, right
    assert found.sure_half.value == 0.5
    turned = annotator_accuracy([1 / m if m else 0 for m in MARGINS], LABELS, LENGTH_A, LENGTH_B)
    assert turned.sure_half.value == -0.5


def test_halves_differ_by_their_two_shares_with_the_error_of_such_a_difference() -> None:
    """Pairs of prompts of their own: √(p₁q₁/n₁ + p₂q₂/n₂), but for G / (G − 1)."""
    rng = np.random.default_rng(4)
    n, half = 801, 400
    sure = rng.permutation(n) + 1.0
    right = rng.random(n) < np.where(sure > n - half, 0.8, 0.6)
    margins, labels = np.where(right, sure, -sure) / n, ["a"] * n
    found = annotator_accuracy(margins, labels, np.ones(n), np.ones(n)).sure_half
    top, rest = right[sure > n - half], right[sure <= n - half]
    shares = top.mean(), rest.mean()
    error = math.sqrt(sum(p * (1 - p) / k for p, k in zip(shares, (half, n - half), strict=True)))
    assert found.value == pytest.approx(shares[0] - shares[1])
    half_width = student(0.975, n - 1) * error * math.sqrt(n / (n - 1))
    assert found.low == pytest.approx(found.value - half_width)
    assert found.high == pytest.approx(found.value + half_width)
    doubled = annotator_accuracy(
        *(np.repeat(each, 2) for each in (margins, labels, np.ones(n), np.ones(n))),
        np.repeat(np.arange(n), 2),
    ).sure_half
    assert doubled.high - doubled.value > 0.98 * (found.high - found.value), "copies tell nothing"


def test_above_length_by_hand() -> None:
    """Right where length is wrong, right where it ties, wrong where it is right, tied; no label.

    Four times over, with Student's quantile of 15 degrees of freedom.
    """
    columns = [1, 2, -1, 0, 3], ["a", "a", "a", "b", None], [1, 2, 3, 1, 9], [2, 2, 1, 4, 1]
    found = annotator_accuracy(*(4 * column for column in columns)).above_length
    assert found.value == pytest.approx((1 + 0.5 - 1 - 0.5) / 4)
    half = 2.13145 * statistics.stdev(4 * [1, 0.5, -1, -0.5]) / 4
    assert (found.low, found.high) == pytest.approx((-half, half), rel=1e-4)


def test_reliability_and_calibration_error_by_hand() -> None:
    # σ(0.5) = .622 right, σ(1) = .731 wrong, σ(2) = .881 right, σ(3) = .953 right
    found = annotator_accuracy(MARGINS, LABELS, LENGTH_A, LENGTH_B)
    assert [group.n for group in found.reliability] == [0, 0, 1, 0, 1, 0, 0, 1, 0, 1]
    assert found.reliability[0].accuracy is None
    assert found.reliability[0].mean is None
    assert (found.reliability[2].lower, found.reliability[2].upper) == pytest.approx((0.6, 0.65))
    gaps = [1 - 0.6224593312, 0.7310585786, 1 - 0.8807970780, 1 - 0.9525741268]
    assert found.expected_calibration_error == pytest.approx(statistics.mean(gaps))


def test_extreme_margins_fall_into_the_last_bin() -> None:
    found = annotator_accuracy([1e6, 1e-9], ["a", "b"], [1, 1], [2, 2])
    assert found.reliability[-1].n == 1
    assert found.reliability[0].n == 1
    assert found.expected_calibration_error == pytest.approx(0.25)


def test_calibrated_annotator_has_a_small_error_and_an_overconfident_one_a_large() -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 20_000)
    labels = np.where(rng.random(20_000) < 1 / (1 + np.exp(-margins)), "a", "b").tolist()
    nothing = np.zeros(20_000)
    honest = annotator_accuracy(margins, labels, nothing, nothing)
    loud = annotator_accuracy(margins * 5, labels, nothing, nothing)
    assert honest.expected_calibration_error is not None
    assert honest.expected_calibration_error < 0.01
    assert loud.expected_calibration_error is not None
    assert loud.expected_calibration_error > 0.1
    accuracies = [group.accuracy for group in honest.by_quarter]
    assert accuracies == sorted(accuracies, key=lambda share: share or 0)
    assert honest.length_baseline.ties == 20_000
    assert honest.length_baseline.accuracy is None


def test_nothing_to_measure_is_none_and_never_zero() -> None:
    empty = annotator_accuracy([], [], [], [])
    assert empty.agreement == Accuracy(0, 0, 0, 0, None, None, None)
    assert empty.expected_calibration_error is None
    assert empty.mean_confidence is None
    assert empty.by_quarter == ()
    unlabelled = annotator_accuracy([1.0], [None], [1], [2])
    assert unlabelled.agreement.accuracy is None
    assert unlabelled.mean_confidence == pytest.approx(math.tanh(0.5))
    assert gra([], []).accuracy is None


def test_records_become_json() -> None:
    found = annotator_accuracy(MARGINS, LABELS, LENGTH_A, LENGTH_B).as_dict()
    assert json.loads(json.dumps(found)) == {
        **found,
        "by_quarter": list(found["by_quarter"]),
        "reliability": list(found["reliability"]),
        "ece_interval": list(found["ece_interval"]),
        "margin_by_length": list(found["margin_by_length"]),
    }
    assert found["agreement"]["ties"] == 1


def test_swapping_the_answers_changes_nothing() -> None:
    swap = {"a": "b", "b": "a", None: None}
    first = annotator_accuracy(MARGINS, LABELS, LENGTH_A, LENGTH_B)
    margins = [-margin for margin in MARGINS]
    other = annotator_accuracy(margins, [swap[x] for x in LABELS], LENGTH_B, LENGTH_A)
    assert first.agreement == other.agreement
    assert first.reliability == other.reliability
    assert first.margin_length == other.margin_length


def test_wilson_by_hand() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20, 1 of 29
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(0, 0) == (None, None)


def _decisions(right: list[int], prompts: list[int]) -> float:
    return independent_decisions(np.array(right, dtype=float), np.array(prompts, dtype=np.intp))


def test_independent_decisions() -> None:
    assert _decisions([1, 0, 1], [0, 1, 2]) == 3
    assert _decisions([], []) == 0
    # All pairs of a prompt agree: as many decisions as prompts, up to the G/(G − 1) of few groups.
    right = [k % 2 for k in range(100) for _ in range(4)]
    prompts = [k for k in range(100) for _ in range(4)]
    assert _decisions(right, prompts) == pytest.approx(99)
    # By hand: shares ½, groups (1,1), (0,0), (1,0): totals 1, −1, 0; 3/2 · 2/36 = 1/12 against 1/24
    assert _decisions([1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2]) == pytest.approx(3)
    # Nothing varies: one decision a prompt
    assert _decisions([1, 1, 1, 1], [0, 0, 1, 1]) == 2
    # Groups that even out never give more decisions than pairs
    assert _decisions([1, 0, 1, 0], [0, 0, 1, 1]) == 4


def test_interval_covers_when_prompts_repeat() -> None:
    """95 % of intervals hold the truth where pairs of a prompt share its difficulty."""
    rng, held, plain = np.random.default_rng(1), 0, 0
    for _ in range(400):
        difficulty = np.repeat(rng.beta(1.4, 0.6, 80), 5)  # mean 0.7
        labels = np.where(rng.random(400) < difficulty, "a", "b").tolist()
        ones, zeros, prompts = np.ones(400), np.zeros(400), np.repeat(np.arange(80), 5).tolist()
        clustered = annotator_accuracy(ones, labels, zeros, zeros, prompts).agreement
        naive = annotator_accuracy(ones, labels, zeros, zeros).agreement
        assert clustered.low is not None
        assert clustered.high is not None
        assert naive.low is not None
        assert naive.high is not None
        held += clustered.low <= 0.7 <= clustered.high
        plain += naive.low <= 0.7 <= naive.high
    assert 0.92 <= held / 400 <= 0.98
    assert plain / 400 < 0.90, "what the design effect is for"


def test_correlation_by_hand() -> None:
    # dx = −1.5 −.5 .5 1.5, dy = −1.5 .5 −.5 1.5: Σ dx·dy = 4, both sums of squares 5
    found = correlation([1, 2, 3, 4], [1, 3, 2, 4])
    assert found.pearson == pytest.approx(0.8)
    assert found.spearman == pytest.approx(0.8)
    # Monotone but bent: ranks agree wholly
    assert correlation([1, 2, 3], [1, 10, 1000]).spearman == pytest.approx(1)
    assert correlation([1, 1, 1], [1, 2, 3]).pearson is None
    assert correlation([1], [2]).spearman is None
    # Ties share ranks: x ranks 1, 2.5, 2.5, y ranks 1, 2, 3
    assert correlation([0, 1, 1], [1, 2, 3]).spearman == pytest.approx(math.sqrt(3) / 2)


def _ranks(values: list[float]) -> list[float]:
    """Average ranks by counting: those below, and half of the equals."""
    return [sum(v < x for v in values) + (values.count(x) + 1) / 2 for x in values]


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30))
def test_correlation_equals_the_standard_library(points: list[tuple[int, int]]) -> None:
    x, y = ([float(p[k]) for p in points] for k in (0, 1))
    found = correlation(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found.pearson is found.spearman is None
        return
    assert found.pearson == pytest.approx(statistics.correlation(x, y), abs=1e-12)
    assert found.spearman == pytest.approx(statistics.correlation(_ranks(x), _ranks(y)), abs=1e-12)


def test_length_loving_annotator_is_seen() -> None:
    rng = random.Random(0)
    lengths = [(rng.randint(1, 99), rng.randint(1, 99)) for _ in range(200)]
    labels = [rng.choice("ab") for _ in lengths]
    margins = [(x - y) / 32 for x, y in lengths]
    found = annotator_accuracy(margins, labels, [x for x, _ in lengths], [y for _, y in lengths])
    assert found.margin_length.pearson == pytest.approx(1)
    assert found.confidence_length.spearman == pytest.approx(1)
    assert found.agreement == found.length_baseline


def test_margin_by_length_by_hand() -> None:
    # Twenty pairs in ten parts of two; the part of the longest has margins 1 and 3.
    longer = np.arange(20.0)[::-1]
    margin = np.array([1.0, 3.0, *[0.0] * 18])
    parts = margin_by_length(margin, longer)
    assert [part.n for part in parts] == [2] * 10
    assert [part.length for part in parts] == [0.5 + 2 * k for k in range(10)]
    assert (parts[-1].median, parts[-1].low, parts[-1].high) == pytest.approx((2, 1.2, 2.8))
    assert (parts[0].median, parts[0].low) == (0, 0)
    assert margin_by_length(margin[:9], longer[:9]) == ()


def test_policy_by_hand() -> None:
    # h = (−1+2) − (−3+3) = 1 → a; (−5+1) − (−2+3) = −5 → b; equal → tie; (−4+1) − (−1+0) = −2 → b
    found = policy_accuracy(
        [-1.0, -5.0, -2.0, -4.0], [-3.0, -2.0, -4.0, -1.0],
        [-2.0, -1.0, -2.0, -1.0], [-3.0, -3.0, -4.0, 0.0],
        ["a", "a", "b", "b"], 0.1,
    )  # fmt: skip
    assert (found.agreement.correct, found.agreement.wrong, found.agreement.ties) == (2, 1, 1)
    assert found.mean_margin == pytest.approx(0.1 * (1 - 5 + 0 + 2) / 4)
    assert found.beta == 0.1


def test_untrained_policy_ties_everywhere() -> None:
    logp = [-1.0, -2.5]
    found = policy_accuracy(logp, logp, logp, logp, ["a", "b"], 0.5)
    assert found.agreement.ties == 2
    assert found.agreement.accuracy is None


def test_gra_by_hand() -> None:
    found = gra([1, 2, 3, 4, 5], [0, 2, 5, 3, 4.5])
    assert (found.wins, found.ties, found.losses) == (3, 1, 1)
    assert found.accuracy == pytest.approx(0.6)
    assert found.accuracy_ties_halved == pytest.approx(0.7)
    assert (found.low, found.high) == pytest.approx(wilson(3, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([math.nan], ["a"], [1], [1]), "margin: must be one column of finite"),
        (([0.0], ["chosen"], [1], [1]), "label: 'chosen' is unknown"),
        (([0.0, 1.0], ["a"], [1], [1]), "margin: 2 values for 1"),
        (([0.0], ["a"], [1], [1], ["p", "q"]), "prompts: 2 values for 1"),
    ],
)
def test_bad_columns_are_refused(arguments: tuple[list[float], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        # arguments of wrong kinds are the point
        annotator_accuracy(*arguments)  # type: ignore[arg-type]  # of unlike types


def test_differences_of_shares_end_at_a_hundred_points() -> None:
    """Of eight pairs: where length is always wrong, and where the unsure half is nearly so."""
    found = annotator_accuracy([5, 4, 3, 2, 1, -1, -1, -1], ["a"] * 8, [1] * 8, [2] * 8)
    assert (found.sure_half.value, found.sure_half.high) == (0.75, 1.0)
    found = annotator_accuracy([5, 4, 3, 2, 1, 1, 1, -1], ["a"] * 8, [1] * 8, [2] * 8)
    assert (found.above_length.value, found.above_length.high) == (0.875, 1.0)
