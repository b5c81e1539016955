"""Takes the demo's committed pairs and its programs, checks what their documentation claims."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import correlation, mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwpo_dist.demo import gold, make_pairs, model

PAIRS = Path(make_pairs.__file__).with_name("pairs.jsonl")
SIDES = ("response_a", "response_b")
Row = dict[str, str]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def _margin(row: Row) -> float:
    a, b = (gold.score(row["prompt"], row[side]) for side in SIDES)
    return a - b


def _extra_words(row: Row) -> int:
    return len(row["response_a"].split()) - len(row["response_b"].split())


def _extra_characters(row: Row) -> int:
    return len(row["response_a"]) - len(row["response_b"])


def test_file_is_small_and_complete(rows: list[Row]) -> None:
    assert PAIRS.stat().st_size < 1_000_000
    assert 700 <= len(rows) <= 900
    fields = {"prompt", "response_a", "response_b", "label"}
    assert all(set(row) == fields and row["label"] in {"a", "b"} for row in rows)


def test_prompts_come_from_the_list(rows: list[Row]) -> None:
    prompts = make_pairs.read_prompts()
    assert len(prompts) == len(set(prompts)) >= 150
    assert {row["prompt"] for row in rows} <= set(prompts)


def test_answers_are_never_empty_identical_or_used_twice(rows: list[Row]) -> None:
    used = Counter((row["prompt"], row[side]) for row in rows for side in SIDES)
    assert max(used.values()) == 1
    assert all(answer == answer.strip() and answer for _, answer in used)


def test_neither_side_is_favoured(rows: list[Row]) -> None:
    assert 0.45 <= mean(row["label"] == "a" for row in rows) <= 0.55


@pytest.mark.parametrize("extra", [_extra_words, _extra_characters])
def test_gold_is_not_length(rows: list[Row], extra: Callable[[Row], int]) -> None:
    assert abs(correlation([_margin(row) for row in rows], [extra(row) for row in rows])) < 0.15
    decided = [row for row in rows if extra(row)]
    longer_wins = mean((extra(row) > 0) == (row["label"] == "a") for row in decided)
    assert 0.45 <= longer_wins <= 0.55


def test_label_noise_is_moderate(rows: list[Row]) -> None:
    decided = [row for row in rows if _margin(row)]
    flipped = mean((_margin(row) > 0) != (row["label"] == "a") for row in decided)
    assert 0.08 <= flipped <= 0.15


def test_gold_score_tells_most_answers_apart(rows: list[Row]) -> None:
    assert mean(_margin(row) == 0 for row in rows) < 0.05


def test_labels_reproduce_from_the_seed(rows: list[Row]) -> None:
    labels = [row["label"] for row in rows]
    pairs = [make_pairs.AnswerPair(row["prompt"], *(row[side] for side in SIDES)) for row in rows]
    assert [make_pairs.draw_label(pair) for pair in pairs] == labels
    assert [make_pairs.draw_label(pair, make_pairs.SEED + 1) for pair in pairs] != labels


@given(st.text(), st.text())
def test_score_is_finite_on_any_text(prompt: str, response: str) -> None:
    assert -1.0 <= gold.score(prompt, response) <= 2.0


@pytest.mark.parametrize("text", ["", " \n", "123 ...", "\x00", "…" * 10_000, "you " * 10_000])
def test_score_takes_hostile_text(text: str) -> None:
    assert math.isfinite(gold.score(text, text))


@given(st.text(), st.text())
def test_probabilities_of_both_sides_add_up_to_one(a: str, b: str) -> None:
    forward, backward = gold.probability("", a, b), gold.probability("", b, a)
    assert 0.0 <= forward <= 1.0
    assert forward + backward == pytest.approx(1.0)


def test_score_is_blind_to_repetition() -> None:
    assert gold.score("", "Keep your basil warm.") == gold.score("", "Keep your basil warm. " * 9)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("You can cut your bread.", "One can cut the bread."),
        ("You’ll like it.", "People like it."),
        ("Cut the bread with a knife.", "Subdivide the bread with appropriate equipment."),
    ],
)
def test_score_likes_warm_and_plain_answers(better: str, worse: str) -> None:
    assert gold.score("", better) > gold.score("", worse)


@pytest.mark.parametrize(
    ("text", "finished", "expected"),
    [
        ("Cut here ", True, "Cut here"),
        ("This is one full sentence, yes. And then hal", False, "This is one full sentence, yes."),
        ("Here are the steps:\n\n1. Take a", False, "Here are the steps:\n\n1. Take"),
        ("Do it. And then we go on until the lim", False, "Do it. And then we go on until the"),
        ("word", False, ""),
    ],
)
def test_trim_ends_answers_cleanly(text: str, finished: bool, expected: str) -> None:
    assert make_pairs.trim(text, finished) == expected


def test_pairs_are_disjoint_and_skip_useless_answers() -> None:
    good = [f"answer number {name} has some words" for name in "vwxyz"]
    pairs = make_pairs.pair_up("p", ["", good[0], good[0], "short", *good[1:]])
    assert [(pair.response_a, pair.response_b) for pair in pairs] == [
        (good[0], good[1]),
        (good[2], good[3]),
    ]


def test_unfit_answers_cost_their_pair() -> None:
    fine, broken = "one answer that reads quite well", "one answer that has a broken \ufffd sign"
    assert make_pairs.pair_up("p", [fine, broken]) == []


def test_a_built_model_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert model.build(tmp_path) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(model, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.build(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "PACKAGE", "no_such_package_here")
    with pytest.raises(FileNotFoundError, match="pip install"):
        model.find_gguf()
