"""Confidence, weights and selection against hand-worked numbers and their properties."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwpo_dist.config import ARMS, WeighConfig
from cwpo_dist.weighting import (
    ENSEMBLE_FUNCTIONS,
    WEIGHT_FUNCTIONS,
    Scale,
    Selection,
    confidence,
    join,
    last_of_top,
    madpo,
    sigmoid,
    top_count,
    weights,
)

margins = st.floats(-1e300, 1e300)
pairs = st.dictionaries(st.text("abc", max_size=6), st.floats(0, 1), max_size=40)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # at margins 0, 0.5, 2, 10
        ("confidence", [0.0, 0.2449186624, 0.7615941560, 0.9999092043]),
        ("sigmoid", [0.5, 0.6224593312, 0.8807970780, 0.9999546021]),
        ("clipped", [0.0, 0.5, 1.0, 1.0]),
        ("clipped_fifth", [0.0, 0.1, 0.4, 1.0]),
        ("one", [1.0, 1.0, 1.0, 1.0]),
        # c of 1.9971, 1.9951, 1.9781 and 0.5333
        ("madpo", [1.0, 1.1736882117, 1.1140192088, 0.9952369982]),
    ],
)
def test_weight_functions_by_hand(name: str, values: list[float]) -> None:
    assert [WEIGHT_FUNCTIONS[name](m) for m in (0.0, 0.5, 2.0, 10.0)] == pytest.approx(values)


def test_registry_has_what_the_config_offers() -> None:
    schema = WeighConfig.model_json_schema()["properties"]["weight_function"]["anyOf"][0]
    known = WEIGHT_FUNCTIONS.keys() | ENSEMBLE_FUNCTIONS.keys()
    assert set(schema["enum"]) == known
    assert {arm.weight_function for arm in ARMS.values()} <= known


@given(margins)
def test_confidence_is_the_papers_formula(margin: float) -> None:
    assert confidence(margin) == pytest.approx(2 * (sigmoid(margin) - 0.5), abs=1e-15)
    assert confidence(-margin) == -confidence(margin)
    assert -1.0 <= confidence(margin) <= 1.0


@given(st.floats(0, 1e-6))
def test_small_margins_keep_their_digits(margin: float) -> None:
    """tanh(m/2) ≈ m/2, where 2·(σ(m) − ½) has lost all but a few digits."""
    assert confidence(margin) == pytest.approx(margin / 2, rel=1e-9)


@given(margins, margins)
def test_weights_are_monotone_finite_and_bounded(first: float, second: float) -> None:
    low, high = sorted([first, second])
    for name, function in WEIGHT_FUNCTIONS.items():
        assert function(low) <= function(high) or name == "madpo"
        assert math.isfinite(function(low))
        assert abs(function(high)) <= (1.21 if name == "madpo" else 1.0)


@given(st.floats(-30, 30))
def test_madpo_is_the_authors_formula_and_trusts_what_the_annotator_affirms(margin: float) -> None:
    tau, c_max, c_min = math.log(999), 2.0, 0.5
    steep = (c_max - 1) / (1 - c_min) * math.exp(abs(margin) - tau)
    c = c_min + (c_max - c_min) / (1 + steep)
    expected = sigmoid(c * margin) / sigmoid(margin) if margin > -tau else 1.0
    assert madpo(margin) == pytest.approx(expected, rel=1e-4)
    if 1e-3 < abs(margin) < tau - 1e-3:
        assert (madpo(margin) > 1) == (margin > 0), "unsure: the label counts for more, if it holds"
    elif tau + 1e-3 < margin:
        assert 0.99 < madpo(margin) < 1, "sure: it counts for less"


def select(
    confidences: list[float], pair_ids: list[str], top: float | None, least: float | None = None
) -> list[bool]:
    """The flags that `weigh` gives, shard by shard."""
    ids = pa.chunked_array([pa.array(pair_ids, pa.string())])
    last = None if top is None else last_of_top(np.array(confidences), ids, top)
    selection = Selection(last, least)
    return [selection.selects(c, i) for c, i in zip(confidences, pair_ids, strict=True)]


@given(pairs, st.integers(0, 1000), st.randoms())
def test_selection_is_exact_best_and_independent_of_order(
    known: dict[str, float], per_mille: int, random: object
) -> None:
    ids, fraction = list(known), per_mille / 1000
    flags = select([known[i] for i in ids], ids, fraction)
    chosen = {i for i, keep in zip(ids, flags, strict=True) if keep}
    # exact arithmetic: ⌈per_mille · n / 1000⌉
    assert len(chosen) == math.ceil(Fraction(per_mille * len(ids), 1000))
    for kept in chosen:
        for left in set(ids) - chosen:
            assert (-known[kept], kept) < (-known[left], left)
    shuffled = list(ids)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis gives a Random
    again = select([known[i] for i in shuffled], shuffled, fraction)
    assert {i for i, keep in zip(shuffled, again, strict=True) if keep} == chosen


def test_top_thirty_percent_by_hand() -> None:
    ids = ["e", "b", "d", "c", "a", "f", "g", "h", "i", "j"]
    values = [0.9, 0.5, 0.5, 0.5, 0.1, 0.2, 0.3, 0.4, 0.0, 0.1]
    # 3 of 10: e, then b and c of the three that tie
    kept = [i for i, keep in zip(ids, select(values, ids, 0.3), strict=True) if keep]
    assert sorted(kept) == ["b", "c", "e"]


@pytest.mark.parametrize(
    ("n", "fraction", "count"),
    [
        (10, 0.3, 3),
        (10, 0.31, 4),
        (1, 0.01, 1),
        (0, 0.5, 0),
        (7, 0.0, 0),
        (7, 1.0, 7),
        (100, 0.07, 7),
    ],
)
def test_top_count_rounds_up_but_not_rounding_errors(n: int, fraction: float, count: int) -> None:
    assert top_count(n, fraction) == count


def test_min_confidence_is_inclusive_and_holds_with_top_fraction() -> None:
    ids, values = ["a", "b", "c", "d"], [0.5, 0.4, 0.6, 0.1]
    assert select(values, ids, None, 0.5) == [True, False, True, False]
    assert select(values, ids, 0.75, 0.5) == [True, False, True, False]
    assert select(values, ids, 0.25, 0.5) == [False, False, True, False]
    assert select(values, ids, None) == [True] * 4


# Three annotators of two pairs, by hand: margins 1, 2, 6 and −1, 1, none.
MARGINS_NK = np.array([[1.0, 2.0, 6.0], [-1.0, 1.0, np.nan]])


def test_ensemble_by_hand() -> None:
    joined = join(MARGINS_NK, Scale.raw(3))
    assert joined.margin == pytest.approx([3.0, 0.0])
    # deviations −2, −1, 3: (4 + 1 + 9) / 3; and −1, 1
    assert joined.disagreement == pytest.approx([math.sqrt(14 / 3), 1.0])
    assert joined.dissent == pytest.approx([0.0, 0.5])
    assert joined.scored.tolist() == [3, 2]
    # lower bounds 3 − 2.160 and 0 − 1
    expected = [math.tanh((3 - math.sqrt(14 / 3)) / 2), 0.0]
    found = weights("lower_confidence", joined.margin, joined.disagreement)
    assert found == pytest.approx(expected)
    assert weights("confidence", joined.margin, joined.disagreement)[0] > found[0]


def test_who_sees_no_difference_votes_for_neither() -> None:
    joined = join(np.array([[1.0, 0.0, 0.0], [2.0, -1.0, 0.0]]), Scale.raw(3))
    assert joined.dissent == pytest.approx([0.0, 1 / 3])


def test_temperatures_scale_members_then_their_mean() -> None:
    joined = join(MARGINS_NK, Scale((1.0, 2.0, 3.0), joint=0.5))
    # (1 + 1 + 2) / 3 / 0.5, deviations (−1/3, −1/3, 2/3) / 0.5
    assert joined.margin == pytest.approx([8 / 3, (-1 + 0.5) / 2 / 0.5])
    assert joined.disagreement[0] == pytest.approx(math.sqrt((1 + 1 + 4) / 27) / 0.5)


def test_one_score_of_several_is_no_ensemble() -> None:
    several = join(np.array([[2.0, np.nan], [np.nan, np.nan], [2.0, 2.0]]), Scale.raw(2))
    assert np.isnan(several.margin[:2]).all()
    assert several.margin[2] == 2.0
    assert several.scored.tolist() == [1, 0, 2]
    alone = join(np.array([[2.0], [np.nan]]), Scale.raw(1))
    assert alone.margin[0] == 2.0
    assert np.isnan(alone.margin[1])


finite = st.floats(-50, 50)
ensembles = st.integers(1, 5).flatmap(
    lambda k: st.lists(
        st.lists(finite | st.just(math.nan), min_size=k, max_size=k), min_size=1, max_size=6
    )
)


@given(ensembles, st.randoms())
def test_order_of_annotators_does_not_matter(margins: list[list[float]], random: object) -> None:
    margins_NK = np.array(margins)
    order = list(range(margins_NK.shape[1]))
    random.shuffle(order)  # type: ignore[attr-defined]  # hypothesis gives a Random
    first = join(margins_NK, Scale.raw(len(order)))
    other = join(margins_NK[:, order], Scale.raw(len(order)))
    for name in ("margin", "disagreement", "dissent", "scored"):
        np.testing.assert_array_equal(getattr(first, name), getattr(other, name))


@given(st.lists(finite, min_size=1, max_size=6), st.integers(1, 5))
def test_identical_annotators_are_one_and_one_is_plain_cw(margins: list[float], k: int) -> None:
    margins_N = np.array(margins)
    joined = join(np.repeat(margins_N[:, None], k, axis=1), Scale.raw(k))
    np.testing.assert_array_equal(joined.margin, margins_N)
    assert not joined.disagreement.any()
    assert not joined.dissent.any()
    size = np.abs(joined.margin)
    plain = weights("confidence", np.abs(margins_N), np.zeros_like(size))
    np.testing.assert_array_equal(weights("lower_confidence", size, joined.disagreement), plain)


@given(st.floats(0, 50), st.floats(0, 50), st.floats(0, 50))
def test_disagreement_never_adds_weight(margin: float, less: float, more: float) -> None:
    low, high = sorted([less, more])
    known, doubted = (
        weights("lower_confidence", np.array([margin]), np.array([s]))[0] for s in (low, high)
    )
    assert 0.0 <= doubted <= known <= confidence(margin)
