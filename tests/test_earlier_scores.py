"""Tomorrow's files beside yesterday's: only their pairs are scored."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from small_run import small_config
from tiny import tiny_classifier, tiny_tokenizer

from cwpo_dist.config import Config
from cwpo_dist.config.load import parse_config
from cwpo_dist.execution.run import run
from cwpo_dist.graph import nodes_until
from cwpo_dist.pairs.records import SCORE_SCHEMA
from cwpo_dist.planning.plan import plan
from cwpo_dist.runs.context import Context
from cwpo_dist.scoring.earlier_scores import EarlierScores, ScoreFile, ranged_files
from cwpo_dist.stages import annotate
from cwpo_dist.storage import MANIFEST, Store

Scores = dict[str, dict[str, Any]]


def write(path: Path, start: int, stop: int, **more: str) -> None:
    rows = [
        {"prompt": f"Question {i}?", "response_a": f"yes {i}", "response_b": f"no {i * i}", **more}
        for i in range(start, stop)
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def growing(folder: Path, **changes: Any) -> Config:
    config = {
        "output_dir": str(folder / "run"),
        "prepare": {
            "sources": [{"path": str(folder / "in" / "*.jsonl")}],
            "rows_per_shard": 16,
            "num_cpus": 0.5,
        },
        "annotate": {
            "model": {"model_name_or_path": str(folder / "reward"), "max_length": 400},
            "cpus_per_actor": 0.5,
        },
    }
    return parse_config(config | changes)


def place(config: Config, stage: str) -> Store:
    node = nodes_until(config, "cw", "annotate")[stage]
    return Store(config.output_dir).child(*node.path.split("/"))


def annotated(config: Config) -> tuple[dict[str, Any], Scores]:
    """Runs until the scores are there; the counts and the scores by answer id."""
    run(config, until="annotate")
    store = place(config, "annotate")
    rows = [row for name in store.names("scores") for row in store.read_table(name).to_pylist()]
    by_answer = {row["answer_id"]: row for row in rows}
    assert len(by_answer) == len(rows), "an answer twice"
    counts = store.read_json(MANIFEST)["counts"]
    assert counts["rows"] == len(rows) == counts["rows_in"] - counts["over_length"]
    return counts, by_answer


@pytest.mark.usefixtures("ray_local")
def test_only_the_answers_of_new_files_are_scored(tmp_path: Path) -> None:
    tiny_classifier("llama").save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    for i in range(3):
        write(tmp_path / "in" / f"{i}.jsonl", 30 * i, 30 * i + 30)
    config = growing(tmp_path)
    first, yesterday = annotated(config)
    assert (first["rows"], first["reused"]) == (180, 0)
    write(tmp_path / "in" / "3.jsonl", 85, 110)  # five of yesterday's once more
    said = {stage.stage: stage for stage in plan(config).stages}["annotate"]
    told = r"220 answers to 110 prompts, about (\d+) of them scored before"
    before = re.fullmatch(told, said.work)
    assert before is not None, said.work
    assert 160 < int(before[1]) < 220
    grown, today = annotated(config)
    assert (grown["rows"], grown["reused"]) == (220, 180)
    assert {name: today[name] for name in yesterday} == yesterday
    afresh, all_new = annotated(growing(tmp_path, output_dir=str(tmp_path / "other")))
    assert afresh["reused"] == 0
    assert grown["tokens"] == afresh["tokens"] - first["tokens"] > 0
    for name, row in all_new.items():
        assert today[name] == pytest.approx(row, abs=1e-5)

    # One row changed, one file gone; of what was scored, one output never finished.
    write(tmp_path / "in" / "0.jsonl", 0, 30)
    text = (tmp_path / "in" / "0.jsonl").read_text()
    (tmp_path / "in" / "0.jsonl").write_text(text.replace("yes 7", "yes, 7"))
    (tmp_path / "in" / "1.jsonl").unlink()
    for store in (store for store in outputs(tmp_path / "run") if store.exists(MANIFEST)):
        store.remove(MANIFEST)
    changed, left = annotated(config)
    assert (changed["rows"], changed["reused"]) == (160, 159)
    assert sum(left[name] == today[name] for name in left.keys() & today.keys()) == 159

    # New pairs of old answers cost nothing.
    both = [("yes 0", "yes 1"), ("no 0", "yes 1")]
    rows = [{"prompt": "Question 0?", "response_a": a, "response_b": b} for a, b in both]
    (tmp_path / "in" / "4.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paired, _ = annotated(config)
    assert paired["rows"] - paired["reused"] == 1, "'yes 1' is no old answer to this question"

    # Another seed draws other labels and places, which no score knows; another model scores anew.
    more = growing(tmp_path, annotate=config.annotate.model_dump() | {"splits": ["test"]})
    assert len(files_to_reuse(more)) > len(files_to_reuse(config)) > 0
    assert files_to_reuse(growing(tmp_path, seed=1))
    tiny_classifier("llama", seed=1).save_pretrained(tmp_path / "reward")
    assert files_to_reuse(config) == []


def files_to_reuse(config: Config) -> list[ScoreFile]:
    """What a run would copy scores from, its own output left out."""
    node = nodes_until(config, "cw", "annotate")["annotate"]
    return list(annotate.SAME.earlier(Context(Store(config.output_dir)), node).files)


def outputs(root: Path) -> list[Store]:
    return [Store(str(folder)) for folder in sorted((root / "annotate").iterdir())]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_annotator_fitted_again_on_the_same_pairs_scores_only_new_ones(
    tmp_path: Path, ray_local: Any
) -> None:
    given = small_config(tmp_path / "in")
    given["prepare"]["sources"].append({"path": str(tmp_path / "more" / "*.jsonl")})
    write(tmp_path / "more" / "0.jsonl", 0, 20)  # without labels: they go to no labelled part
    config = parse_config(given)
    first, yesterday = annotated(config)
    write(tmp_path / "more" / "1.jsonl", 20, 50)
    grown, today = annotated(config)
    assert grown["reused"] == first["rows"]
    assert grown["rows"] == first["rows"] + 60
    assert {name: today[name] for name in yesterday} == yesterday


def scores(*ids: str, value: float = 0.5) -> pa.Table:
    columns = [list(ids), ["x"] * len(ids), [value] * len(ids), [None] * len(ids)]
    return pa.table(columns, schema=SCORE_SCHEMA)


def test_scores_are_found_in_the_files_whose_range_holds_them(
    tmp_path: Path, s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = s3_store.child("one"), Store(str(tmp_path / "two"))
    one.create_table("scores/part-00000.parquet", scores("a", "c"))
    one.create_table("scores/part-00001.parquet", scores("d", "f"))
    two.create_table("scores/part-00000.parquet", scores("b", "c", "e", value=9))
    two.create_table("scores/part-00001.parquet", scores())
    files = ranged_files([one, two, s3_store.child("none")], "scores")
    assert [(file.first, file.last) for file in files] == [("a", "c"), ("d", "f"), ("b", "e")]
    earlier = EarlierScores(files)
    found = earlier.of(["b", "c", "d", "zz"]).to_pylist()
    assert {row["answer_id"]: row["score"] for row in found} == {"b": 9, "c": 0.5, "d": 0.5}
    assert earlier.of([]).num_rows == earlier.of(["0", "00"]).num_rows == 0
    read: list[str] = []
    given = Store.read_table
    monkeypatch.setattr(
        Store, "read_table", lambda self, *args: (read.append(args[0]), given(self, *args))[1]
    )
    earlier.of(["d", "f"])
    assert read == ["scores/part-00001.parquet"], "all were found, so nothing more is read"
