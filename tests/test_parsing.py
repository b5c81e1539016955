"""One raw row becomes one pair, or is set aside with its reason."""

from __future__ import annotations

import datetime
from collections import Counter
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwpo_dist.pairs.layout import FIELDS, Layout
from cwpo_dist.pairs.parsing import parse
from cwpo_dist.pairs.rejects import (
    REMEDIES,
    BadRow,
    Reason,
    RejectsError,
    Tally,
    refuse_past,
    remedy,
)

CHOSEN = ("prompt", "chosen", "rejected", "votes_a", "votes_b")
EITHER = ("prompt", "response_a", "response_b", "label", "votes_a", "votes_b")


def layout(fields: tuple[str, ...] = CHOSEN, **given: Any) -> Layout:
    defaults: dict[str, Any] = {"format": "text", "kind": "text"}
    return Layout({name: name for name in fields}, **(defaults | given))


def messages(*turns: str) -> list[dict[str, str]]:
    """`u:` user, `a:` assistant, `s:` system."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def row(**changes: Any) -> dict[str, Any]:
    return {"prompt": "p", "chosen": "c", "rejected": "r"} | changes


TEXT = layout()
CHAT = layout(format="conversational", kind="conversational")
CHAT_ALONE = layout(("chosen", "rejected"), format="conversational", kind="conversational")
HH = layout(("chosen", "rejected"), format="hh", kind="conversational")
HH_PROMPT = layout(format="hh", kind="conversational")
HH_TEXT = layout(("chosen", "rejected"))


def test_explicit_text_is_kept_to_the_letter() -> None:
    pair = parse(row(prompt=" p\n", chosen=" c", rejected="c"), TEXT)
    assert (pair.prompt, pair.first, pair.second) == (" p\n", " c", "c")
    assert pair.label == "first"
    assert (pair.votes_first, pair.votes_second) == (None, None)


@pytest.mark.parametrize(("label", "means"), [("a", "first"), ("b", "second"), (None, None)])
def test_either_order_with_its_label(label: str | None, means: str | None) -> None:
    raw = {"prompt": "p", "response_a": "x", "response_b": "y", "label": label}
    assert parse(raw, layout(EITHER)).label == means


@pytest.mark.parametrize("label", ["", float("nan")])
def test_what_tables_write_for_null_is_no_label(label: Any) -> None:
    raw = {"prompt": "p", "response_a": "x", "response_b": "y", "label": label}
    assert parse(raw, layout(EITHER)).label is None
    del raw["label"]
    assert parse(raw, layout(EITHER[:3])).label is None


@pytest.mark.parametrize(
    ("votes", "means"),
    [((3, 2), (3, 2)), (("3", "0"), (3, 0)), ((3.0, 2.0), (3, 2)), ((None, None), (None, None))],
)
def test_votes_of_any_spelling(votes: Any, means: Any) -> None:
    pair = parse(row(votes_a=votes[0], votes_b=votes[1]), TEXT)
    assert (pair.votes_first, pair.votes_second) == means


def test_transcripts_become_messages() -> None:
    start = "\n\nHuman: a\nb\n\nAssistant: c\n\nHuman:  d"
    raw = {"chosen": f"{start}\n\nAssistant: yes ", "rejected": f"{start} \n\nAssistant: no"}
    pair = parse(raw, HH)
    assert pair.prompt == messages("u:a\nb", "a:c", "u:d")
    assert (pair.first, pair.second) == (messages("a:yes"), messages("a:no"))


@pytest.mark.parametrize("mark", ["\n\nAssistant:", "\n\nAssistant: ", ""])
def test_transcripts_with_a_prompt_column(mark: str) -> None:
    prompt = f"\n\nHuman: hi{mark}"
    expected = (messages("u:hi"), messages("a:yes"), messages("a:no"))
    for chosen in (" yes", "\n\nHuman: hi\n\nAssistant: yes"):
        pair = parse(row(prompt=prompt, chosen=chosen, rejected="no"), HH_PROMPT)
        assert (pair.prompt, pair.first, pair.second) == expected


def test_transcripts_can_stay_text() -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    pair = parse({"chosen": start + " yes", "rejected": start + " no"}, HH_TEXT)
    assert (pair.prompt, pair.first, pair.second) == (start, " yes", " no")


def test_whole_conversations_share_all_but_their_last_message() -> None:
    start = messages("s:be kind", "u:hi", "a:hello", "u:more")
    raw = {"chosen": start + messages("a:yes"), "rejected": start + messages("a:no")}
    pair = parse(raw, CHAT_ALONE)
    assert (pair.prompt, pair.first, pair.second) == (start, messages("a:yes"), messages("a:no"))


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        (messages("u:hi"), messages("a:yes"), messages("a:no")),
        (messages("u:hi"), messages("u:hi", "a:yes"), messages("u:hi", "a:no")),
        ("hi", messages("a:yes"), messages("a:no")),
        ("hi", messages("u:hi", "a:yes"), messages("u:hi", "a:no")),
        ("hi", "yes", "no"),
        (messages("u:hi"), "yes", "no"),
    ],
)
def test_ways_to_spell_one_conversation(prompt: Any, chosen: Any, rejected: Any) -> None:
    pair = parse(row(prompt=prompt, chosen=chosen, rejected=rejected), CHAT)
    expected = (messages("u:hi"), messages("a:yes"), messages("a:no"))
    assert (pair.prompt, pair.first, pair.second) == expected


def test_a_text_prompt_beside_whole_conversations_is_one_of_their_messages() -> None:
    whole = [messages("s:be kind", "u:hi", f"a:{answer}") for answer in ("yes", "no")]
    pair = parse(row(prompt="hi", chosen=whole[0], rejected=whole[1]), CHAT)
    assert pair.prompt == messages("s:be kind", "u:hi")


def test_an_answer_may_continue_over_several_turns_that_both_share() -> None:
    more = messages("a:first", "u:and?")
    raw = row(prompt="hi", chosen=more + messages("a:yes"), rejected=more + messages("a:no"))
    pair = parse(raw, CHAT)
    assert pair.prompt == messages("u:hi", "a:first", "u:and?")
    assert pair.second == messages("a:no")


def test_messages_lose_what_is_neither_role_nor_content() -> None:
    extra = [{"role": "user", "content": "hi", "name": None, "weight": 1}]
    pair = parse(row(prompt=extra, chosen="yes", rejected="no"), CHAT)
    assert pair.prompt == messages("u:hi")


def test_text_rows_of_a_conversational_run_become_single_messages() -> None:
    pair = parse(row(prompt=" p", chosen=" c"), layout(kind="conversational"))
    assert (pair.prompt, pair.first, pair.second) == (
        messages("u: p"),
        messages("a: c"),
        messages("a:r"),
    )


@pytest.mark.parametrize(
    "alike",
    [
        (3, 3.0, "3", "3.0", "3.00", Decimal(3), Decimal("3.0"), Decimal("3e0")),
        (-3, -3.0, "-3", "-3.0"),
        (0, 0.0, -0.0, "0"),
        (2.5, "2.5", Decimal("2.5")),
        (10**17, 1e17, str(10**17)),
        ("03",),
        ("3.0.1",),
        ("3 .0",),
        ("٣.0",),
        ("climate",),
        (float("inf"), "inf"),
    ],
)
def test_one_number_is_one_group_however_a_file_spells_it(alike: tuple[Any, ...]) -> None:
    names = {parse(row(topic=value), layout(group="topic")).group for value in alike}
    assert names == {str(alike[0])}


def test_group_and_kept_columns_ride_along() -> None:
    kept = {"when": datetime.date(2024, 1, 2), "price": Decimal("1.50"), "tags": ["x", {"y": 1}]}
    pair = parse(row(topic=7, **kept), layout(group="topic", kept=(*kept, "absent")))
    assert pair.group == "7"
    assert pair.kept == {
        "when": "2024-01-02",
        "price": "1.50",
        "tags": ["x", {"y": 1}],
        "absent": None,
    }


TURN = "\n\nHuman: q\n\nAssistant: "
SURROGATE = "\ud800"
REJECTS: list[tuple[Layout, Any, str]] = [
    (TEXT, [1], "not a mapping"),
    (TEXT, None, "not a mapping"),
    (TEXT, {"prompt": "p", "chosen": "c"}, "missing field: rejected"),
    (TEXT, row(prompt=None), "missing field: prompt"),
    (TEXT, row(chosen=3), "wrong type: chosen"),
    (TEXT, row(chosen=messages("a:x")), "wrong type: chosen"),
    (TEXT, row(prompt=" \n"), "empty prompt"),
    (TEXT, row(rejected="  "), "empty answer: rejected"),
    (TEXT, row(chosen="r"), "identical answers"),
    (TEXT, row(chosen=SURROGATE), "invalid Unicode: chosen"),
    (TEXT, row(votes_a=1), "bad votes: votes_b"),
    (TEXT, row(votes_a=-1, votes_b=1), "bad votes: votes_a"),
    (TEXT, row(votes_a=1, votes_b=1.5), "bad votes: votes_b"),
    (TEXT, row(votes_a=1, votes_b=True), "bad votes: votes_b"),
    (TEXT, row(votes_a=1, votes_b="many"), "bad votes: votes_b"),
    (TEXT, row(votes_a=1, votes_b=float("inf")), "bad votes: votes_b"),
    (TEXT, row(votes_a=1, votes_b=10**300), "bad votes: votes_b"),
    (
        layout(EITHER),
        {"prompt": "p", "response_a": "x", "response_b": "y", "label": "better"},
        "bad label value",
    ),
    (
        layout(EITHER),
        {"prompt": "p", "response_a": "x", "response_b": "y", "label": 1},
        "bad label value",
    ),
    (
        HH,
        {"chosen": TURN + "x", "rejected": "\n\nHuman: other\n\nAssistant: y"},
        "differing prefixes",
    ),
    (HH, {"chosen": TURN, "rejected": TURN + "y"}, "empty answer: chosen"),
    (HH, {"chosen": TURN + "x ", "rejected": TURN + " x"}, "identical answers"),
    (HH, {"chosen": TURN + "x\n\nHuman: y", "rejected": TURN + "y"}, "no assistant turn"),
    (HH, {"chosen": "hello", "rejected": TURN + "y"}, "not a transcript"),
    (HH, {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "empty prompt"),
    (HH_TEXT, {"chosen": "x", "rejected": "y"}, "no assistant turn"),
    (HH_TEXT, {"chosen": TURN + "x", "rejected": "\n" + TURN + "y"}, "differing prefixes"),
    (CHAT_ALONE, {"chosen": messages("u:x"), "rejected": messages("u:x")}, "no assistant turn"),
    (CHAT_ALONE, {"chosen": [], "rejected": messages("a:x")}, "empty answer: chosen"),
    (CHAT_ALONE, {"chosen": messages("a:x"), "rejected": messages("a:y")}, "empty prompt"),
    (
        CHAT_ALONE,
        {"chosen": messages("u:p", "a:x"), "rejected": messages("u:q", "a:y")},
        "differing prefixes",
    ),
    (CHAT, row(prompt=[]), "empty prompt"),
    (CHAT, row(prompt=[{"role": "user"}]), "no message: prompt"),
    (CHAT, row(prompt=[{"role": "narrator", "content": "x"}]), "unknown role: prompt"),
    (CHAT, row(prompt=[{"role": ["user"], "content": "x"}]), "unknown role: prompt"),
    (CHAT, row(prompt=[{"role": "user", "content": [{"type": "text"}]}]), "not text: prompt"),
    (CHAT, row(prompt=[{"role": "user", "content": None}]), "no content: prompt"),
    (
        CHAT,
        row(rejected=[{"role": "assistant", "content": SURROGATE}]),
        "invalid Unicode: rejected",
    ),
    (
        CHAT,
        row(prompt="other", chosen=messages("u:p", "a:x"), rejected=messages("u:p", "a:y")),
        "differing prefixes",
    ),
    (layout(group="topic"), row(), "missing field: topic"),
    (layout(group="topic"), row(topic=float("nan")), "missing field: topic"),
    (layout(group="topic"), row(topic=Decimal("NaN")), "missing field: topic"),
    (layout(group="topic"), row(topic=""), "missing field: topic"),
    (layout(group="topic"), row(topic=True), "wrong type: topic"),
    (layout(group="topic"), row(topic=[1]), "wrong type: topic"),
    (layout(group="topic"), row(topic=SURROGATE), "invalid Unicode: topic"),
    (layout(kept=("x",)), row(x=SURROGATE), "invalid Unicode: x"),
    (layout(kept=("x",)), row(x=b"bytes"), "cannot be kept: x"),
]


@pytest.mark.parametrize(("how", "raw", "reason"), REJECTS)
def test_a_bad_row_is_set_aside_with_its_reason(how: Layout, raw: Any, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        parse(raw, how)
    assert caught.value.reason == reason


def test_nesting_deeper_than_the_stack_is_a_wrong_type() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(BadRow, match="cannot be kept: x"):
        parse(row(x=deep), layout(kept=("x",)))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "x"]), "content": st.text(max_size=3)}
)
CELL = ANYTHING | st.lists(MESSAGE, max_size=3) | st.sampled_from(["a", "b", TURN + "x", TURN])


@given(
    raw=st.dictionaries(st.sampled_from([*FIELDS, "topic"]), CELL) | ANYTHING,
    how=st.sampled_from([TEXT, CHAT, CHAT_ALONE, HH, HH_PROMPT, HH_TEXT, layout(EITHER)]),
    group=st.sampled_from([None, "topic"]),
)
def test_any_row_is_a_pair_or_a_reason_with_a_remedy(raw: Any, how: Layout, group: Any) -> None:
    how = Layout(how.columns, how.format, how.kind, group, ("topic",))
    try:
        pair = parse(raw, how)
    except BadRow as bad:
        remedy(bad.reason)  # KeyError where there is none
        return
    texts = (pair.prompt, pair.first, pair.second)
    assert all(isinstance(text, str if how.kind == "text" else list) for text in texts)
    assert pair.first != pair.second
    if how.kind == "conversational":
        assert [message["role"] for message in (*pair.first, *pair.second)] == ["assistant"] * 2


def test_every_reason_has_a_remedy() -> None:
    assert set(REMEDIES) == set(Reason)


def test_too_many_rejects_name_reasons_fields_and_remedies() -> None:
    reasons = {"missing field: chosen": 7, "malformed line": 2, "identical answers": 1}
    rejects = Tally(Counter(reasons))
    refuse_past(0.1, rejects, rows_in=100, pairs=90, folder="out")
    with pytest.raises(RejectsError) as caught:
        refuse_past(0.09, rejects, rows_in=100, pairs=90, folder="out")
    text = str(caught.value)
    assert "10 of 100 rows (10.0%)" in text
    assert "max_reject_fraction=0.09" in text
    assert "7 × missing field: chosen: name the column under prepare.sources.N.columns" in text
    assert text.index("missing field") < text.index("malformed line") < text.index("identical")
    assert "out/rejects" in text
    with pytest.raises(RejectsError, match="no pair is left"):
        refuse_past(1.0, rejects, rows_in=10, pairs=0, folder="out")
