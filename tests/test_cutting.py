"""Huge files are cut and tiny ones joined, and neither shows in any pair or reject."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepared import config, files, rejects, row, write

from cwpo_dist.pairs import cutting
from cwpo_dist.pairs.layout import Layout
from cwpo_dist.pairs.pieces import Piece
from cwpo_dist.pairs.readers import Part, RawRow, read
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store

LAYOUT = Layout({name: name for name in ("prompt", "chosen", "rejected")}, "text", "text")
LINES = st.lists(
    st.sampled_from(
        [b"", b"\r", b'{"a": 1}', b'{"a": 2}\r', b"{", b"\xff", b'"' + b"x" * 70 + b'"']
    )
)


def numbered(pieces: list[Piece]) -> list[Piece]:
    parts = [piece.parts[0] for piece in pieces if not cutting.is_numbered(piece)]
    return cutting.number_rows(pieces, map(cutting.spans, parts))


def rows_of(pieces: list[Piece]) -> list[tuple[str, RawRow]]:
    return [(str(p), raw) for piece in pieces for p in piece.parts for raw in read(p)]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, start=st.sampled_from([b"", b"\xef\xbb\xbf"]), size=st.integers(1, 90))
def test_lines_of_a_file_cut_anywhere_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[bytes], start: bytes, size: int
) -> None:
    path = tmp_path / "x.jsonl"
    for end in (b"", b"\n"):
        path.write_bytes(start + b"\n".join(lines) + end)
        piece = Piece("x", (Part(str(path), "jsonl", size=path.stat().st_size),), LAYOUT)
        whole = [piece, replace(piece, source="the same file again")]
        monkeypatch.setattr(cutting, "CUT_BYTES", size)
        pieces = numbered(cutting.cut(whole))
        assert len(pieces) == 2 * max(1, -(-path.stat().st_size // size))
        assert rows_of(pieces) == rows_of(whole)


def test_an_array_is_not_cut_between_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps([row(i) for i in range(50)], indent=1))
    whole = [Piece("x", (Part(str(path), "jsonl", size=path.stat().st_size),), LAYOUT)]
    monkeypatch.setattr(cutting, "CUT_BYTES", 100)
    with caplog.at_level("INFO"):
        pieces = numbered(cutting.cut(whole))
    assert pieces == whole
    assert len(rows_of(pieces)) == 50
    assert "x.jsonl (0 MB) is read by one task" in caplog.text


def test_a_large_tsv_file_is_cut_between_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("a\tb\n" + '1,"\t"two\nlines"\n' * 50)
    whole = [Piece("x", (Part(str(path), "tsv", size=path.stat().st_size),), LAYOUT)]
    monkeypatch.setattr(cutting, "CUT_BYTES", 100)
    pieces = numbered(cutting.cut(whole))
    assert len(pieces) > 5
    assert rows_of(pieces) == rows_of(whole)
    assert [raw.value for _, raw in rows_of(pieces)] == [{"a": '1,"', "b": "two\nlines"}] * 50


CSV_LINES = st.lists(
    st.sampled_from(
        [
            *("", "\r", "1,2", '"x\ny",2\r', '"a ""quoted"" word","b\n\nc"', 'x"y,3', '"x"y,3'),
            *('"open', "1,2,3", "ü,\udcff", "\ufeff1,2"),
        ]
    )
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=CSV_LINES,
    header=st.sampled_from(["a,b", "\ufeffa,b", '"a\nc",b\r', "a,a", '"a', ""]),
    size=st.integers(1, 40),
)
def test_rows_of_a_csv_file_cut_anywhere_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], header: str, size: int
) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes("\n".join([header, *lines]).encode("utf-8", "surrogateescape"))
    whole = [Piece("x", (Part(str(path), "csv", size=path.stat().st_size),), LAYOUT)]
    monkeypatch.setattr(cutting, "CUT_BYTES", size)
    pieces = numbered(cutting.cut(whole))
    assert rows_of(pieces) == rows_of(whole)
    if header == "a,b" and all(line == "1,2" for line in lines):
        assert len(pieces) >= min(len(lines), len(lines) * 3 // size)
    limited = [replace(whole[0], limit=1)]
    assert numbered(cutting.cut(limited)) == limited


@pytest.mark.parametrize("size", [1, 5000, 10**6])
def test_row_groups_of_a_file_cut_anywhere_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path = tmp_path / "x.parquet"
    table = pa.Table.from_pylist([row(i, chosen=f"{i:03d}" * 100) for i in range(95)])
    pq.write_table(table, path, row_group_size=10, compression="none")
    whole = [Piece("x", (Part(str(path), "parquet", size=path.stat().st_size),), LAYOUT)]
    monkeypatch.setattr(cutting, "CUT_BYTES", size)
    pieces = numbered(cutting.cut(whole))
    assert {1: 10, 5000: 5, 10**6: 1}[size] == len(pieces)
    assert rows_of(pieces) == rows_of(whole)
    assert sum(part.size for piece in pieces for part in piece.parts) <= path.stat().st_size


def test_tiny_files_share_a_task_and_what_cannot_be_cut_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cutting, "CUT_BYTES", 1000)
    monkeypatch.setattr(cutting, "JOIN_BYTES", 100)
    monkeypatch.setattr(cutting, "OPEN_BYTES", 20)
    sizes = [1, 1, 1, 1, 1, 1, 50, 50, 90, 2000, 0]
    parts = tuple(Part(f"{i}.csv.gz", "csv", size=size) for i, size in enumerate(sizes))
    piece = Piece("x", parts, LAYOUT)
    with caplog.at_level("INFO"):
        pieces = cutting.cut([piece, replace(piece, limit=5)])
    shared = [[part.size for part in piece.parts] for piece in pieces]
    assert shared == [[1] * 5, [1, 50], [50], [90], [2000], [0], sizes]
    assert caplog.text.count("9.csv.gz (0 MB) is read by one task: compressed files, ") == 1
    hub = tuple(Part("a/b", "hub", shard=(i, 3)) for i in range(3))
    assert len(cutting.cut([Piece("a/b", hub, LAYOUT)])) == 3
    torn = Part(str(tmp_path / "no.parquet"), "parquet", size=2000)
    assert [piece.parts for piece in cutting.cut([Piece("x", (torn,), LAYOUT)])] == [(torn,)]


@pytest.mark.usefixtures("in_process")
def test_pairs_and_rejects_are_the_same_however_inputs_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = [
        row(i % 70, chosen="" if i % 9 == 0 else f"yes {i % 11}") for i in range(200)
    ]
    write(tmp_path / "0.jsonl", rows)
    with (tmp_path / "0.jsonl").open("a") as file:
        file.write('{"torn\n\n' + json.dumps(row("last", chosen="")))
    pq.write_table(pa.Table.from_pylist(rows[:150]), tmp_path / "1.parquet", row_group_size=20)
    with (tmp_path / "1.csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows({**given, "rejected": 'no,\n"no"'} for given in rows[50:120])
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(b"[1]\n" + json.dumps(rows[1]).encode()))
    for i in range(3, 9):
        write(tmp_path / f"{i}.jsonl", rows[i : i + 3])
    wanted = config(str(tmp_path / "*.*"), max_reject_fraction=1.0, rows_per_shard=16)
    seen = []
    for cut, join in ((2**26, 2**23), (10**9, 1), (100, 1), (777, 3000), (3000, 10**9)):
        monkeypatch.setattr(cutting, "CUT_BYTES", cut)
        monkeypatch.setattr(cutting, "JOIN_BYTES", join)
        monkeypatch.setattr(cutting, "OPEN_BYTES", 100)
        store = Store(str(tmp_path / f"out{cut}"))
        counts = prepare(store, wanted, seed=0)
        kept = {name: data for name, data in files(store).items() if name.startswith("pairs/")}
        seen.append((counts, kept, sorted(map(str, rejects(store)))))
        assert counts["pairs"] + counts["merged_duplicates"] + len(seen[-1][2]) == counts["rows_in"]
    assert all(each == seen[0] for each in seen)
    assert str({"source": str(tmp_path / "0.jsonl"), "position": 203})[1:-1] in "".join(seen[0][2])
