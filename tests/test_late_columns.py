"""Columns that stand behind the first rows are found, may be named, or are said to be lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import Rows, config, pairs, write

from cwpo_dist.config import ConfigError, PrepareConfig
from cwpo_dist.pairs import looks, peeked
from cwpo_dist.pairs.estimate import census
from cwpo_dist.pairs.readers import Part
from cwpo_dist.pairs.sources import check, plan
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store

pytestmark = pytest.mark.usefixtures("in_process", "few_first_rows")
POOL = 100  # as many as the first rows


@pytest.fixture
def few_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peeked, "PEEK_ROWS", POOL)


def row(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"prompt {i}", "response_a": "x", "response_b": "y", **more}


def labelled(start: int, count: int) -> Rows:
    return [
        row(i, label="ab"[i % 2], votes_a=3, votes_b=1, by=i) for i in range(start, start + count)
    ]


POOLED = [row(i) for i in range(POOL)]


def labels(tmp_path: Path, given: PrepareConfig) -> int:
    """How many pairs `prepare` gives a label."""
    store = Store(str(tmp_path / "out"))
    prepare(store, given.model_copy(update={"labelled_fraction": 1.0}), seed=0)
    return sum(pair["label"] is not None for pair in pairs(store))


def in_files(tmp_path: Path, *files: Rows) -> str:
    for k, rows in enumerate(files):
        write(tmp_path / f"{k}.jsonl", rows)
    return str(tmp_path / "*.jsonl")


@pytest.mark.parametrize("columns", [{}, {"label": "label"}])
def test_labels_in_a_later_file_are_read(tmp_path: Path, columns: dict[str, str]) -> None:
    source = {"path": in_files(tmp_path, POOLED, labelled(POOL, 50)), "columns": columns}
    assert labels(tmp_path, config(source)) == 50
    with pytest.raises(ConfigError, match=r"no column 'lable' .* it has .*label.*Correct"):
        check(config({**source, "columns": {"label": "lable"}}))


def test_labels_further_down_a_long_file_are_read(tmp_path: Path) -> None:
    long = [row(i, more="." * 100) for i in range(POOL)]
    path = write(tmp_path / "x.jsonl", long + labelled(POOL, 1000))
    assert labels(tmp_path, config(path)) == 1000


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are looked at, as they are."""
    found: list[str] = []
    plainly = looks.read

    def read(part: Part, columns: Any = None) -> Any:
        found.append(Path(part.uri).name)
        return plainly(part, columns)

    monkeypatch.setattr(looks, "read", read)
    return found


def test_of_many_files_some_are_looked_at_always_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ([row(POOL + k)] for k in range(8, 0, -1))
    path = in_files(tmp_path, POOLED, *files)
    monkeypatch.setattr(looks, "MOST_LOOKS", 4)
    found = counted(monkeypatch)
    first = plan(config(path))
    assert found == ["1.jsonl", "3.jsonl", "5.jsonl", "8.jsonl"]
    assert plan(config(path)) == first
    found.clear()
    check(config({"path": path, "limit": 50}))  # behind its limit a source has nothing
    assert not found


