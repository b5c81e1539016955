"""A row's own numbers: what is read, what is void and why, what copies of one pair agree on."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from prepared import add_up, config, pairs, row, write

from cwpo_dist.config import ConfigError
from cwpo_dist.pairs.estimate import census
from cwpo_dist.pairs.numbers import Numbers, agreed, kinds, number_fields, own_numbers
from cwpo_dist.pairs.sources import plan
from cwpo_dist.pairs.stored import Pair
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store

CHOSEN, RESPONSES = ("chosen", "rejected"), ("response_a", "response_b")


def read(answers: tuple[str, str] = CHOSEN, **given: Any) -> Numbers:
    return own_numbers(given.get, answers)


def test_numbers_are_read_as_they_are_written() -> None:
    assert read(weight=0.1, confidence=1) == Numbers(0.1, 1.0)
    assert read(weight="0.1", score_chosen="-2", score_rejected="1e3") == Numbers(
        0.1, None, -2.0, 1000.0
    )
    assert read(weight=Decimal("2.5"), confidence=None) == Numbers(2.5)
    assert read(weight="", score_chosen=None, score_rejected="") == Numbers()
    assert read(RESPONSES, score_a=1, score_b=2) == Numbers(None, None, 1.0, 2.0)


def test_a_score_is_that_of_its_answer_and_of_no_other_spelling() -> None:
    """`score_a` beside chosen and rejected could be either's: it is none's."""
    assert number_fields(CHOSEN) == ("weight", "confidence", "score_chosen", "score_rejected")
    assert number_fields(RESPONSES) == ("weight", "confidence", "score_a", "score_b")
    assert read(CHOSEN, score_a=1.0, score_b=2.0) == Numbers()
    assert read(RESPONSES, score_chosen=1.0, score_rejected=2.0) == Numbers()


@pytest.mark.parametrize(
    ("given", "void"),
    [
        ({"weight": -0.5}, "weight: below 0"),
        ({"weight": float("nan")}, "weight: not finite"),
        ({"weight": "inf"}, "weight: not finite"),
        ({"weight": "much"}, "weight: no number"),
        ({"weight": True}, "weight: no number"),
        ({"weight": [1.0]}, "weight: no number"),
        ({"weight": 10**400}, "weight: no number"),
        ({"weight": 1e39}, "weight: too large"),
        ({"score_chosen": 0.0, "score_rejected": -1e300}, "score_rejected: too large"),
        ({"confidence": 1.5}, "confidence: above 1"),
        ({"confidence": -0.1}, "confidence: below 0"),
        ({"score_chosen": 1.0}, "score_rejected: missing"),
        ({"score_rejected": 1.0}, "score_chosen: missing"),
        ({"score_chosen": 1.0, "score_rejected": float("-inf")}, "score_rejected: not finite"),
    ],
)
def test_what_cannot_be_used_is_void_and_says_why(given: dict[str, Any], void: str) -> None:
    assert read(**given) == Numbers(void=(void,))


def test_weights_above_one_and_negative_scores_are_good() -> None:
    assert read(weight=7.5, score_chosen=-3.0, score_rejected=-4.0).void == ()


def test_kinds_by_columns() -> None:
    assert list(kinds(["prompt", "weight", "score_a"])) == ["weight"]
    assert list(kinds(["score_a", "score_b", "confidence"])) == ["confidence", "scores"]
    assert list(kinds(["score_chosen", "score_rejected"])) == ["scores"]
    assert list(kinds(["score_a", "score_rejected"])) == []


def test_copies_agree_or_count_as_without() -> None:
    none = Pair("x", "", "", "").told
    one, same = none._replace(weight=0.5), none._replace(weight=0.5, score_a=1.0, score_b=0.0)
    assert agreed([none, none]) == (none, False)
    assert agreed([one, none, same]) == (same, False)
    other = same._replace(weight=0.25)
    assert agreed([same, other]) == (same._replace(weight=None), True)


@pytest.mark.usefixtures("in_process")
def test_prepare_keeps_each_score_with_its_answer_and_counts_the_void(tmp_path: Path) -> None:
    rows = [row(i, f"yes {i}", f"no {i}", score_chosen=i, score_rejected=-i) for i in range(40)]
    rows[3] |= {"score_chosen": None}
    rows[4] |= {"score_chosen": "high"}
    rows += [dict(rows[5]), rows[6] | {"score_chosen": 99}]  # a copy, and one that disagrees
    given = config(write(tmp_path / "x.jsonl", rows))
    store = Store(str(tmp_path / "out"))
    counts = prepare(store, given, seed=0)
    add_up(counts, store)
    found = {pair["prompt"]: pair for pair in pairs(store)}
    assert {pair["label"] for pair in found.values()} == {"a", "b"}, "both places, to tell"
    for i in set(range(40)) - {3, 4, 6}:
        pair = found[f"prompt {i}"]
        a, b = (float(i), float(-i))[:: 1 if pair["response_a"] == f"yes {i}" else -1]
        assert (pair["score_a"], pair["score_b"]) == (a, b)
    for i in (3, 4, 6):
        assert (found[f"prompt {i}"]["score_a"], found[f"prompt {i}"]["score_b"]) == (None, None)
    assert counts["numbers"] == {"scores": 37}
    assert counts["conflicting_numbers"] == 1
    assert counts["void_numbers"] == {
        "score_chosen: missing": 1,
        "score_chosen: no number": 1,
    }
    counted = census(given, seed=0)
    assert sum(counted.own["scores"].values()) == 37
    assert counted.void == counts["void_numbers"]
    assert counted.unlike == counts["conflicting_numbers"]


def test_data_without_such_columns_count_none(tmp_path: Path) -> None:
    assert census(config(write(tmp_path / "x.jsonl", [row(1)])), seed=0).own == {}


def test_columns_are_mapped_and_a_stray_score_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [row(1, w=0.5, good=2.0, bad=1.0)])

    def columns(**given: str) -> dict[str, str]:
        return dict(plan(config({"path": path, "columns": given})).pieces[0].layout.columns)

    found = columns(weight="w", score_chosen="good", score_rejected="bad")
    assert (found["weight"], found["score_chosen"], found["score_rejected"]) == ("w", "good", "bad")
    with pytest.raises(ConfigError, match=r"columns\.score_a: .*score_chosen and score_rejected"):
        columns(score_a="good")
    text = write(tmp_path / "y.jsonl", [row(1, weight=0.5)])
    with pytest.raises(ConfigError, match="'weight' is read as the pair's own number"):
        plan(config(text, keep_columns=["weight"]))


def test_numbers_of_any_kind_take_no_row_out(tmp_path: Path) -> None:
    """Whoever does not weigh by a column may have anything in it."""
    odd: list[Any] = ["heavy", -1, [1], {"a": 1}, None, True, 1e38, "1e999", ""]
    rows = [row(i, weight=value, confidence=value) for i, value in enumerate(odd)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    found = census(config(str(tmp_path / "x.jsonl")), seed=0)
    assert (found.rejects, found.pairs("labelled", "unlabelled", "test")) == (0, len(odd))
    assert sum(found.own["weight"].values()) == 1
