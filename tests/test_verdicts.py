"""Labels and votes as people write them: the text that won is the text that people chose."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from prepared import config, votes, winners, write

from cwpo_dist.config import ConfigError
from cwpo_dist.pairs.sources import plan
from cwpo_dist.pairs.verdicts import majority, spelled
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store

# Whatever the spelling, the first row's first answer won, the second row's second, the third tied,
# and of the fourth nobody said anything.
OUTCOME = ["left 0", "right 1", "tie", None]


def rows(
    column: str, values: list[Any], names: tuple[str, str] = ("response_a", "response_b")
) -> Any:
    return [
        {"prompt": f"{i}", names[0]: f"left {i}", names[1]: f"right {i}", column: value}
        for i, value in enumerate(values)
    ]


def prepared(tmp_path: Path, given: list[Any], **source: Any) -> tuple[dict[str, Any], Store]:
    store = Store(str(tmp_path / "out"))
    path = write(tmp_path / "x.jsonl", given)
    counts = prepare(store, config({"path": path, **source}, test_fraction=0.0), seed=3)
    return counts, store


def outcome(tmp_path: Path, given: list[Any], **source: Any) -> list[Any]:
    found = winners(prepared(tmp_path, given, **source)[1])
    return [found[str(i)] for i in range(len(given))]


SUFFIXES = [("response_a", "response_b"), ("answer_1", "answer_2"), ("output_0", "output_1")]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["a", "b", "tie", None], SUFFIXES[0]),
        (["A", "B ", "Tie", ""], SUFFIXES[0]),
        (["model_a", "model_b", "tie (bothbad)", None], SUFFIXES[0]),
        (["response_a", "response_b", "both_bad", float("nan")], SUFFIXES[0]),
        (["[[A]]", "[[B]]", "[[C]]", None], SUFFIXES[0]),
        ([1, 2, "tie", None], SUFFIXES[0]),
        (["1", "2.0", "draw", None], SUFFIXES[1]),
        ([0, 1, "equal", None], SUFFIXES[2]),
        (["output_0", "output_1", "neither", None], SUFFIXES[2]),
        (["first try", "second try", "same", None], ("first try", "second try")),
    ],
)
@pytest.mark.usefixtures("in_process")
def test_labels_that_can_mean_one_thing_only(tmp_path: Path, values: Any, names: Any) -> None:
    own = {"response_a": names[0], "response_b": names[1]}
    assert outcome(tmp_path, rows("label", values, names), columns=own) == OUTCOME


@pytest.mark.parametrize("name", ["winner", "preference", "verdict", "better_response_id"])
@pytest.mark.usefixtures("in_process")
def test_label_columns_under_other_names(tmp_path: Path, name: str) -> None:
    assert outcome(tmp_path, rows(name, ["a", "b", "tie", None])) == OUTCOME


@pytest.mark.parametrize(
    ("values", "meanings"),
    [
        ([0, 1, 2, None], {"a": 0, "b": 1, "tie": 2}),
        ([1, 2, 0, None], {"a": 1, "b": 2, "tie": 0}),
        (["1", "2", "0", ""], {"a": 1, "b": 2, "tie": 0}),
        ([True, False, None, None], {"a": True, "b": False}),
        (["left", "right", "x", "skip"], {"a": "left", "b": "RIGHT", "tie": "x", "none": "skip"}),
        ([-3, 2, 0, -100], {"a": [-3, -2, -1], "b": [1, 2, 3], "tie": 0, "none": -100}),
        (["b", "a", "c", None], {"a": "b", "b": "a", "tie": "c"}),
    ],
)
@pytest.mark.usefixtures("in_process")
def test_labels_by_a_map(tmp_path: Path, values: Any, meanings: Any) -> None:
    label = {"from": "verdict", **meanings}
    expected = [*OUTCOME[:2], "tie" if "tie" in meanings else None, None]
    assert outcome(tmp_path, rows("verdict", values), columns={"label": label}) == expected


@pytest.mark.parametrize(
    ("values", "names", "said"),
    [
        (
            [0, 1, 1],
            SUFFIXES[0],
            r"'label' holds 1 in 2 rows, 0 in 1 rows; the meaning of 1 and 0 .* \{from: label",
        ),
        ([True, False], SUFFIXES[0], "true in 1 rows, false in 1 rows"),
        ([1, 2, 0], SUFFIXES[1], "the meaning of 1, 2 and 0 is not known"),
        ([1, 2, 3], SUFFIXES[0], "the meaning of 1, 2 and 3 is not known"),
        ([1, 1], SUFFIXES[0], "the meaning of 1 is not known"),
        ([1, 2], SUFFIXES[2], "the meaning of 1 and 2 is not known"),
        ([0.7, 0.2], SUFFIXES[0], "0.7 in 1 rows"),
        (["a", "b", "unsure"], SUFFIXES[0], "the meaning of unsure is not known"),
        ([1] * 200 + [2] * 200 + [0], SUFFIXES[1], "the meaning of 1, 2 and 0 is not known"),
    ],
)
def test_labels_that_could_mean_this_or_that_are_refused_with_their_values(
    tmp_path: Path, values: Any, names: Any, said: str
) -> None:
    path = write(tmp_path / "x.jsonl", rows("label", values, names))
    with pytest.raises(ConfigError, match=rf"columns\.label: .*{said}"):
        plan(config(path))
    source = {"path": path, "columns": {"label": None}}
    assert "label" not in plan(config(source)).pieces[0].layout.columns


def test_a_map_gives_each_value_one_meaning(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", rows("label", [1, 2]))
    label = {"from": "label", "a": 1, "b": "1.0"}
    with pytest.raises(ConfigError, match=r"columns\.label: '1\.0' stands for more than one"):
        plan(config({"path": path, "columns": {"label": label}}))


@pytest.mark.usefixtures("in_process")
def test_several_annotators_vote(tmp_path: Path) -> None:
    said = [
        (1, 1, 2),
        (2, 2, 0),
        (0, 0, 1),
        (None, None, None),
        (1, 2, 0),
        (1, 2, None),
        (1, None, None),
    ]
    given = [
        {"prompt": f"{i}", "response1": f"left {i}", "response2": f"right {i}", **_named(each)}
        for i, each in enumerate(said)
    ]
    label = {"from": ["ann 1", "ann 2", "ann 3"], "a": 1, "b": 2, "tie": 0}
    counts, store = prepared(tmp_path, given, columns={"label": label})
    found, counted = winners(store), votes(store)
    assert [found[str(i)] for i in range(7)] == [*OUTCOME, "tie", "tie", "left 6"]
    assert counted["0"] == {"left 0": 2, "right 0": 1, "tie": 0}
    assert counted["1"] == {"left 1": 0, "right 1": 2, "tie": 1}
    assert counted["3"] == {"left 3": None, "right 3": None, "tie": None}
    assert counts["ties"] == 3
    assert sum(counts["labelled"].values()) == 3


def _named(values: Any) -> dict[str, Any]:
    return {f"ann {k}": value for k, value in enumerate(values, 1)}


@pytest.mark.usefixtures("in_process")
def test_votes_without_a_label_make_it(tmp_path: Path) -> None:
    given = [
        {"prompt": f"{i}", "response_a": f"left {i}", "response_b": f"right {i}", **each}
        for i, each in enumerate(
            [
                {"votes_a": 3, "votes_b": 1},
                {"votes_a": 0, "votes_b": 2, "votes_tie": 1},
                {"votes_a": 2, "votes_b": 2},
                {"votes_a": 0, "votes_b": 0},  # nobody voted: no tie
                {"votes_a": 1, "votes_b": 0, "votes_tie": 4},
                {},
            ]
        )
    ]
    counts, store = prepared(tmp_path, given)
    found = winners(store)
    assert [found[str(i)] for i in range(6)] == [*OUTCOME, "tie", None]
    assert votes(store)["4"] == {"left 4": 1, "right 4": 0, "tie": 4}
    assert counts["ties"] == 2


@pytest.mark.usefixtures("in_process")
def test_one_column_a_verdict_as_arenas_write_it(tmp_path: Path) -> None:
    names = {"votes_a": "winner_model_a", "votes_b": "winner_model_b", "votes_tie": "winner_tie"}
    given = [
        row | dict(zip(names.values(), one_hot, strict=True))
        for row, one_hot in zip(
            rows("n", [0] * 4), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)], strict=True
        )
    ]
    assert outcome(tmp_path, given, columns=names) == OUTCOME


# -- votes stay with their answers


def both_spellings(i: int, chosen: str, **more: Any) -> dict[str, Any]:
    answers = {"a": f"left {i}", "b": f"right {i}"}
    rejected = "b" if chosen == "a" else "a"
    return {
        "prompt": f"{i}",
        "response_a": answers["a"],
        "response_b": answers["b"],
        "chosen": answers[chosen],
        "rejected": answers[rejected],
        **more,
    }


BALLOTS = [("a", 5, 1), ("b", 1, 5), ("b", 2, 4), ("a", 3, 0)]


@pytest.mark.parametrize("with_label", [True, False])
@pytest.mark.usefixtures("in_process")
def test_votes_for_a_and_b_stay_there_beside_chosen_and_rejected(
    tmp_path: Path, with_label: bool
) -> None:
    given = [
        both_spellings(i, chosen, votes_a=a, votes_b=b, **({"label": chosen} if with_label else {}))
        for i, (chosen, a, b) in enumerate(BALLOTS)
    ]
    counts, store = prepared(tmp_path, given)
    assert counts["votes_against_label"] == 0
    for i, (chosen, a, b) in enumerate(BALLOTS):
        assert winners(store)[str(i)] == f"{'left' if chosen == 'a' else 'right'} {i}"
        assert votes(store)[str(i)] == {f"left {i}": a, f"right {i}": b, "tie": None}


@pytest.mark.parametrize("named", [{}, {"votes_a": "votes_chosen", "votes_b": "votes_rejected"}])
@pytest.mark.usefixtures("in_process")
def test_votes_for_chosen_and_rejected_go_with_them(tmp_path: Path, named: Any) -> None:
    given = [
        both_spellings(i, chosen, votes_chosen=max(a, b), votes_rejected=min(a, b))
        for i, (chosen, a, b) in enumerate(BALLOTS)
    ]
    _, store = prepared(tmp_path, given, columns=named)
    for i, (_, a, b) in enumerate(BALLOTS):
        assert votes(store)[str(i)] == {f"left {i}": a, f"right {i}": b, "tie": None}


@pytest.mark.usefixtures("in_process")
def test_votes_for_chosen_and_rejected_follow_the_label(tmp_path: Path) -> None:
    given = [
        row | {"votes_chosen": 4, "votes_rejected": 1}
        for row in rows("label", ["a", "b", "tie", None])
    ]
    with pytest.raises(ConfigError, match="whose votes"):
        prepared(tmp_path, given[2:])
    _, store = prepared(tmp_path / ".", given[:2])
    assert votes(store)["0"] == {"left 0": 4, "right 0": 1, "tie": None}
    assert votes(store)["1"] == {"left 1": 1, "right 1": 4, "tie": None}


@pytest.mark.usefixtures("in_process")
def test_votes_of_other_texts_set_their_row_aside(tmp_path: Path) -> None:
    given = [both_spellings(i, "a", votes_a=1, votes_b=0) for i in range(3)]
    given[1]["response_a"] = "something else"
    given[2]["label"] = "b"
    path = write(tmp_path / "x.jsonl", given)
    store = Store(str(tmp_path / "out"))
    counts = prepare(store, config(path, max_reject_fraction=1.0), seed=0)
    assert counts["rejects"] == {"whose votes": 1, "bad label value": 1}
    assert list(winners(store)) == ["0"]


@pytest.mark.usefixtures("in_process")
def test_conversations_tell_whose_votes_they_are_too(tmp_path: Path) -> None:
    def talk(text: str) -> Any:
        return [{"role": "user", "content": "0"}, {"role": "assistant", "content": text}]

    row = both_spellings(0, "b", votes_a=1, votes_b=6)
    whole = row | {"chosen": talk(row["chosen"]), "rejected": talk(row["rejected"])}
    _, store = prepared(tmp_path, [whole])
    assert winners(store) == {"0": "right 0"}
    assert votes(store) == {"0": {"left 0": 1, "right 0": 6, "tie": None}}


@pytest.mark.usefixtures("in_process")
def test_votes_against_the_label_are_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = [row | {"votes_a": 1, "votes_b": 2} for row in rows("label", ["a", "b", "tie", None])]
    with caplog.at_level("WARNING"):
        counts, store = prepared(tmp_path, given)
    assert counts["votes_against_label"] == 1
    assert "in 1 rows more people voted for the other answer" in caplog.text
    assert winners(store)["0"] == "left 0"  # the label counts


@pytest.mark.usefixtures("in_process")
def test_votes_of_chosen_answers_under_our_older_names(tmp_path: Path) -> None:
    given = [{"prompt": "0", "chosen": "left 0", "rejected": "right 0", "votes_a": 4, "votes_b": 1}]
    assert votes(prepared(tmp_path, given)[1])["0"] == {"left 0": 4, "right 0": 1, "tie": None}


@pytest.mark.usefixtures("in_process")
def test_labels_in_a_table_of_text(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "response_a", "response_b", "label"])
        table.writeheader()
        table.writerows(rows("label", ["1.0", "2.0", "tie", ""]))
    store = Store(str(tmp_path / "out"))
    prepare(store, config(str(path)), seed=0)
    assert [winners(store)[str(i)] for i in range(4)] == OUTCOME


def test_one_spelling_for_a_value() -> None:
    assert spelled(1) == spelled(1.0) == spelled("1") == spelled(" 1.00 ") == "1"
    assert spelled(True) == spelled("TRUE") == "true" != spelled(1)
    assert spelled(0.5) == "0.5"
    assert spelled(float("inf")) == "inf"
    assert spelled(["a"]) is None


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((0, 0, 0), None),
        ((1, 0, 0), "a"),
        ((1, 2, 1), "b"),
        ((2, 2, 0), "tie"),
        ((1, 0, 1), "tie"),
        ((1, 1, 1), "tie"),
        ((1, 0, 2), "tie"),
    ],
)
def test_the_majority_is_one_opinion_or_a_tie(counts: Any, said: Any) -> None:
    assert majority(*counts) == said


def test_names_of_who_answered_are_no_labels_that_a_map_could_explain(tmp_path: Path) -> None:
    """In half of the rows the same name is the second answer's."""
    named = [
        row | {"model_a": names[k % 2], "model_b": names[1 - k % 2]}
        for names in [("alpha", "beta")]
        for k, row in enumerate(rows("winner", ["alpha", "beta", "alpha", "beta"]))
    ]
    path = write(tmp_path / "x.jsonl", named)
    with pytest.raises(ConfigError, match=r"stand in 'model_a' and 'model_b': .* row to row"):
        plan(config(path))


def test_a_plan_says_how_labels_were_read_with_their_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", rows("winner", ["model_a", "model_b", "model_a", None]))
    (piece,) = plan(config(path)).pieces
    assert piece.layout.described().endswith(
        "labels: model_a = a (2), model_b = b (1), no label (1)"
    )
    several = [row | {"other": "b"} for row in rows("winner", ["a", "tie", "b"])]
    source = {
        "path": write(tmp_path / "y.jsonl", several),
        "columns": {"label": {"from": ["winner", "other"]}},
    }
    (piece,) = plan(config(source)).pieces
    assert "votes of 2 columns: b = b (4), a = a (1), tie = tie (1)" in piece.layout.described()
