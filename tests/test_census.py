"""What `plan` counts is what `prepare` makes: copies merged, prompts of two sides set aside."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from cwpo_dist.config import PrepareConfig
from cwpo_dist.pairs import estimate
from cwpo_dist.pairs.estimate import Census, census
from cwpo_dist.pairs.splits import SPLITS
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store


def assert_same_by_split(found: Census, made: Mapping[str, Any]) -> None:
    """Pairs, those with a label, and their different prompts and answers."""
    for name in ("splits", "labelled", "prompts", "answers"):
        planned = {split: n for split, n in getattr(found, name).items() if n}
        assert planned == {split: n for split, n in made[name].items() if n}, name
    for split, pairs in made["splits"].items():
        assert made["prompts"][split] <= pairs
        assert made["answers"][split] <= 2 * pairs
        assert found.answers_of(split) == made["answers"][split]
        assert found.prompts_of(split) == made["prompts"][split]
    assert found.answers_of(*SPLITS) < 2 * found.pairs(*SPLITS), "some stand in several pairs"


def rows(draw: random.Random, count: int) -> list[dict[str, Any]]:
    """Few prompts and answers, so that many are copies, with the answers in either order."""
    made = []
    for _ in range(count):
        answers = draw.sample(["yes", "no", "maybe", ""], 2)
        row: dict[str, Any] = {"prompt": f"p{draw.randrange(30)}", "topic": draw.randrange(9)}
        row |= {"response_a": answers[0], "response_b": answers[1]}
        row["label"] = draw.choice(["a", "b", "tie", None])
        row["weight"] = draw.choice([None, 0.5, 2.0])
        made.append(row)
    return made


def lists(draw: random.Random, count: int, ratings: str | None) -> list[dict[str, Any]]:
    """Rows of responses to the prompts of `rows`, with faults of every kind."""
    made = []
    for _ in range(count):
        size = draw.choice([1, 2, 3, 5])
        texts = [draw.choice(["yes", "no", "maybe", "well", "", None, 7]) for _ in range(size)]
        row: dict[str, Any] = {"prompt": f"p{draw.randrange(30)}", "topic": draw.randrange(9)}
        row["responses"] = texts
        if ratings is not None:
            rated = [draw.choice([1, 2, 3, None, "x"]) for _ in range(size)]
            row[ratings] = draw.choice([rated, rated, rated, rated[1:], None])
        made.append(row)
    return made


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("seed", range(6))
def test_plan_counts_what_prepare_makes_of_lists(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    ratings = ("scores", "ranks", None)[seed % 3]
    sources: list[dict[str, Any]] = []
    for name, into in (("a", None), ("b", "test")):
        path = tmp_path / f"{name}.jsonl"
        made_rows = lists(draw, 400, ratings) if name == "a" else rows(draw, 60)
        path.write_text("".join(json.dumps(row) + "\n" for row in made_rows))
        sources.append({"path": str(path), "into": into})
    given = PrepareConfig.model_validate(
        {
            "sources": sources,
            "max_reject_fraction": 1.0,
            "pairing": "all" if ratings is None else ("all", "best_worst", "adjacent")[seed // 2],
            "group_column": "topic" if seed % 2 else None,
        }
    )
    store = Store(str(tmp_path / "out"))
    made = prepare(store, given, seed)
    found = census(given, seed)
    of_lists = made["lists"]
    assert (found.lists.rows, found.lists.responses) == (of_lists["rows"], of_lists["responses"])
    assert (found.lists.pairs, found.lists.ties) == (of_lists["pairs"], of_lists["ties"])
    assert (found.lists.ties > 0) is (ratings is not None)
    assert found.lists.repeated == of_lists["repeated"] > 0
    assert dict(found.of_lists.reasons) == of_lists["set_aside"]
    assert found.lists.set_aside == sum(of_lists["set_aside"].values()) > 0
    assert found.merged == made["merged_duplicates"] > 0
    assert found.rows_in == made["rows_in"], "of which the rejects are a share, for both"
    assert found.lists.rows_of(found.rows_in) == found.pairs(*SPLITS) + found.merged + found.rejects
    assert dict(found.tally.reasons) == made["rejects"]
    assert_same_by_split(found, made)
    assert {k: sum(n.values()) for k, n in found.own.items()} == made["numbers"]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("seed", range(6))
def test_plan_counts_what_prepare_makes(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    sources: list[dict[str, Any]] = []
    for name, into in (("a", None), ("b", "test"), ("c", "validation")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(draw, 120)))
        sources.append({"path": str(path), "into": into})
    given = PrepareConfig.model_validate(
        {
            "sources": sources[: 1 + seed % 3],
            "max_reject_fraction": 1.0,
            "validation_fraction": 0.2,
            "test_fraction": 0.2,
            "group_column": "topic" if seed % 2 else None,
            "ties": "labelled" if seed > 2 else "unlabelled",
        }
    )
    made = prepare(Store(str(tmp_path / "out")), given, seed)
    found = census(given, seed)
    assert found.exact
    assert found.merged == made["merged_duplicates"] > 0
    assert found.rows_in == made["rows_in"], "of which the rejects are a share, for both"
    assert_same_by_split(found, made)
    assert dict(found.tally.reasons) == made["rejects"]
    assert found.rejects == sum(made["rejects"].values()) > 0
    assert found.ties == made["ties"]
    assert {k: sum(n.values()) for k, n in found.own.items()} == made["numbers"]


def test_no_file_behind_a_limit_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may have thousands of them, and one that cannot be read is none of `prepare`'s."""
    for k in range(5):
        row = {"prompt": f"p{k}", "chosen": "yes", "rejected": "no"}
        (tmp_path / f"{k}.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    opened: list[str] = []
    read = estimate.read

    def noted(part: Any, columns: Any) -> Any:
        opened.append(Path(part.uri).name)
        yield from read(part, columns)

    monkeypatch.setattr(estimate, "read", noted)
    source = {"path": str(tmp_path), "limit": 3}
    found = census(PrepareConfig.model_validate({"sources": [source]}), 0)
    assert opened == ["0.jsonl", "1.jsonl"]
    assert found.exact
    assert found.pairs("labelled", "unlabelled", "test") == 2
    assert found.merged == 1


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_of_a_single_file_the_rest_is_reckoned_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A million lines in one file are no sixty thousand, as far as a few seconds reach."""
    row = {"chosen": "yes", "rejected": "no, 愛"}
    rows = pd.DataFrame([{"prompt": f"p{number:04d}"} | row for number in range(2000)])
    path = tmp_path / f"rows.{kind}"
    write = {"jsonl": partial(rows.to_json, orient="records", lines=True, force_ascii=False)}
    write |= {"csv": partial(rows.to_csv, index=False), "parquet": rows.to_parquet}
    write[kind](path)
    now = iter([0.0, *([1.0] * 100), *([99.0] * 9)])
    monkeypatch.setattr(estimate, "time", SimpleNamespace(monotonic=lambda: next(now)))
    given = PrepareConfig.model_validate({"sources": [{"path": str(path)}]})
    found = census(given, 0, seconds=9)
    assert not found.exact
    assert sum(found.splits.values()) == pytest.approx(2000, rel=0.02)


def test_where_time_runs_out_the_rest_is_reckoned_but_no_row_behind_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: list[dict[str, Any]] = []
    for name, count, limit in (("a", 40, None), ("b", 40, 5), ("c", 80, None)):
        path = tmp_path / f"{name}.jsonl"
        lines = [
            json.dumps({"prompt": f"{name}{number:03d}", "chosen": "yes", "rejected": "no"}) + "\n"
            for number in range(count)
        ]
        path.write_text("".join(lines))
        sources.append({"path": str(path), "limit": limit})
    given = PrepareConfig.model_validate({"sources": sources, "test_fraction": 0})
    now = iter([0.0, *([1.0] * 65), *([99.0] * 9)])  # 20 rows of the third source are read
    monkeypatch.setattr(estimate, "time", SimpleNamespace(monotonic=lambda: next(now)))
    found = census(given, 0, seconds=9)
    assert not found.exact
    assert sum(found.splits.values()) == 40 + 5 + 80
    assert found.prompts_of(*SPLITS) == 40 + 5 + 80
    assert found.answers_of(*SPLITS) == 2 * (40 + 5 + 80)
