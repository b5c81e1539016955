"""Rows of one answer, joined where they share a prompt: each answer is read as it is by itself."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.sharing import SharedRows, in_one_row

# Few different tokens, so that answers often share some of theirs, or all.
tokens = st.lists(st.integers(1, 3), min_size=1, max_size=6)
alone = st.builds(lambda prompt, answer: Row(prompt, (answer,)), tokens, tokens)


def read(row: Row) -> list[tuple[list[int], list[int]]]:
    """Of each answer of a row: all tokens that it sees with itself, and those that count."""
    both = zip(row.answers, row.n_scored, strict=True)
    return [([*row.prompt, *answer], answer[-n:]) for answer, n in both]


def test_answers_that_leave_their_prompt_at_different_tokens_share_what_is_common() -> None:
    """By hand: of 1 2 3 the second answer's tokens leave the prompt behind 1 2."""
    whole, early = Row([1, 2, 3], ([7, 8],)), Row([1, 2], ([9],))
    assert in_one_row([whole, early]) == Row([1, 2], ([3, 7, 8], [9]), (1, 0))
    assert in_one_row([early, whole]) == Row([1, 2], ([9], [3, 7, 8]), (0, 1))
    assert in_one_row([whole, whole]) == Row([1, 2, 3], ([7, 8], [7, 8]))
    cut = Row([1, 5, 6], ([9],))  # its prompt lost its oldest tokens
    assert in_one_row([whole, cut]) == Row([1], ([2, 3, 7, 8], [5, 6, 9]), (2, 2))


@given(st.lists(alone, min_size=1, max_size=5))
def test_a_joined_answer_sees_and_counts_what_it_does_alone(rows: list[Row]) -> None:
    begin_alike = [Row([0, *row.prompt], row.answers) for row in rows]
    joined = in_one_row(begin_alike)
    assert read(joined) == [answer for row in begin_alike for answer in read(row)]
    starts = {tuple(row.prompt) for row in begin_alike}
    assert len(starts) > 1 or joined.skipped == ()


@given(st.lists(st.lists(alone, min_size=1, max_size=4), max_size=3))
@example([[Row([1], ([1, 1],)), Row([1, 1], ([1],))]])  # one text, but not one answer
def test_each_answer_gets_its_own_number(prompts: list[list[Row]]) -> None:
    """Whatever else is asked of its prompt; the same tokens stand in a row once."""
    answers = [(number, row) for number, rows in enumerate(prompts) for row in rows]
    shared = SharedRows.of(answers)
    found = shared.of_each([read(row) for row in shared.rows])
    assert found == [answer for _, row in answers for answer in read(row)]
    distinct = {(number, *map(tuple, (row.prompt, row.answers[0]))) for number, row in answers}
    assert sum(len(row.answers) for row in shared.rows) == len(distinct) == len(set(shared.places))
    assert sum(row.n_tokens for row in shared.rows) <= sum(row.n_tokens for _, row in answers)


def test_one_that_leaves_early_takes_no_prompt_from_the_others() -> None:
    """A cut answer shares a token alone: joined, each of the others would hold its whole prompt."""
    prompt = list(range(1, 50))
    rows = [Row(prompt, ([90 + k],)) for k in range(4)]
    early = Row([1, *range(60, 70)], ([99],))
    shared = SharedRows.of([("p", row) for row in [*rows, early]])
    assert shared.rows == [Row(prompt, tuple([90 + k] for k in range(4))), early]
    assert shared.places == [0, 1, 2, 3, 4]
    apart = SharedRows.of([(k, row) for k, row in enumerate(rows)])
    assert apart.rows == rows, "of other prompts"


def test_answers_that_were_cut_take_no_sharing_from_the_others() -> None:
    """Each of them begins at another place of the prompt, behind its first token."""
    prompt = list(range(10, 110))
    whole = [Row(prompt, ([500 + k, 2],)) for k in range(6)]
    cut = [Row([10, *prompt[40 + k :]], ([600 + k, 2],)) for k in range(2)]
    for order in ([*cut, *whole], [whole[0], cut[0], *whole[1:], cut[1]], [*whole, *cut]):
        shared = SharedRows.of([("p", row) for row in order])
        sizes = sorted((len(row.answers), len(row.prompt)) for row in shared.rows)
        assert sizes == [(1, len(cut[1].prompt)), (1, len(cut[0].prompt)), (6, 100)]
        texts = [[seen for seen, _ in read(row)] for row in shared.rows]
        assert shared.of_each(texts) == [[*row.prompt, *row.answers[0]] for row in order]
