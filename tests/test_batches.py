"""Batches: an order that depends on (seed, epoch, step) alone, and plans that lose no row."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwpo_dist.lm import batches
from cwpo_dist.lm.batches import (
    global_batch,
    plan_micro_batches,
    proportional,
    steps_per_epoch,
    systematic,
)

lengths_st = st.lists(st.integers(1, 900), max_size=80)


def order(n, seed, epoch):
    """The rows of an epoch, as one batch of all."""
    return global_batch(n, n, seed, epoch)[1].tolist()


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 3))
def test_every_row_exactly_once_an_epoch(n, batch, seed, epoch):
    steps = steps_per_epoch(n, batch)
    drawn = [global_batch(n, batch, seed, epoch * steps + step) for step in range(steps)]
    assert {number for number, _ in drawn} == {epoch}
    assert sorted(np.concatenate([rows for _, rows in drawn])) == list(range(n))
    assert all(len(rows) == batch for _, rows in drawn[:-1])


def test_order_is_pinned_and_changes_with_seed_and_epoch():
    # Pinned: a run of last year must continue in the same order.
    assert order(8, seed=3, epoch=0) == [1, 0, 2, 5, 4, 3, 7, 6]
    orders = [tuple(order(50, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_callers_cannot_spoil_the_order():
    global_batch(5, 5, 0, 0)[1][:] = 0
    assert sorted(order(5, 0, 0)) == list(range(5))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any), st.integers(1, 12))
def test_over_all_offsets_a_row_is_drawn_as_often_as_its_share_says(shares, drawn):
    """Exactly: share × drawn times in Σ shares offsets, so the mean loss is Σ C·ℓ / ΣC."""
    total = sum(shares)
    counts = np.zeros(len(shares), dtype=int)
    for offset in range(total):
        rows = systematic(np.array(shares), drawn, offset)
        assert len(rows) == drawn
        np.add.at(counts, rows, 1)
        if max(shares) * drawn <= total:
            assert len(set(rows.tolist())) == drawn, "twice in one epoch"
    assert counts.tolist() == [share * drawn for share in shares]


@given(
    st.lists(st.just(0.0) | st.floats(2**-20, 1, width=32), min_size=1, max_size=60).filter(any),
    st.integers(0, 99),
)
def test_an_epoch_of_proportional_sampling_has_sum_of_c_rows_none_twice(weights, seed):
    order = proportional(weights)
    assert order.drawn == max(1, int(sum(round(w * 2**32) for w in weights) / 2**32))
    for epoch in range(3):
        rows = order.epoch(seed, epoch)
        assert len(rows) == order.drawn
        assert len(set(rows.tolist())) == order.drawn
        assert all(weights[row] > 0 for row in rows)


def test_over_many_epochs_inclusion_is_proportional_to_c():
    weights = [0.0, 0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 0.3125]  # ΣC = 3
    order, epochs = proportional(weights), 4000
    assert order.drawn == 3
    counts = np.zeros(len(weights))
    for epoch in range(epochs):
        np.add.at(counts, order.epoch(7, epoch), 1)
    spread = np.sqrt(np.array(weights) * (1 - np.array(weights)) / epochs)
    assert np.all(np.abs(counts / epochs - weights) <= 4 * spread)
    assert counts[6] == epochs, "C = 1: in every epoch"


def test_draws_depend_on_seed_and_step_alone():
    """A resumed run, or one of another world size, asks for a step and finds the same rows."""
    weights = [0.1 + 0.8 * (i % 7) / 7 for i in range(40)]
    whole = [global_batch(proportional(weights), 4, 3, step) for step in range(20)]
    for step in (13, 2, 19):
        epoch, rows = global_batch(proportional(list(weights)), 4, 3, step)
        assert (epoch, rows.tolist()) == (whole[step][0], whole[step][1].tolist())
    # Pinned: a run of last year must continue with the same rows.
    assert whole[0][1].tolist() == [13, 20, 33, 19]
    assert [epoch for epoch, _ in whole] == [step // 5 for step in range(20)]  # 17 rows in fours
    assert whole[0][1].tolist() != global_batch(proportional(weights), 4, 4, 0)[1].tolist()


@pytest.mark.parametrize("weights", [[], [0.5, 1.5], [-0.1, 0.5]])
def test_weights_that_cannot_be_probabilities_are_refused(weights):
    with pytest.raises(ValueError, match="from 0 to 1"):
        proportional(weights)
    with pytest.raises(ValueError, match="all are zero, or nearly"):
        proportional([0.0, 1e-30])


@given(lengths_st, st.integers(1, 4096), st.integers(1, 8))
def test_plan_covers_each_row_once_within_the_budget(lengths, max_tokens, world_size):
    plan = plan_micro_batches(lengths, max_tokens, world_size, "shared")
    assert len(plan) == world_size
    assert len({len(micro_steps) for micro_steps in plan}) == 1
    assert len(plan[0]) >= 1
    flat = [row for rank in plan for rows in rank for row in rows]
    assert sorted(flat) == list(range(len(lengths)))
    for rows in (rows for rank in plan for rows in rank):
        cost = len(rows) * max((lengths[row] for row in rows), default=0)
        assert cost <= max_tokens or len(rows) == 1


@given(lengths_st.filter(bool), st.integers(1, 4096), st.integers(1, 8))
def test_ranks_idle_only_where_rows_are_lacking(lengths, max_tokens, world_size):
    plan = plan_micro_batches(lengths, max_tokens, world_size, "shared")
    micro_batches = [rows for rank in plan for rows in rank]
    if any(not rows for rows in micro_batches):
        assert max(map(len, micro_batches)) == 1
        assert sum(not rows for rows in micro_batches) < world_size


@given(lengths_st.filter(bool), st.integers(900, 4096))
def test_one_rank_wastes_no_micro_batch(lengths, max_tokens):
    """No two neighbours in the plan could have been one: greedy filling is tight."""
    (plan,) = plan_micro_batches(lengths, max_tokens, 1, "shared")
    by_length = sorted(plan, key=lambda rows: -max(lengths[row] for row in rows))
    for longer, shorter in pairwise(by_length):
        longest = max(lengths[row] for row in longer)
        assert (len(longer) + 1) * longest > max_tokens
        assert len(shorter) >= 1


def test_plan_worked_by_hand():
    lengths = [5, 10, 2, 6, 10, 5]
    # 2 × 10 exceeds 18, and 3 × 6 does not; the costliest micro-batch comes first
    assert plan_micro_batches(lengths, 18, 1, "shared") == [[[3, 0, 5], [1], [4], [2]]]
    # three micro-batches for two ranks: the one with most rows is halved
    plan = plan_micro_batches(lengths, 20, 1, "shared")
    assert plan == [[[1, 4], [3, 0, 5], [2]]]
    plan = plan_micro_batches(lengths, 20, 2, "shared")
    assert plan == [[[1, 4], [5]], [[3, 0], [2]]]


def test_plan_puts_like_costs_beside_each_other():
    """Ranks wait for each other at each micro-step, so its costs must not differ much."""
    lengths = np.random.default_rng(0).integers(50, 1000, 256)
    plan = plan_micro_batches(lengths, 4096, 4, "shared")

    def cost(rows):
        return len(rows) * max(lengths[row] for row in rows)

    waited = sum(max(map(cost, step)) for step in zip(*plan, strict=True))
    worked = sum(cost(rows) for rank in plan for rows in rank) / 4
    assert waited < 1.1 * worked


@given(lengths_st, st.integers(1, 4096), st.integers(1, 8))
def test_packed_plan_covers_each_row_once_within_the_budget(lengths, max_tokens, world_size):
    plan = plan_micro_batches(lengths, max_tokens, world_size, "packed")
    assert len(plan) == world_size
    assert len({len(micro_steps) for micro_steps in plan}) == 1
    flat = [row for rank in plan for rows in rank for row in rows]
    assert sorted(flat) == list(range(len(lengths)))
    for rows in (rows for rank in plan for rows in rank):
        assert sum(lengths[row] for row in rows) <= max_tokens or len(rows) == 1


def test_packed_plan_worked_by_hand():
    # 38 tokens in batches of 20: two of 19, and for two ranks one each
    lengths = [5, 10, 2, 6, 10, 5]
    assert plan_micro_batches(lengths, 20, 1, "packed") == [[[4, 0, 5], [1, 3, 2]]]
    assert plan_micro_batches(lengths, 20, 2, "packed") == [[[4, 0, 5]], [[1, 3, 2]]]
    # a row longer than the budget stands alone
    assert plan_micro_batches([30, 4, 4], 10, 1, "packed") == [[[0], [1, 2]]]


def test_packed_micro_batches_are_even():
    """Ranks wait for each other at each micro-step."""
    lengths = np.random.default_rng(0).integers(50, 1000, 256)
    plan = plan_micro_batches(lengths, 4096, 4, "packed")
    tokens = [sum(lengths[row] for row in rows) for rank in plan for rows in rank]
    assert max(tokens) < 1.05 * min(tokens)
    assert len(tokens) <= -(-sum(lengths) // 4096) + 4


rows_st = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 9)), max_size=50)


@given(rows_st, st.integers(1, 4096), st.integers(1, 4))
def test_rows_of_unlike_many_sequences_stay_within_the_budget(rows, max_tokens, world_size):
    lengths, counts = [n * count for n, count in rows], [count for _, count in rows]
    plan = plan_micro_batches(lengths, max_tokens, world_size, "plain", counts)
    flat = [micro for rank in plan for micro in rank]
    assert sorted(row for micro in flat for row in micro) == list(range(len(rows)))
    for micro in filter(None, flat):
        padded = sum(counts[row] for row in micro) * max(rows[row][0] for row in micro)
        assert padded <= max_tokens or len(micro) == 1


@given(lengths_st, st.integers(1, 4), st.integers(1, 4096), st.integers(1, 4))
def test_rows_of_as_many_sequences_are_planned_as_if_each_were_one(lengths, count, budget, ranks):
    many = [count * length for length in lengths]
    counted = plan_micro_batches(many, budget, ranks, "plain", [count] * len(many))
    assert counted == plan_micro_batches(many, budget, ranks, "plain")


def test_no_rows_is_one_empty_micro_step():
    assert plan_micro_batches([], 100, 3, "shared") == [[[]], [[]], [[]]]


@pytest.mark.parametrize(("n", "batch"), [(0, 4), (4, 0)])
def test_impossible_numbers_are_refused(n, batch):
    with pytest.raises(ValueError, match="at least 1"):
        global_batch(n, batch, 0, 0)
    with pytest.raises(ValueError, match="positive"):
        plan_micro_batches([1], 0, 1, "shared")


def test_another_seed_draws_from_another_offset(monkeypatch):
    """Beside another order: in one order, too, other rows are drawn."""
    monkeypatch.setattr(batches, "_permutation", lambda of, _seed, _epoch: np.arange(of.rows))
    order = proportional([0.5] * 64)
    drawn = {tuple(order.epoch(seed, 0)) for seed in range(16)}
    assert len(drawn) == 2, "of evenly spaced rows of half a weight: every second, from 0 or 1"
