"""What nothing reads is named, with the rows that have it, in every format and over all pieces."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import config, write

from cwpo_dist.pairs.estimate import census
from cwpo_dist.pairs.readers import Part
from cwpo_dist.pairs.unread import MOST_NAMES, OTHERS, Unread, columnar, tree
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store

# Of 60 rows: every row has a score, each second one a note, each third a list, none `empty`.
COLUMNS = {"score": 60, "note": 30, "tags": 20, "source.url": 60}


def row(i: int) -> dict[str, Any]:
    talk = [{"role": "user", "content": f"Question {i}", "id": i if i % 4 == 0 else None}]
    return {
        "prompt": talk,
        "chosen": [{"role": "assistant", "content": "Yes.", "train": True}],
        "rejected": [{"role": "assistant", "content": "No."}],
        "score": i / 2,
        "note": "seen" if i % 2 == 0 else None,
        "tags": ["x"] if i % 3 == 0 else [],
        "empty": None,
        "source": {"name": f"page {i}", "url": "http://example.org"},
    }


ROWS = [row(i) for i in range(60)]
KEYS = {"id": 15, "train": 60}


def written(folder: Path, kind: str) -> str:
    if kind == "jsonl":
        return write(folder / "x.jsonl", ROWS)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), folder / "x.parquet", row_group_size=7)
        return str(folder / "x.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return str(folder / "saved")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.usefixtures("in_process", "many_files")
def test_columns_and_keys_are_counted_over_all_pieces(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = {"path": written(tmp_path, kind), "columns": {"prompt": "prompt"}}
    given = config(source, keep_columns=[], group_column=None)
    with caplog.at_level("WARNING"):
        counts = prepare(Store(str(tmp_path / "out")), given, seed=0)
    whole = {"score": 60, "note": 30, "tags": 20, "source": 60}
    assert counts["not_read"] == {source["path"]: {"columns": whole, "message_keys": KEYS}}
    assert "columns that nothing reads: score (in 60 rows), source (in 60 rows)" in caplog.text
    assert "message keys that nothing reads: train (in 60 rows), id (in 15 rows)" in caplog.text
    found = census(given, 0).unread[0]
    assert (found.columns, found.message_keys) == (whole, KEYS)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.usefixtures("in_process")
def test_beside_a_nested_column_the_rest_of_it_is_named(tmp_path: Path, kind: str) -> None:
    source = {"path": written(tmp_path, kind), "columns": {"system": "source.name"}}
    counts = prepare(Store(str(tmp_path / "out")), config(source), seed=0)
    assert counts["not_read"][source["path"]]["columns"] == COLUMNS
    limited = prepare(Store(str(tmp_path / "few")), config(source | {"limit": 6}), seed=0)
    few = {"score": 6, "note": 3, "tags": 2, "source.url": 6}
    assert limited["not_read"][source["path"]]["columns"] == few


@pytest.mark.usefixtures("in_process")
def test_of_text_an_empty_cell_is_no_value(tmp_path: Path) -> None:
    with (tmp_path / "x.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerows([["prompt", "chosen", "rejected", "by"], ["1", "a", "b", ""]])
        table.writerow(["2", "a", "b", "Ada"])
    counts = prepare(Store(str(tmp_path / "o")), config(str(tmp_path / "x.csv")), seed=0)
    (unread,) = counts["not_read"].values()
    assert unread == {"columns": {"by": 1}, "message_keys": {}}


@pytest.mark.usefixtures("in_process")
def test_what_is_read_or_kept_is_not_named(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "b", "id": i, "by": "x"} for i in "12"]
    given = config(
        write(tmp_path / "x.jsonl", rows), keep_columns=["id"], group_column="by", test_fraction=0.0
    )
    assert prepare(Store(str(tmp_path / "o")), given, seed=0)["not_read"] == {}


def test_a_parquet_footer_tells_it_without_the_column(tmp_path: Path) -> None:
    """A column of other types, of a dotted name, and one whose pages are damaged."""
    table = pa.table(
        {
            "prompt": ["a", "b", "c"],
            "a.b": [1, None, 3],
            "pixels": [b"x" * 5000, b"y" * 5000, None],
            "at": [{"x": None}, {"x": 1}, None],
        }
    )
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = data.index(b"x" * 5000)
    data[start - 30 : start + 10_000] = b"\0" * 10_030  # a whole column chunk is unreadable
    path.write_bytes(bytes(data))
    found = columnar(Part(str(path), "parquet"), tree(["prompt"]))
    assert found.columns == {"a.b": 2, "pixels": 2, "at": 1}
    assert columnar(Part(str(path), "parquet"), tree(["prompt", "a.b"])).columns.keys() == {
        "pixels",
        "at",
    }


def test_paths_of_what_is_used() -> None:
    assert tree(["a", "b.c", "b.d.0"]) == {
        "a": {},
        "b.c": {},
        "b.d.0": {},
        "b": {"c": {}, "d": {"0": {}}},
    }
    assert tree(["b.c", "b"])["b"] == tree(["b", "b.c"])["b"] == {}
    used = tree(["b", "b.c"])
    unread = Unread()
    unread.note({"b": {"c": 1, "d": 2}}, used)
    assert not unread
    unread.note({"list": [1], "b.c": 1, "x": float("nan"), "y": " "}, used)
    unread.note("no row", used)
    unread.note({"r": {"0": 3, "list": [5, 6]}}, tree(["r.list.0"]))
    assert unread.columns == {"list": 1, "r.0": 1, "r.list.1": 1}


def test_names_without_end_are_counted_together() -> None:
    unread = Unread()
    for i in range(MOST_NAMES + 50):
        unread.note({f"column {i}": 1, "always": 2, "\ud800": 3}, {})
    assert unread.columns["always"] == MOST_NAMES + 50
    assert unread.columns[OTHERS] == 52
    assert len(unread.columns) == MOST_NAMES + 1
    json.dumps(unread.columns).encode()
    (sentence,) = unread.sentences()
    assert sentence.endswith("and 181 more")
