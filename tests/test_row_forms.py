"""Rows with a list of responses: who wins, what is left out, and that all of it is counted."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import Rows, config, pairs, rejects, said, write

from cwpo_dist.config import PrepareConfig
from cwpo_dist.pairs import sources
from cwpo_dist.pairs.estimate import census
from cwpo_dist.pairs.layout import Layout
from cwpo_dist.pairs.rejects import BadRow, RejectsError
from cwpo_dist.pairs.row_forms import growth, pairs_of_row
from cwpo_dist.pairs.sources import plan
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store

ASK = "How long does rice take?"
GOOD, FAIR, POOR, WORST = "Twelve minutes.", "Some minutes.", "Rice is white.", "Buy bread."
FOUR = [FAIR, GOOD, WORST, POOR]  # the best one is not the first
SCORES, RANKS = [6.5, 9, -1.0, 2], [2, 1, 4, 3]
BEST_FIRST = [GOOD, FAIR, POOR, WORST]
ALL = list(combinations(BEST_FIRST, 2))
WHO_WINS = {
    "all": ALL,
    "best_worst": [(GOOD, WORST)],
    "adjacent": list(pairwise(BEST_FIRST)),
}


def layout(**columns: str) -> Layout:
    names = {"prompt": "prompt", "responses": "responses", **columns}
    return Layout(names, "text", "text", pairing="all")


def row(*responses: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": ASK, "responses": list(responses), **more}


def told(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def labelled(store: Store) -> Iterator[tuple[str, str]]:
    """(better, worse) of each pair, as its label has it."""
    for pair in pairs(store):
        assert pair["label"] in ("a", "b")
        a, b = said(pair["response_a"]), said(pair["response_b"])
        yield (a, b) if pair["label"] == "a" else (b, a)


def prepared(tmp_path: Path, given: Rows | str, pairing: str, **source: Any) -> tuple[Store, Any]:
    path = given if isinstance(given, str) else write(tmp_path / "x.jsonl", given)
    store = Store(str(tmp_path / f"out-{pairing}"))
    told_config = config({"path": path, **source}, pairing=pairing, max_reject_fraction=1.0)
    return store, prepare(store, told_config, seed=0)


def add_up(counts: Any, store: Store) -> None:
    """Every row and every response is a pair, a tie, a copy, or a reject."""
    lists, set_aside = counts["lists"], rejects(store)
    of_rows = sum(counts["rejects"].values())
    assert len(set_aside) == of_rows + sum(lists["set_aside"].values())
    made = counts["rows_in"] - lists["rows"] + lists["pairs"]
    assert made == counts["pairs"] + counts["merged_duplicates"] + of_rows
    assert counts["pairs"] == len(pairs(store))


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("pairing", list(WHO_WINS))
@pytest.mark.parametrize("rating", [{"scores": SCORES}, {"ranks": RANKS}])
def test_the_higher_score_and_the_lower_rank_win(
    tmp_path: Path, pairing: str, rating: dict[str, Any]
) -> None:
    store, counts = prepared(tmp_path, [row(*FOUR, **rating)], pairing)
    assert sorted(labelled(store)) == sorted(WHO_WINS[pairing])
    assert counts["lists"]["pairs"] == len(WHO_WINS[pairing])
    add_up(counts, store)
    by_score = dict(zip(FOUR, SCORES, strict=True)) if "scores" in rating else {}
    for pair in pairs(store):
        for x in "ab":
            assert pair[f"score_{x}"] == by_score.get(pair[f"response_{x}"])
    assert counts["numbers"] == ({"scores": counts["pairs"]} if by_score else {})


@pytest.mark.usefixtures("in_process")
def test_lists_without_scores_make_pairs_without_labels(tmp_path: Path) -> None:
    store, counts = prepared(tmp_path, [row(*FOUR)], "all")
    assert {frozenset((p["response_a"], p["response_b"])) for p in pairs(store)} == {
        frozenset(two) for two in ALL
    }
    assert [(pair["label"], pair["tie"], pair["score_a"]) for pair in pairs(store)] == 6 * [
        (None, False, None)
    ]
    assert counts["splits"]["labelled"] == 0
    add_up(counts, store)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("pairing", "made", "ties"),
    [
        ("all", {(GOOD, POOR), (FAIR, POOR), (WORST, POOR)}, 3),
        ("adjacent", None, 2),
        ("best_worst", None, 0),
    ],
)
def test_ties_are_counted_and_left_out(
    tmp_path: Path, pairing: str, made: set[tuple[str, str]] | None, ties: int
) -> None:
    rows = [row(GOOD, FAIR, POOR, WORST, scores=["3", 3.0, 1, 3])]
    store, counts = prepared(tmp_path, rows, pairing)
    found = set(labelled(store))
    assert {worse for _, worse in found} == {POOR}
    assert made is None or found == made
    assert counts["lists"]["ties"] == ties
    assert counts["ties"] == 0
    add_up(counts, store)


@pytest.mark.usefixtures("in_process")
def test_a_row_of_ties_alone_is_no_fault(tmp_path: Path) -> None:
    rows = [row(GOOD, FAIR, ranks=[1, 1]), row(GOOD, POOR, ranks=[1, 2])]
    path = write(tmp_path / "x.jsonl", rows)
    store = Store(str(tmp_path / "out"))
    counts = prepare(store, config(path, pairing="best_worst", max_reject_fraction=0), seed=0)
    assert (counts["pairs"], counts["rejects"]) == (1, {})
    assert (counts["lists"]["rows"], counts["lists"]["ties"]) == (2, 1)
    add_up(counts, store)


# What stands in a list, and its reason; each beside two good ones.
ASIDE = [
    ("", 1, "empty answer: responses", "responses.1"),
    (None, 1, "empty answer: responses", "responses.1"),
    (7, 1, "wrong type: responses", "responses.1: 7"),
    ("\ud800", 1, "invalid Unicode: responses", "responses.1"),
    (FAIR, None, "missing field: scores", "responses.1"),
    (FAIR, "N/A", "bad rating: scores", "responses.1: 'N/A'"),
    (FAIR, True, "bad rating: scores", "responses.1: true"),
    (FAIR, [1], "bad rating: scores", "responses.1: a list of 1"),
]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("response", "score", "reason", "where"), ASIDE)
def test_a_response_that_cannot_be_used_is_set_aside_by_itself(
    tmp_path: Path, response: Any, score: Any, reason: str, where: str
) -> None:
    rows = [row(GOOD, FAIR, scores=[2, 1]), row(GOOD, response, POOR, scores=[3, score, 1])]
    store, counts = prepared(tmp_path, rows, "all")
    assert sorted(labelled(store)) == [(GOOD, POOR), (GOOD, FAIR)]
    (reject,) = rejects(store)
    assert (reject["reason"], reject["found"], reject["position"]) == (reason, where, 2)
    assert json.loads(reject["row"]) == response
    assert counts["lists"]["set_aside"] == {reason: 1}
    assert counts["rejects"] == {}
    add_up(counts, store)


@pytest.mark.parametrize(
    ("given", "reason", "found"),
    [
        (row(GOOD, POOR, scores=[1]), "differing lengths: scores", "1 beside 2 responses"),
        (row(GOOD, scores=[1]), "one response: responses", "1 of 1 can be used"),
        (row(GOOD, GOOD), "one response: responses", "1 of 2 can be used"),
        (
            row(GOOD, "", scores=[1, 2]),
            "one response: responses",
            "1 of 2 can be used (empty answer: responses)",
        ),
        (row(" ", "", scores=[1, 2]), "empty answer: responses", None),
        (row(), "one response: responses", "an empty list"),
        (row(GOOD, POOR, prompt=" "), "empty prompt", None),
        (row(GOOD, POOR, prompt=None), "missing field: prompt", None),
        ({"prompt": ASK, "responses": None}, "missing field: responses", None),
        ({"prompt": ASK, "responses": GOOD}, "wrong type: responses", repr(GOOD)),
        (row(GOOD, POOR, scores=3), "wrong type: scores", "3"),
        (
            row(*(f"{k}" for k in range(448))),
            "too many pairs: responses",
            "448 responses, all two of them compared",
        ),
        ([], "not a mapping", None),
    ],
)
def test_a_list_of_which_no_pair_can_be_made_sets_its_row_aside(
    given: Any, reason: str, found: str | None
) -> None:
    with pytest.raises(BadRow) as caught:
        pairs_of_row(given, layout(scores="scores"))
    assert (caught.value.reason, caught.value.found) == (reason, found)


def test_as_many_pairs_as_a_row_may_make_are_made_one_by_one() -> None:
    made = pairs_of_row(row(*(f"answer {k}" for k in range(447))), layout())
    assert made.counts is not None
    assert made.counts.pairs == 447 * 446 // 2 < 100_000
    assert not isinstance(made.pairs, list | tuple)
    assert len({(pair.first, pair.second) for pair in made.pairs}) == made.counts.pairs


@pytest.mark.usefixtures("in_process")
def test_a_response_that_is_repeated_counts_once_and_two_ratings_of_it_for_none(
    tmp_path: Path,
) -> None:
    rows = [
        row(GOOD, POOR, GOOD, scores=[2, 1, 2]),
        row(GOOD, FAIR, FAIR, WORST, scores=[3, 1, 2, 0], prompt="Another?"),
    ]
    store, counts = prepared(tmp_path, rows, "all")
    assert set(labelled(store)) == {(GOOD, POOR), (GOOD, WORST)}
    assert counts["lists"]["repeated"] == 1
    assert counts["lists"]["set_aside"] == {"differing ratings: scores": 2}
    assert [r["found"] for r in rejects(store)] == ["responses.1", "responses.2"]
    add_up(counts, store)


@pytest.mark.usefixtures("in_process")
def test_rows_without_scores_among_scored_ones(tmp_path: Path) -> None:
    rows = [
        row(GOOD, POOR, scores=[2, 1]),
        *(row(GOOD, POOR, prompt=f"p{k}", scores=s) for k, s in enumerate([None, [None, None]])),
    ]
    store, counts = prepared(tmp_path, rows, "all")
    assert sorted(str(pair["label"] is None) for pair in pairs(store)) == ["False", "True", "True"]
    add_up(counts, store)
    store, counts = prepared(tmp_path, rows, "best_worst")
    assert counts["rejects"] == {"missing field: scores": 2}
    add_up(counts, store)


@pytest.mark.usefixtures("in_process")
def test_responses_as_messages_conversations_and_transcripts(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": ASK}]
    shapes: dict[str, dict[str, Any]] = {
        "messages": {"prompt": talk, "responses": [told(POOR), told(GOOD)]},
        "of either kind": {"prompt": talk, "responses": [POOR, told(GOOD)]},
        "conversations": {"responses": [[*talk, *told(POOR)], [*talk, *told(GOOD)]]},
        "written": {"prompt": json.dumps(talk), "responses": json.dumps([told(POOR), told(GOOD)])},
        "each written": {"prompt": ASK, "responses": [json.dumps(told(x)) for x in (POOR, GOOD)]},
        "with a system": {"system": "Be kind.", "prompt": ASK, "responses": [POOR, GOOD]},
        "transcripts": {"responses": [f"\n\nHuman: {ASK}\n\nAssistant: {x}" for x in (POOR, GOOD)]},
        "objects": {
            "prompt": ASK,
            "candidates": [
                {"messages": told(POOR), "score": 1},
                {"messages": told(GOOD), "score": 2},
            ],
        },
    }
    for name, shape in shapes.items():
        scores = {} if "candidates" in shape else {"scores": [1, 2]}
        folder = tmp_path / name
        folder.mkdir()
        store, _ = prepared(folder, [{**shape, **scores}], "all")
        (pair,) = pairs(store)
        assert pair["prompt"][-1] == talk[0], name
        assert pair[f"response_{pair['label']}"] == told(GOOD), name
    ((system, _),) = [p["prompt"] for p in pairs(Store(str(tmp_path / "with a system/out-all")))]
    assert system == {"role": "system", "content": "Be kind."}


@pytest.mark.usefixtures("in_process")
def test_a_conversation_of_another_prompt_is_set_aside(tmp_path: Path) -> None:
    whole = [
        [{"role": "user", "content": ask}, *told(x)]
        for ask, x in ((ASK, GOOD), ("?", FAIR), (ASK, POOR))
    ]
    store, counts = prepared(tmp_path, [{"responses": whole, "ranks": [1, 2, 3]}], "all")
    assert list(labelled(store)) == [(GOOD, POOR)]
    assert counts["lists"]["set_aside"] == {"differing prefixes": 1}
    add_up(counts, store)


@pytest.mark.usefixtures("in_process")
def test_lists_in_parquet_and_in_cells_of_csv(tmp_path: Path) -> None:
    objects = [
        [{"text": text, "rank": rank, "model": "m"} for text, rank in zip(FOUR, RANKS, strict=True)]
    ]
    files = {
        "structs.parquet": {"prompt": [ASK], "answers": objects},
        "lists.parquet": {"prompt": [ASK], "responses": [FOUR], "scores": [SCORES]},
        "talks.parquet": {
            "prompt": [ASK],
            "responses": [[told(x) for x in FOUR]],
            "ranks": [RANKS],
        },
    }
    for name, columns in files.items():
        pq.write_table(pa.table(columns), tmp_path / name)
    cells = {
        "lists.csv": {"prompt": ASK, "responses": json.dumps(FOUR), "scores": json.dumps(SCORES)},
        "objects.csv": {"prompt": ASK, "answers": json.dumps(objects[0])},
        "python.csv": {"prompt": ASK, "responses": str(FOUR), "ranks": str(RANKS)},
    }
    for name, given in cells.items():
        with (tmp_path / name).open("w", newline="") as file:
            table = csv.DictWriter(file, list(given))
            table.writeheader()
            table.writerow(given)
    for name in (*files, *cells):
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        store, counts = prepared(folder, str(tmp_path / name), "all")
        assert sorted(labelled(store)) == sorted(ALL), name
        unread = {"columns": {"answers.*.model": 1}, "message_keys": {}}
        has_model = name == "structs.parquet"
        assert counts["not_read"] == ({str(tmp_path / name): unread} if has_model else {})


@pytest.mark.usefixtures("in_process")
def test_all_pairs_of_a_prompt_are_on_one_side_and_labelled_together(tmp_path: Path) -> None:
    rows = [row(*FOUR, scores=SCORES, prompt=f"prompt {k}") for k in range(60)]
    path = write(tmp_path / "x.jsonl", rows)
    store = Store(str(tmp_path / "out"))
    shares = {"labelled_fraction": 0.5, "validation_fraction": 0.2, "test_fraction": 0.2}
    counts = prepare(store, config(path, pairing="all", **shares), seed=1)
    assert counts["pairs"] == 360
    assert all(counts["splits"].values())
    sides: dict[str, set[str]] = {}
    for pair in pairs(store):
        sides.setdefault(pair["prompt"], set()).add(pair["split"])
    assert {len(found) for found in sides.values()} == {1}
    first = sum(pair["label"] == "a" for pair in pairs(store))
    assert 140 < first < 220, "the place tells nothing"


@pytest.mark.usefixtures("in_process")
def test_pairs_and_lists_in_one_run(tmp_path: Path) -> None:
    lists = write(tmp_path / "lists.jsonl", [row(GOOD, POOR, scores=[2, 1])])
    given = write(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": GOOD, "rejected": WORST}])
    store = Store(str(tmp_path / "out"))
    counts = prepare(store, config(lists, given, pairing="adjacent"), seed=0)
    assert set(labelled(store)) == {(GOOD, POOR), (GOOD, WORST)}
    add_up(counts, store)


def test_the_text_of_pairs_is_reckoned_before_it_is_held() -> None:
    """A bucket is held in memory: lists make many times their own text of pairs."""
    rows = [{"prompt": "p", "responses": [f"{k}" * 1000 for k in range(10)]}]
    assert growth(rows, layout()) == pytest.approx(45 * 2 / 10, rel=0.01)
    assert growth([{"prompt": "p"}], layout()) == 1.0
    plain = Layout({"prompt": "prompt", "chosen": "c", "rejected": "r"}, "text", "text")
    assert growth(rows, plain) == 1.0


@pytest.mark.usefixtures("in_process")
def test_a_long_list_goes_into_more_buckets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BUCKET_BYTES", 20_000)
    rows = [row(*(f"{k} {x}" * 100 for k in range(12)), prompt=x) for x in "ab"]
    path = write(tmp_path / "x.jsonl", rows)
    assert plan(config(path, pairing="all")).n_buckets > 3
    store, counts = prepared(tmp_path, path, "all")
    assert counts["pairs"] == 2 * 66
    add_up(counts, store)


@pytest.mark.usefixtures("in_process")
def test_too_many_responses_set_aside_stop_the_stage(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [row(GOOD, POOR, "", scores=[2, 1, 0])])
    given = config(path, pairing="all", max_reject_fraction=0.2)
    with pytest.raises(RejectsError, match=r"(?s)1 of 3 responses in lists .*1 × empty answer"):
        prepare(Store(str(tmp_path / "out")), given, seed=0)
    assert census(given, 0).lists.set_aside == 1


def test_what_plan_says_of_lists(tmp_path: Path) -> None:
    rows = [row(GOOD, POOR, FAIR, "", FAIR, scores=[2, 1, 2, 0, 2])]
    (how, counted, aside) = list(
        census(config(write(tmp_path / "x.jsonl", rows), pairing="all"), 0).sentences()
    )
    assert how.endswith("prompt, responses, scores; format text; pairs: all")
    assert counted == (
        "1 rows hold lists of 5 responses: 2 pairs are made of them, 1 ties left out; 1 responses "
        "stand in their list already, 1 are set aside"
    )
    assert "1 × empty answer: responses (responses.3 in 1 rows)" in aside


def test_keys_of_runs_without_lists_stay() -> None:
    given = PrepareConfig.model_validate({"sources": [{"path": "x"}]})
    assert "pairing" not in given.identity()
    assert given.model_copy(update={"pairing": "all"}).identity()["pairing"] == "all"
