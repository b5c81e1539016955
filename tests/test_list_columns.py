"""Which columns hold lists of responses and their ratings: what is found, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prepared import config, write
from test_row_forms import ASK, FAIR, GOOD, POOR, labelled, row, told

from cwpo_dist.config import ConfigError
from cwpo_dist.pairs.layout import cell
from cwpo_dist.pairs.row_forms import pairs_of_row
from cwpo_dist.pairs.sources import check, plan
from cwpo_dist.pairs.unread import Unread, tree
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store


@pytest.mark.parametrize(
    ("given", "pairing", "columns", "said_so"),
    [
        (row(GOOD, POOR), "given", {}, r"pairing: in .*'responses' holds lists of up to 2.*all \("),
        (row(GOOD, POOR), "best_worst", {}, r"pairing: 'best_worst' needs .* no scores or ranks"),
        (row(GOOD, POOR), "adjacent", {}, r"pairing: 'adjacent' needs"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": POOR}, "all", {}, "no source has responses"),
        (
            row(GOOD, POOR, scores=[1, 2], ranks=[1, 2]),
            "all",
            {},
            r"columns\.scores: .*'scores' and 'ranks', which could each be it",
        ),
        (
            row(GOOD, POOR, scores=[1, 2], ranks=[1, 2]),
            "all",
            {"scores": "scores", "ranks": "ranks"},
            r"columns\.scores: .*'scores' and 'ranks', which could each be it",
        ),
        (
            {
                "prompt": ASK,
                "completions": 2
                * [{"response": GOOD, "overall_score": 1, "fine-grained_score": 2}],
            },
            "all",
            {},
            r"'completions\.\*\.overall_score' and 'completions\.\*\.fine-grained_score', which",
        ),
        (
            {"prompt": ASK, "answers": 2 * [{"said": GOOD, "by": "x"}]},
            "all",
            {},
            r"columns\.responses: .*'answers\.\*\.said' and 'answers\.\*\.by', which could each",
        ),
        (
            {"prompt": ASK, "answers": 2 * [{"said": GOOD}]},
            "all",
            {},
            r"columns\.responses: .*said",
        ),
        (
            row(GOOD, POOR, samples=[GOOD, FAIR]),
            "all",
            {},
            r"columns\.responses: .*'responses' and 'samples', which could each be it",
        ),
        (row(GOOD, POOR), "all", {"responses": "responses.*.text"}, r"no column 'responses\.\*"),
        (row(GOOD, POOR, label="a"), "all", {"label": "label"}, r"columns\.label: it says nothing"),
        (
            row(GOOD, POOR, chosen=GOOD, rejected=POOR),
            "all",
            {"responses": "responses", "chosen": "chosen"},
            r"columns\.chosen: it says nothing beside a list",
        ),
        (
            {"prompt": ASK, "chosen": GOOD, "rejected": POOR, "scores": [1, 2]},
            "given",
            {"scores": "scores"},
            r"columns\.scores: it says nothing without responses",
        ),
        (
            row(GOOD, scores=[2]),
            "all",
            {"responses": "responses"},
            r"'responses' .* lists of one .*\{response: responses\.0, score: scores\.0\}",
        ),
        (row(GOOD, scores=[2]), "given", {}, r"'responses' .* one .*\{response: responses\.0\};"),
        (
            {"prompt": ASK, "responses": [{"text": GOOD, "rank": 1}]},
            "all",
            {},
            r"\{response: responses\.0\.text, rank: responses\.0\.rank\}",
        ),
        (
            {"prompt": ASK, "answers": told(GOOD) + told(POOR)},  # may be one conversation
            "all",
            {},
            r"\{responses: answers\}, or, for lists of one, \{response: answers\.0\}",
        ),
        (
            {"prompt": ASK, "response": GOOD, "helpfulness": 4},
            "given",
            {},
            r"Where other rows answer the same prompt, set prepare\.pairing: all",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    tmp_path: Path, given: Any, pairing: str, columns: Any, said_so: str
) -> None:
    source = {"path": write(tmp_path / "x.jsonl", [given]), "columns": columns}
    with pytest.raises(ConfigError, match=f"(?s){said_so}"):
        check(config(source, pairing=pairing))


def test_named_columns_overrule_what_would_be_found(tmp_path: Path) -> None:
    given = {
        "prompt": ASK,
        "chosen": GOOD,
        "rejected": POOR,
        "said": [{"what": [POOR], "how": {"good": 1}}, {"what": [GOOD], "how": {"good": 2}}],
    }
    names = {"responses": "said.*.what.0", "scores": "said.*.how.good"}
    source = {"path": write(tmp_path / "x.jsonl", [given]), "columns": names}
    (piece,) = plan(config(source, pairing="all")).pieces
    (pair,) = pairs_of_row(given, piece.layout).pairs
    assert (pair.first, pair.second, pair.label) == (GOOD, POOR, "first")
    none = {"responses": None}
    (piece,) = plan(config({**source, "columns": none})).pieces
    assert piece.layout.answers == ("chosen", "rejected")


@pytest.mark.parametrize(
    "rows",
    [
        [row(*told(GOOD), *told(POOR), scores=[2, 1])],  # a message stands for a list of one
        [*(row(GOOD, scores=[2]) for _ in range(3)), row(GOOD, POOR, scores=[2, 1])],
        [*(row() for _ in range(3)), row(GOOD, POOR, scores=[2, 1])],
    ],
)
@pytest.mark.usefixtures("in_process")
def test_lists_under_our_own_name_are_responses(tmp_path: Path, rows: Any) -> None:
    source = write(tmp_path / "x.jsonl", rows)
    store = Store(str(tmp_path / "out"))
    counts = prepare(store, config(source, pairing="all", max_reject_fraction=0.9), seed=0)
    assert list(labelled(store)) == [(GOOD, POOR)]
    assert counts["rejects"] == ({"one response: responses": 3} if len(rows) > 1 else {})


def test_lists_of_one_beside_two_answers_are_none_of_ours(tmp_path: Path) -> None:
    given = row({"by": "x", "at": 3}, chosen=GOOD, rejected=POOR)
    (piece,) = plan(config(write(tmp_path / "x.jsonl", [given]))).pieces
    assert piece.layout.answers == ("chosen", "rejected")


def test_a_path_leads_into_all_items_of_a_list() -> None:
    given = {"a": [{"b": 1}, {"c": 2}, "x", {"b": {"d": 3}}], "j": '[{"b": 1}]', "n": None}
    assert cell(given, "a.*.b") == [1, None, None, {"d": 3}]
    assert cell(given, "j.*.b") == [1]
    assert cell(given, "n.*.b") is None
    assert cell({"a": {"*": 5}}, "a.*") == 5


def test_what_of_a_lists_objects_nothing_reads_counts_once_a_row() -> None:
    unread = Unread()
    for _ in range(3):
        unread.note({"a": [{"b": 1, "c": 2}, {"b": 1, "c": 2, "d": None}]}, tree(["a.*.b"]))
    assert unread.columns == {"a.*.c": 3}


NAMED = {"response": "completion"}


def _one(text: Any, score: Any = None, **more: Any) -> dict[str, Any]:
    rated = {} if score is None else {"score": score}
    return {"prompt": ASK, "completion": text, **rated, **more}


@pytest.mark.parametrize(
    ("rows", "columns", "pairing", "says"),
    [
        ([_one(GOOD)], {}, "given", "Each row has one answer, 'completion'"),
        ([_one(GOOD)], NAMED, "best_worst", "has no score or rank that we know"),
        (
            [{"prompt": ASK, "completion": GOOD, "output": GOOD}],
            {},
            "all",
            "columns.response: .* could each be it",
        ),
        ([_one(GOOD, 1, reward=2)], NAMED, "all", "columns.score: .* could each be it"),
        ([_one(GOOD, 1, rank=2)], NAMED, "all", "columns.score: .*'score' and 'rank'"),
        ([_one(GOOD, label="a")], {**NAMED, "label": "label"}, "all", "label: it says nothing"),
        ([_one(GOOD, 1)], {**NAMED, "scores": "score"}, "all", "scores: it says nothing"),
        ([_one(GOOD, 1)], {**NAMED, "score": "score"}, "given", "score: it says nothing while"),
        ([_one([GOOD, POOR])], NAMED, "all", "name it as a list of responses"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], columns: dict[str, str], pairing: str, says: str
) -> None:
    source = {"path": write(tmp_path / "x.jsonl", rows), "columns": columns}
    with pytest.raises(ConfigError, match=says):
        plan(config(source, pairing=pairing))


def test_scores_and_ranks_of_one_prompt_are_not_compared(tmp_path: Path) -> None:
    listed = [
        {"path": write(tmp_path / f"{name}.jsonl", [{"prompt": ASK, "completion": GOOD, name: 1}])}
        for name in ("score", "rank")
    ]
    with pytest.raises(ConfigError, match="by its score, and others by its rank"):
        plan(config(*listed, pairing="all"))
