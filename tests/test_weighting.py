"""Confidence, weights and selection against hand-worked numbers and their properties."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwpo_dist.config import ARMS, WeighConfig
from cwpo_dist.weighting import WEIGHT_FUNCTIONS, confidence, select, sigmoid, top_count

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
    ],
)
def test_weight_functions_by_hand(name: str, values: list[float]) -> None:
    assert [WEIGHT_FUNCTIONS[name](m) for m in (0.0, 0.5, 2.0, 10.0)] == pytest.approx(values)


def test_registry_has_what_the_config_offers() -> None:
    schema = WeighConfig.model_json_schema()["properties"]["weight_function"]["anyOf"][0]
    assert set(schema["enum"]) == set(WEIGHT_FUNCTIONS)
    assert {arm.weight_function for arm in ARMS.values()} <= set(WEIGHT_FUNCTIONS)


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
    for function in WEIGHT_FUNCTIONS.values():
        assert function(low) <= function(high)
        assert math.isfinite(function(low))
        assert abs(function(high)) <= 1.0


@given(pairs, st.integers(0, 1000), st.randoms())
def test_selection_is_exact_best_and_independent_of_order(
    known: dict[str, float], per_mille: int, random: object
) -> None:
    ids, fraction = list(known), per_mille / 1000
    flags = select([known[i] for i in ids], ids, top_fraction=fraction)
    chosen = {i for i, keep in zip(ids, flags, strict=True) if keep}
    # exact arithmetic: ⌈per_mille · n / 1000⌉
    assert len(chosen) == math.ceil(Fraction(per_mille * len(ids), 1000))
    for kept in chosen:
        for left in set(ids) - chosen:
            assert (-known[kept], kept) < (-known[left], left)
    shuffled = list(ids)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = select([known[i] for i in shuffled], shuffled, top_fraction=fraction)
    assert {i for i, keep in zip(shuffled, again, strict=True) if keep} == chosen


def test_top_thirty_percent_by_hand() -> None:
    ids = ["e", "d", "c", "b", "a", "f", "g", "h", "i", "j"]
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
    assert select(values, ids, min_confidence=0.5) == [True, False, True, False]
    assert select(values, ids, 0.75, 0.5) == [True, False, True, False]
    assert select(values, ids, 0.25, 0.5) == [False, False, True, False]
    assert select(values, ids) == [True] * 4


@pytest.mark.parametrize(
    ("values", "ids", "fraction", "message"),
    [
        ([math.nan], ["a"], 0.5, "nan of pair 'a'"),
        ([0.1, 0.2], ["a", "a"], 0.5, "stands twice"),
        ([0.1], ["a", "b"], 0.5, "2 ids for 1"),
        ([0.1], ["a"], 1.5, r"top_fraction: 1\.5"),
    ],
)
def test_selection_refuses(
    values: list[float], ids: list[str], fraction: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        select(values, ids, fraction)
