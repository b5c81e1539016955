"""Order, side and split follow from content and seed alone; duplicates merge; leaks are found."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwpo_dist.pairs import kept_columns
from cwpo_dist.pairs.buckets import Shards, turned
from cwpo_dist.pairs.chosen import chosen_first
from cwpo_dist.pairs.parsing import ParsedPair
from cwpo_dist.pairs.records import pair_id, prompt_id
from cwpo_dist.pairs.splits import (
    SIDE_SCHEMA,
    SIDES,
    SplitRule,
    drawn,
    is_swapped,
    leaks,
    merge,
    split_of,
)
from cwpo_dist.pairs.stored import Told

N = 4000
RULE = SplitRule(seed=3, labelled=0.3, validation=0.1, test=0.2)
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=5)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS})
)


def row_of(prompt: str, first: str, second: str, label: Any = "first", seed: int = 3) -> Any:
    rule = SplitRule(seed, RULE.labelled, RULE.validation, RULE.test)
    return drawn(ParsedPair(prompt, first, second, label, 4, 1), rule, "here", None)


@given(prompt=TEXTS | MESSAGES, first=TEXTS | MESSAGES, second=TEXTS | MESSAGES)
def test_a_pair_id_does_not_know_which_answer_came_first(
    prompt: Any, first: Any, second: Any
) -> None:
    identity = pair_id(prompt_id(prompt), first, second)
    assert identity == pair_id(prompt_id(prompt), second, first)
    assert identity != pair_id(prompt_id([prompt]), first, second)


@given(prompt=TEXTS, first=TEXTS, second=TEXTS, seed=st.integers(0, 9))
def test_two_orders_of_a_pair_give_one_row_with_its_label_and_votes(
    prompt: str, first: str, second: str, seed: int
) -> None:
    if first == second:
        return
    one = row_of(prompt, first, second, "first", seed)
    rule = SplitRule(seed, RULE.labelled, RULE.validation, RULE.test)
    other = drawn(ParsedPair(prompt, second, first, "second", 1, 4), rule, "here", None)
    assert one == other
    pair, _ = one
    assert pair.chosen == first
    assert chosen_first(pair.label, pair.votes_a, pair.votes_b) == (4, 1)


def test_position_leaks_no_label() -> None:
    # The chosen answer sorts first in all of them: an order by content alone would tell.
    rows = [row_of(f"p{i}", "answer a", "answer b") for i in range(N)]
    share = sum(pair.label == "a" for pair, _ in rows) / N
    assert abs(share - 0.5) < 4 * 0.5 / N**0.5
    by_split = [pair.label == "a" for pair, place in rows if place.side == SIDES.index("test")]
    assert abs(sum(by_split) / len(by_split) - 0.5) < 4 * 0.5 / len(by_split) ** 0.5


def test_another_seed_gives_another_order() -> None:
    ids = [pair_id(prompt_id(f"p{i}"), "a", "b") for i in range(N)]
    same = sum(is_swapped(0, each) == is_swapped(1, each) for each in ids)
    assert abs(same / N - 0.5) < 4 * 0.5 / N**0.5


def test_sides_have_their_shares_and_prompts_never_move() -> None:
    keys = [str(i) for i in range(N)]
    sides = [RULE.side(key) for key in keys]
    for side, share in (("test", 0.2), ("validation", 0.1), ("train", 0.7)):
        assert abs(sides.count(side) / N - share) < 4 * (share * (1 - share) / N) ** 0.5
    more = SplitRule(seed=3, labelled=0.9, validation=0.1, test=0.2)
    assert [more.side(key) for key in keys] == sides
    # More labels only add to those there were: yesterday's labelled pairs stay labelled.
    assert all(more.is_labelled(key) for key in keys if RULE.is_labelled(key))
    labelled = sum(RULE.is_labelled(key) for key in keys)
    assert abs(labelled / N - 0.3) < 4 * (0.3 * 0.7 / N) ** 0.5


def test_the_labelled_draw_does_not_depend_on_the_side() -> None:
    train = [str(i) for i in range(N) if RULE.side(str(i)) == "train"]
    share = sum(RULE.is_labelled(key) for key in train) / len(train)
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / len(train)) ** 0.5


@given(key=st.text(), into=st.sampled_from(SIDES))
def test_into_overrules_the_draw(key: str, into: Any) -> None:
    assert RULE.side(key, into) == into


def test_into_the_labelled_part_is_for_training_whatever_the_draw() -> None:
    none = SplitRule(0, labelled=0.0, validation=0.0, test=1.0)
    pair = ParsedPair("p", "a", "b", "first")
    for into, labelled in (("labelled", True), ("train", False)):
        place = drawn(pair, none, "here", into)[1]
        assert (SIDES[place.side], place.in_labelled_part) == ("train", labelled)


def test_shares_of_nought_and_one_are_exact() -> None:
    none = SplitRule(0, labelled=0.0, validation=0.0, test=0.0)
    all_test = SplitRule(0, labelled=1.0, validation=0.0, test=1.0)
    for key in map(str, range(500)):
        assert none.side(key) == "train"
        assert not none.is_labelled(key)
        assert all_test.side(key) == "test"
        assert all_test.is_labelled(key)


@pytest.mark.parametrize(
    ("side", "drawn", "label", "split"),
    [
        ("train", True, "a", "labelled"),
        ("train", False, "a", "unlabelled"),
        ("train", True, None, "unlabelled"),
        ("test", True, "a", "test"),
        ("validation", True, None, "validation"),
    ],
)
def test_a_training_pair_without_a_label_is_unlabelled(
    side: Any, drawn: bool, label: str | None, split: str
) -> None:
    assert split_of(side, drawn, label) == split


def copy(label: str | None, votes_a: int | None = None, votes_b: int | None = None) -> Any:
    people: Any = None if label == "tie" else label
    return Told(people, label == "tie", votes_a, votes_b, None, None, None, None, None)


@pytest.mark.parametrize(
    ("copies", "label", "votes", "conflict"),
    [
        ([copy("a")], "a", (None, None), False),
        ([copy("a", 3, 1), copy("a", 2, 2)], "a", (5, 3), False),
        ([copy("a", 3, 1), copy("b", 1, 4)], None, (4, 5), True),
        ([copy("a", 1, 0), copy("b", 0, 1), copy("b", 0, 1)], "b", (1, 2), False),  # one each
        ([copy("a", 0, 1), copy("b", 0, 1), copy("b", 0, 1)], None, (0, 3), True),
        ([copy("a", 1, 0), copy("b", 0, 1)], "tie", (1, 1), False),
        ([copy("a", 1, 0), copy("tie", 0, 0), copy("b", 0, 1)], None, (1, 1), True),
        ([copy("a", 3, 4), copy("b", 1, 4)], None, (4, 8), True),  # a label against its votes
        ([copy("a"), copy("b", 1, 4)], None, (1, 4), True),
        ([copy(None), copy("b", 1, 4), copy("b")], "b", (1, 4), False),
        ([copy(None), copy(None)], None, (None, None), False),
        ([copy(None, 0, 0), copy(None)], None, (0, 0), False),
        ([copy("tie"), copy("tie", 1, 1)], "tie", (1, 1), False),
        ([copy("tie"), copy("a")], None, (None, None), True),
        ([copy(None), copy("tie")], "tie", (None, None), False),
    ],
)
def test_duplicates_add_their_votes_and_must_agree(
    copies: Any, label: str | None, votes: Any, conflict: bool
) -> None:
    merged, conflicting = merge(copies)
    assert ("tie" if merged.tie else merged.label) == label
    assert not merged.tie or merged.label is None
    assert (merged.votes_a, merged.votes_b) == votes
    assert conflicting is conflict


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 2))))
def test_leaks_are_the_prompts_on_several_sides(found: list[tuple[str, int]]) -> None:
    rows = [{"prompt_hash": prompt, "side": side} for prompt, side in found]
    table = leaks(pa.Table.from_pylist(rows, schema=SIDE_SCHEMA))
    sides: dict[str, set[int]] = {}
    for prompt, side in found:
        sides.setdefault(prompt, set()).add(side)
    expected = {prompt: max(at) for prompt, at in sides.items() if len(at) > 1}
    assert {row["prompt_hash"]: row["side"] for row in table.to_pylist()} == expected


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([None], "string"),
        ([True, None], "bool"),
        ([1, -(2**63), None], "int"),
        ([1, 0.5], "float"),
        ([2**53 + 1, 0.5], "json"),
        ([2**63], "json"),
        (["x", None], "string"),
        (["x", 1], "json"),
        ([True, 1], "json"),
        ([[1], None], "json"),
        ([{"a": 1}], "json"),
    ],
)
def test_a_kept_column_has_the_type_that_changes_no_value(values: list[Any], kind: str) -> None:
    types = [each for value in values if (each := kept_columns.value_type(value)) is not None]
    assert kept_columns.settle(types) == kind
    schema = kept_columns.kept_schema({"x": kind})
    rows = [{"x": kept_columns.spell(value, kind)} for value in values]
    table = pa.Table.from_pylist(rows, schema)
    if kind != "json":
        assert table["x"].to_pylist() == values


def test_flipped_labels_are_so_many_training_ones_and_no_others() -> None:
    n = 4000
    ids = [f"{k:032x}" for k in range(n)]
    splits = [("labelled", "unlabelled", "test", "validation")[k % 4] for k in range(n)]
    labels = [("a", "b", None)[k % 3] for k in range(n)]
    columns = {"pair_id": pa.array(ids), "split": pa.array(splits), "label": pa.array(labels)}
    columns |= {"votes_a": pa.array([*range(n)]), "votes_b": pa.array([-k for k in range(n)])}

    def moved_at(rate: float, seed: int = 0) -> set[int]:
        shards = Shards("text", {}, 10, (0,), flipped=rate, seed=seed)
        now = {name: column.to_pylist() for name, column in turned(columns, shards).items()}
        after = now["label"]
        moved = {k for k in range(n) if after[k] != labels[k]}
        assert all({after[k], labels[k]} == {"a", "b"} for k in moved)
        votes = [-k if k in moved else k for k in range(n)]
        assert (now["votes_a"], now["votes_b"]) == (votes, [-k for k in votes])
        return moved

    tenth = moved_at(0.1)
    trained = [labels[k] for k in range(n) if splits[k] in ("labelled", "unlabelled")]
    labelled = len(trained) - trained.count(None)
    assert len(tenth) / labelled == pytest.approx(0.1, abs=0.02)
    assert {splits[k] for k in tenth} == {"labelled", "unlabelled"}
    assert tenth < moved_at(0.3), "more poison is the same poison and more"
    assert tenth != moved_at(0.1, seed=1)