@pytest.fixture(params=["unlooked", "far"])
def hidden(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A source whose labels stand where nobody looks: in a file of many, or between two places."""
    if request.param == "far":
        monkeypatch.setattr(looks, "_PLACES", 1)
        rows = POOLED + labelled(POOL, 50)
        return write(tmp_path / "x.jsonl", rows + [row(i) for i in range(2000, 2100)])
    monkeypatch.setattr(looks, "MOST_LOOKS", 2)
    return in_files(tmp_path, POOLED, [row(2000)], labelled(POOL, 50), [row(2001)])


def test_a_column_that_is_lost_is_said_to_be(
    tmp_path: Path, hidden: str, caplog: pytest.LogCaptureFixture
) -> None:
    says = "column 'label' (in 50 rows) is lost: it may be label, but"
    assert any(says in line for line in census(config(hidden), 0, seconds=60).sentences())
    assert labels(tmp_path, config(hidden)) == 0
    assert says in caplog.text
    assert "'votes_a' (in 50 rows) is lost" in caplog.text
    caplog.clear()
    quiet = {"path": hidden, "columns": {"label": None, "votes_a": None, "votes_b": None}}
    assert not any("is lost" in line for line in census(config(quiet), 0, seconds=60).sentences())


def test_a_named_column_may_stand_where_nobody_looked(tmp_path: Path, hidden: str) -> None:
    named = {"path": hidden, "columns": {"label": "label"}}
    assert any("'label' stands in none of the" in note for note in plan(config(named)).notes)
    assert labels(tmp_path, config(named)) == 50
    with pytest.raises(ConfigError, match=r"columns\.label: .* no column 'lable'"):
        check(config({"path": hidden, "columns": {"label": "lable"}}))


def test_a_misspelt_name_is_refused_at_the_end_where_nobody_searched(
    tmp_path: Path, hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "_SEARCHED_BYTES", 0)
    misspelt = config({"path": hidden, "columns": {"label": "lable"}})
    check(misspelt)
    with pytest.raises(ConfigError, match=r"sources\.0: .* no column 'lable' in any row"):
        labels(tmp_path, misspelt)
    assert labels(tmp_path / "b", config({"path": hidden, "columns": {"label": "label"}})) == 50


def test_answers_that_no_first_row_has_are_no_late_columns(tmp_path: Path, hidden: str) -> None:
    for name in ("prompt", "response_a"):
        with pytest.raises(ConfigError, match=rf"columns\.{name}: .* no column 'label'"):
            check(config({"path": hidden, "columns": {name: "label"}}))


def test_kept_columns_may_come_late(tmp_path: Path, hidden: str) -> None:
    store = Store(str(tmp_path / "out"))
    prepare(store, config(hidden, keep_columns=["by"]), seed=0)
    assert sum(pair["by"] is not None for pair in pairs(store)) == 50
    with pytest.raises(ConfigError, match=r"keep_columns: .*no column 'buy'"):
        check(config(hidden, keep_columns=["buy"]))


def _parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def _csv(path: Path, rows: Rows) -> None:
    path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, r.values())) for r in rows)]))


@pytest.mark.parametrize(("kind", "file"), [("parquet", _parquet), ("csv", _csv)])
def test_files_name_their_columns_themselves(
    tmp_path: Path,
    kind: str,
    file: Callable[[Path, Rows], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for k, rows in enumerate((POOLED, [row(2000)], labelled(POOL, 50))):
        file(tmp_path / f"{k}.{kind}", rows)
    found = counted(monkeypatch)
    path = str(tmp_path / f"*.{kind}")
    assert labels(tmp_path, config(path)) == 50
    assert ("1.parquet" in found) is False  # its rows tell no more than its schema
    monkeypatch.setattr(looks, "_SEARCHED_BYTES", 0)
    with pytest.raises(ConfigError, match="no column 'lable'"):
        check(config({"path": path, "columns": {"label": "lable"}}))


def test_a_group_that_the_first_rows_lack_is_none(tmp_path: Path) -> None:
    path = in_files(tmp_path, POOLED, [row(2000, topic="t")])
    write(tmp_path / "t", [])
    with pytest.raises(ConfigError, match="group_column"):
        check(config(path, group_column="topic"))
    topical = write(tmp_path / "topical.json", [row(1, topic="t")])
    held_out = {"path": path, "into": "test"}
    pieces = plan(config(topical, held_out, group_column="topic")).pieces
    assert [piece.layout.group for piece in pieces] == ["topic", None]


def test_a_value_in_an_object_may_stand_where_nobody_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schema names the object; whether it has the value its rows say."""
    judged = [row(i, judge={"label": "ab"[i % 2]}) for i in range(POOL, POOL + 50)]
    for k, rows in enumerate((POOLED, [row(2000)], judged, [row(2001)])):
        _parquet(tmp_path / f"{k}.parquet", rows)
    monkeypatch.setattr(looks, "MOST_LOOKS", 2)  # the first and the last of those behind
    path = str(tmp_path / "*.parquet")
    assert labels(tmp_path, config({"path": path, "columns": {"label": "judge.label"}})) == 50
    with pytest.raises(ConfigError, match=r"no column 'juge\.label'"):
        check(config({"path": path, "columns": {"label": "juge.label"}}))
