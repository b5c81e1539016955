"""Rows: what each token sees, where it stands and what predicts it, against a slow reading."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from listed_rows import listed_batch

from cwpo_dist.lm.rows import PAD, Row, collate, cut, planned_length, shared_mask

PAD_ID = 99
tokens = st.lists(st.integers(0, 50), min_size=1, max_size=7)


@st.composite
def a_row(draw) -> Row:
    answers = draw(st.lists(tokens, min_size=1, max_size=5))
    skipped = st.tuples(*[st.integers(0, len(answer) - 1) for answer in answers])
    return Row(draw(tokens), tuple(answers), draw(st.just(()) | skipped))


rows = st.lists(a_row(), min_size=1, max_size=4)
layouts = st.sampled_from(["packed", "shared", "plain"])


def read_back(batch, query):
    """Tokens that one query (flat index) sees, by position, and the positions it gave them."""
    length = batch.input_ids.shape[1]
    sequence, index = divmod(query, length)
    seen = batch.attention_mask[sequence, 0, index].nonzero()[:, 0].tolist()
    ids = batch.input_ids[sequence, seen].tolist()
    return ids, batch.position_ids[sequence, seen].tolist()


@given(rows)
@settings(max_examples=60)
def test_shared_token_sees_exactly_its_own_conversation(rows):
    batch = collate(rows, "shared", PAD_ID)
    n = number = 0
    for row in rows:
        for answer, skipped in zip(row.answers, row.skipped or [0] * 5, strict=False):
            conversation = [*row.prompt, *answer]
            for i in range(skipped, len(answer)):
                assert batch.target[n] == answer[i]
                assert batch.answer[n] == number
                upto = len(row.prompt) + i
                ids, positions = read_back(batch, int(batch.source[n]))
                assert ids == conversation[:upto]
                assert positions == list(range(upto))
                n += 1
            ids, _ = read_back(batch, int(batch.last[number]))
            assert ids == conversation
            number += 1
    assert (n, number) == (len(batch.target), len(batch.last))


@given(rows)
@settings(max_examples=60)
def test_packed_rows_are_shared_rows_without_their_pads(rows):
    packed, shared = collate(rows, "packed", PAD_ID), collate(rows, "shared", PAD_ID)
    real = (shared.input_ids != PAD_ID).flatten()
    assert torch.equal(packed.input_ids[0], shared.input_ids.flatten()[real])
    assert torch.equal(packed.position_ids[0], shared.position_ids.flatten()[real])
    new_index = real.cumsum(0) - 1  # of a token, once pads are gone
    for name in ("source", "last"):
        assert torch.equal(getattr(packed, name), new_index[getattr(shared, name)])
    assert torch.equal(packed.target, shared.target)
    assert torch.equal(packed.answer, shared.answer)


@given(rows)
@settings(max_examples=60)
def test_plain_rows_are_stock_right_padded_batches(rows):
    batch = collate(rows, "plain", PAD_ID)
    conversations = [[*row.prompt, *answer] for row in rows for answer in row.answers]
    answers = [n for row in rows for n in row.n_scored]  # what is skipped is of the prompt's type
    length = max(map(len, conversations))
    for b, conversation in enumerate(conversations):
        pads = [PAD_ID] * (length - len(conversation))
        assert batch.input_ids[b].tolist() == conversation + pads
        assert batch.attention_mask[b].tolist() == [1] * len(conversation) + [0] * len(pads)
        assert batch.position_ids[b, : len(conversation)].tolist() == list(range(len(conversation)))
        assert batch.last[b] == b * length + len(conversation) - 1
        types = [0] * (len(conversation) - answers[b]) + [1] * answers[b] + [0] * len(pads)
        assert batch.token_type_ids[b].tolist() == types
    # what a source predicts is the token after it
    assert torch.equal(batch.input_ids.flatten()[batch.source + 1], batch.target)


@given(rows, layouts)
@settings(max_examples=40)
def test_token_counts_and_planned_lengths_are_those_of_the_batch(rows, layout):
    batch = collate(rows, layout, PAD_ID)
    assert batch.padded_tokens == batch.input_ids.numel()
    lengths = [planned_length(row, layout) for row in rows]
    sequences = [len(row.answers) if layout == "plain" else 1 for row in rows]
    longest = max(n // count for n, count in zip(lengths, sequences, strict=True))
    assert batch.padded_tokens == (sum(lengths) if layout == "packed" else sum(sequences) * longest)
    assert batch.useful_tokens == (batch.input_ids != PAD_ID).sum()
    assert len(batch.target) == sum(sum(row.n_scored) for row in rows)


@given(a_row(), st.integers(1, 60), layouts)
def test_a_row_is_cut_into_as_few_as_the_budget_allows_and_nothing_is_lost(row, budget, layout):
    pieces = cut(row, budget, layout)
    assert [a for piece in pieces for a in piece.answers] == list(row.answers)
    assert [n for piece in pieces for n in piece.skipped] == list(row.skipped)
    assert all(piece.prompt == row.prompt for piece in pieces)
    for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
        assert len(piece.answers) == 1 or planned_length(piece, layout) <= budget
        if after is not None:  # the next answer would not fit
            more = Row(row.prompt, (*piece.answers, after.answers[0]))
            assert planned_length(more, layout) > budget
    assert cut(row, planned_length(row, layout), layout) == [row]


def test_pads_see_themselves_alone_and_are_seen_by_none():
    batch = collate([Row([1, 2], ([3], [4])), Row([1, 2, 5], ([3, 6], [4, 7, 8]))], "shared", 0)
    mask = batch.attention_mask[0, 0]
    assert torch.equal(mask[4:], torch.eye(8, dtype=torch.bool)[4:])
    assert not mask[:4, 4:].any()


def test_mask_worked_by_hand():
    # prompt of 2, answer a of 2, answer b of 1, one pad
    mask = shared_mask(torch.tensor([[0, 0, 1, 1, 2, PAD]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_row_lengths():
    row = Row([1, 2, 3], ([4], [5, 6]), (0, 1))
    assert (row.n_tokens, row.n_longest, row.n_scored) == (6, 5, (1, 1))
    assert (planned_length(row, "shared"), planned_length(row, "plain")) == (6, 10)


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([], "none given"),
        ([Row([1], ())], r"rows\[0\]: no answer"),
        ([Row([], ([2],))], r"rows\[0\]: .*empty prompt"),
        ([Row([1], ([2],)), Row([1], ([],))], r"rows\[1\]: .*empty prompt or answer"),
        ([Row([1], ([2, 3], [4]), (1, 1))], r"rows\[0\]: skipped \(1, 1\)"),
        ([Row([1], ([2, 3], [4, 5]), (1,))], r"rows\[0\]: skipped \(1,\)"),
    ],
)
def test_rows_that_make_no_batch_are_refused(rows, named):
    with pytest.raises(ValueError, match=named):
        collate(rows, "shared", 0)


def test_to_moves_every_tensor():
    batch = collate([Row([1], ([2], [3]))], "shared", 0).to("meta")
    moved = [v for v in vars(batch).values() if isinstance(v, torch.Tensor)]
    assert len(moved) == 7
    assert all(tensor.is_meta for tensor in moved)
    assert batch.layout == "shared"


@pytest.mark.parametrize(("layout", "where"), [("packed", "cpu"), ("shared", "meta")])
def test_lengths_of_packed_rows_stay_where_they_can_be_read_without_waiting(layout, where):
    batch = collate([Row([1, 2], ([3], [4, 5]))], layout, 0).to("meta")
    assert batch.attention_mask.device.type == where
    assert batch.input_ids.device.type == "meta"


def test_picked_answers_keep_what_they_skip():
    row = Row([1], ([2, 3], [4, 5, 6], [7]), (1, 2, 0))
    assert row.picked((1, 0)) == Row([1], ([4, 5, 6], [2, 3]), (2, 1))
    assert row.picked((2,)) == Row([1], ([7],), (0,))
    assert Row([1], ([2], [3])).picked((1, 0)) == Row([1], ([3], [2]))


def view(ids: list[int]) -> memoryview:
    return np.asarray(ids, np.int32).data


@given(
    rows=st.lists(a_row(), min_size=1, max_size=5),
    layout=st.sampled_from(["packed", "shared", "plain"]),
    mapped=st.booleans(),
)
def test_arrays_give_what_lists_give_token_by_token(rows, layout, mapped):
    """Also of rows that are views of a mapped file."""
    expected = listed_batch(rows, layout, 7)
    if mapped:
        rows = [Row(view(r.prompt), tuple(map(view, r.answers)), r.skipped) for r in rows]
    found = collate(rows, layout, 7)
    for field in fields(found):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0, msg=field.name)
        else:
            assert ours == theirs, field.name
