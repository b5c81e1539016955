"""Readers lose no row and fail on none; sources refuse early what cannot work."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cwpo_dist.config import ConfigError, PrepareConfig
from cwpo_dist.pairs import csv_files, readers, sources
from cwpo_dist.pairs.readers import Part, RawRow, SourceError, read
from cwpo_dist.pairs.rejects import Reason
from cwpo_dist.pairs.sources import check, plan, source_fingerprints
from cwpo_dist.storage import Store

ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}
HH = {
    "chosen": "\n\nHuman: hi\n\nAssistant: hello",
    "rejected": "\n\nHuman: hi\n\nAssistant: go away",
}
MESSAGES = {
    "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}],
}
IN_TMP = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path: Path, data: bytes) -> Part:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    reader = readers.reader_of(path.name)
    assert reader is not None
    return Part(str(path), reader)


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def faults(rows: list[RawRow]) -> list[tuple[int, Reason | None]]:
    return [(row.position, row.fault) for row in rows]


def config(*given: Any, **changes: Any) -> PrepareConfig:
    listed = [{"path": str(each)} if isinstance(each, str | Path) else each for each in given]
    return PrepareConfig(sources=listed, **changes)


# -- readers


def test_json_lines_number_their_lines_and_mark_the_bad_ones(tmp_path: Path) -> None:
    data = b"\n".join(
        [
            b'\xef\xbb\xbf{"a": 1}\r',
            b"",
            b'{"a": ',
            b'{"a": "\xff"}',
            b"[" * 100_000,
            b"7" * 5000,
            b"[1, 2]",
            b'{"a": 2}',
        ]
    )
    rows = list(read(write(tmp_path / "x.jsonl", data)))
    assert faults(rows) == [
        (1, None),
        (3, Reason.MALFORMED),
        (4, Reason.UNICODE),
        (5, Reason.MALFORMED),
        (6, Reason.MALFORMED),
        (7, None),
        (8, None),
    ]
    assert [rows[i].value for i in (0, -2, -1)] == [{"a": 1}, [1, 2], {"a": 2}]
    assert rows[1].as_text() == '{"a": '
    assert rows[2].as_text() == '{"a": "\\xff"}'


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_compressed_files_read_as_plain_ones(tmp_path: Path, suffix: str, compress: Any) -> None:
    part = write(tmp_path / f"x.jsonl{suffix}", compress(lines(ROW, HH)))
    assert [row.value for row in read(part)] == [ROW, HH]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_of_a_torn_file_the_head_is_read_and_the_rest_is_one_row(
    tmp_path: Path, suffix: str, compress: Any
) -> None:
    whole = lines(*[ROW | {"noise": os.urandom(1000).hex()} for _ in range(1000)])
    rows = list(read(write(tmp_path / f"x.jsonl{suffix}", compress(whole)[:-20])))
    assert len(rows) > 700 or suffix == ".bz2"  # its block is 900 kB
    assert {row.fault for row in rows[:-1]} <= {None}
    assert (rows[-1].fault, rows[-1].position) == (Reason.DAMAGED, len(rows))
    assert "cannot be read from here on" in rows[-1].as_text()


def test_behind_a_damaged_row_group_the_next_are_read(tmp_path: Path) -> None:
    rows = [ROW | {"prompt": f"p{i}"} for i in range(40)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10, compression="zstd")
    group = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    data[start : start + group.total_compressed_size] = b"\xff" * group.total_compressed_size
    found = list(read(write(path, bytes(data))))
    assert [row.position for row in found] == [*range(1, 12), *range(21, 41)]
    assert [row.position for row in found if row.fault is Reason.DAMAGED] == [11]
    (row,) = read(write(tmp_path / "y.parquet", b"PAR1 is no more"))
    assert (row.fault, row.position) == (Reason.DAMAGED, 1)


def test_storage_that_refuses_is_an_error_and_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = write(tmp_path / "x.jsonl.gz", gzip.compress(lines(ROW)))
    (tmp_path / "x.jsonl.gz").unlink()
    with pytest.raises(SourceError, match=r"x\.jsonl\.gz: cannot be read: .*No such file"):
        list(read(part))

    def slow(*given: Any) -> Any:
        yield RawRow(1, ROW)
        raise TimeoutError("after 30 s")

    write(tmp_path / "y.jsonl", lines(ROW))
    monkeypatch.setattr(readers, "_json_lines", slow)
    with pytest.raises(SourceError, match=r"y\.jsonl: cannot be read: after 30 s"):
        list(read(Part(str(tmp_path / "y.jsonl"), "jsonl")))


def test_a_json_file_is_an_array_or_lines(tmp_path: Path) -> None:
    array = write(tmp_path / "array.json", json.dumps([ROW, 5, HH], indent=2).encode())
    assert [(row.position, row.value) for row in read(array)] == [(1, ROW), (2, 5), (3, HH)]
    assert [row.value for row in read(write(tmp_path / "lines.json", lines(ROW, HH)))] == [ROW, HH]
    assert list(read(write(tmp_path / "none.json", b"[]"))) == []


@pytest.mark.parametrize(
    ("text", "good"),
    [('[{"a": 1}, {"a": ]', 1), ('[{"a": 1} {"a": 2}]', 1), ("[1, 2] tail", 2), ("[1,", 1)],
)
def test_a_broken_array_gives_what_it_has_and_one_fault(
    tmp_path: Path, text: str, good: int
) -> None:
    rows = list(read(write(tmp_path / "x.json", text.encode())))
    assert [row.fault for row in rows] == [None] * good + [Reason.MALFORMED]


def test_csv_reads_quoted_lines_and_marks_rows_that_do_not_fit(tmp_path: Path) -> None:
    data = (
        b"prompt,chosen,rejected\r\n"
        b'"two\nlines","a, b","say ""hi"""\r\n'
        b"\r\n"
        b"too,few\r\n"
        b'p,"stray" quote,r\r\n'
        b"p,\xff,r\r\n"
        b"p,c,r\r\n"
    )
    rows = list(read(write(tmp_path / "x.csv", data)))
    assert rows[0].value == {"prompt": "two\nlines", "chosen": "a, b", "rejected": 'say "hi"'}
    assert faults(rows) == [
        (1, None),
        (2, Reason.MALFORMED),
        (3, Reason.MALFORMED),
        (4, None),  # parsing refuses the lone surrogate that stands for the byte
        (5, None),
    ]
    assert rows[1].as_text() == "too,few"
    assert rows[2].as_text() == 'p,"stray" quote,r'
    assert rows[4].value == ROW


def test_csv_does_not_lose_the_file_to_one_open_quote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_files, "CSV_FIELD_BYTES", 100)
    data = b'prompt,chosen,rejected\np,"never closed,r\n' + b"p,c,r\n" * 50
    rows = list(read(write(tmp_path / "x.csv", data)))
    assert rows[0].fault is Reason.MALFORMED
    assert sum(row.fault is None for row in rows) >= 30


def test_csv_refuses_a_header_that_names_a_column_twice(tmp_path: Path) -> None:
    (row,) = read(write(tmp_path / "x.csv", b"a,a\n1,2\n"))
    assert row.fault is Reason.DAMAGED
    assert "names a column twice: a, a" in row.as_text()


def test_parquet_reads_only_the_columns_it_needs(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["p"], "chosen": ["c"], "rejected": ["r"], "huge": ["x"]})
    pq.write_table(table, tmp_path / "x.parquet")
    part = Part(str(tmp_path / "x.parquet"), "parquet")
    assert [row.value for row in read(part, ROW)] == [ROW]


def test_parquet_marks_cells_that_python_cannot_hold(tmp_path: Path) -> None:
    text = pa.array([b"fine", b"bad \xff", b"fine"]).view(pa.string())
    nested = pa.StructArray.from_arrays(
        [pa.array([b"x", b"y", b"\xfe"]).view(pa.string())], names=["content"]
    )
    dates = pa.array([0, 10**17, 0], pa.timestamp("ms"))
    pq.write_table(pa.table({"text": text, "nested": nested}), tmp_path / "x.parquet")
    rows = list(read(Part(str(tmp_path / "x.parquet"), "parquet")))
    assert faults(rows) == [(1, None), (2, Reason.UNICODE), (3, Reason.UNICODE)]
    assert "bad \\\\xff" in rows[1].as_text()
    pq.write_table(pa.table({"dates": dates}), tmp_path / "y.parquet")
    rows = list(read(Part(str(tmp_path / "y.parquet"), "parquet")))
    assert [row.fault for row in rows] == [None, Reason.TYPE, None]


@IN_TMP
@given(data=st.binary(max_size=400))
def test_any_bytes_as_json_lines_give_one_row_a_line(tmp_path: Path, data: bytes) -> None:
    rows = list(read(write(tmp_path / "x.jsonl", data)))
    filled = [at for at, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    assert [row.position for row in rows] == filled
    for row in rows:
        row.as_text().encode()


@IN_TMP
@given(data=st.binary(max_size=300), name=st.sampled_from(["x.csv", "x.json"]))
def test_any_bytes_as_csv_or_json_are_rows_or_faults(
    tmp_path: Path, data: bytes, name: str
) -> None:
    part = write(tmp_path / name, b'p,c\n"a' + data if name == "x.csv" else b"[" + data)
    rows = list(read(part))
    assert [row.position for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        row.as_text().encode()


@IN_TMP
@given(
    rows=st.lists(
        st.tuples(
            *[st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1) for _ in "pcr"]
        ),
        max_size=8,
    )
)
def test_csv_gives_back_what_python_wrote(tmp_path: Path, rows: list[tuple[str, ...]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([tuple(ROW), *rows])
    part = write(tmp_path / "x.csv", text.getvalue().encode())
    assert [tuple(row.value.values()) for row in read(part)] == rows


# -- finding inputs


def test_a_glob_gives_its_files_in_name_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz"):
        data = lines(ROW)
        write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    (piece,) = plan(config(tmp_path / "*.jsonl*")).pieces
    assert [Path(part.uri).name for part in piece.parts] == ["a.jsonl.gz", "b.jsonl"]


def test_a_limit_counts_over_all_files_of_its_source(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, lines(ROW))
    (piece,) = plan(config({"path": str(tmp_path / "*.jsonl"), "limit": 1})).pieces
    assert len(piece.parts) == 2
    assert piece.limit == 1


def test_a_folder_of_files_has_splits_by_their_names(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl", "README.md"):
        write_any = tmp_path / "set" / name
        write_any.parent.mkdir(exist_ok=True)
        write_any.write_bytes(lines(ROW))
    folder = str(tmp_path / "set")
    assert len(plan(config(folder)).pieces[0].parts) == 2
    (piece,) = plan(config({"path": folder, "split": "test"})).pieces
    assert piece.parts[0].uri.endswith("test.jsonl")
    with pytest.raises(ConfigError, match=r"sources\.0\.split.*'dev'.*train, test"):
        plan(config({"path": folder, "split": "dev"}))


def test_saved_data_sets_are_read(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list([ROW | {"more": 1}] * 3)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(tmp_path / "dict")
    for name, split, count in (("one", "train", 3), ("dict", "train", 3), ("dict", "test", 1)):
        (piece,) = plan(config({"path": str(tmp_path / name), "split": split})).pieces
        rows = list(read(piece.parts[0], piece.layout.needed))
        assert [row.value for row in rows] == [ROW] * count
    with pytest.raises(ConfigError, match=r"no split 'dev'; it has train, test"):
        plan(config({"path": str(tmp_path / "dict"), "split": "dev"}))


def test_a_hub_data_set_is_streamed_shard_by_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> datasets.IterableDataset:
        asked.append((args, options))
        rows = [ROW | {"prompt": f"p{i}"} for i in range(4)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"path": "someone/pairs", "name": "en", "data_dir": "base", "revision": "abc"}
    (piece,) = plan(config(source)).pieces
    assert len(piece.parts) == 2
    prompts = [row.value["prompt"] for part in piece.parts for row in read(part, ROW)]
    assert sorted(prompts) == ["p0", "p1", "p2", "p3"]
    assert str(piece.parts[1]) == "someone/pairs@abc[en/base/train]#1/2"
    options = {"data_dir": "base", "split": "train", "revision": "abc", "streaming": True}
    assert asked[0] == (("someone/pairs", "en"), options)


def test_a_path_that_is_nowhere_is_refused_with_what_was_tried(tmp_path: Path) -> None:
    for path in (tmp_path / "no.jsonl", tmp_path / "*.jsonl", tmp_path / "no" / "folder"):
        with pytest.raises(ConfigError, match=r"prepare\.sources\.0\.path: nothing to read"):
            check(config(path))
        with pytest.raises(ConfigError, match=r"prepare\.sources\.0\.path: nothing to read"):
            source_fingerprints(config(path))
    with pytest.raises(ConfigError, match=r"'no/such' is no file or folder here, and the Hugging"):
        check(config("no/such"))
    with pytest.raises(ConfigError, match=r"nothing to read at 'nosuch://x'"):
        check(config("nosuch://x"))


def test_sources_on_s3_are_found_by_glob_folder_and_key(s3_store: Store) -> None:
    place = s3_store.child("set")
    place.create("train-0.jsonl.gz", gzip.compress(lines(ROW)))
    place.create("train-1.jsonl.gz", gzip.compress(lines(ROW, ROW)))
    place.create("test.jsonl", lines(ROW))
    for path, count in (("", 2), ("/*.gz", 2), ("/train-1.jsonl.gz", 1)):
        (piece,) = plan(config(place.uri + path)).pieces
        assert len(piece.parts) == count
        assert all(part.uri.startswith("s3://") for part in piece.parts)
    assert sum(1 for _ in read(piece.parts[0])) == 2
    before = source_fingerprints(config(place.uri))
    place.write("test.jsonl", lines(ROW, ROW))
    assert source_fingerprints(config(place.uri)) != before


def test_a_fingerprint_follows_the_files_and_pins_the_hub(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "x.jsonl", lines(ROW))
    before = source_fingerprints(config(tmp_path / "x.jsonl"))
    assert source_fingerprints(config(tmp_path / "x.jsonl")) == before
    write(tmp_path / "x.jsonl", lines(ROW, ROW))
    assert source_fingerprints(config(tmp_path / "x.jsonl")) != before
    with caplog.at_level("WARNING"):
        pinned = source_fingerprints(config({"path": "someone/pinned", "revision": "abc"}))
        assert not caplog.records
        floating = source_fingerprints(config("someone/floating"))
    assert pinned[0]["revision"] == "abc"
    assert floating[0]["revision"] is None
    assert "has no revision" in caplog.text


# -- how rows spell a pair


@pytest.mark.parametrize(
    ("row", "spelled", "kind"),
    [
        (ROW, "text", "text"),
        (HH, "hh", "conversational"),
        (MESSAGES, "conversational", "conversational"),
        ([ROW, ROW, ROW | {"chosen": ["junk"]}], "text", "text"),
        ({"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " a", "rejected": " b"}, "hh", None),
        (
            {"prompt": MESSAGES["chosen"][:1], "chosen": "a", "rejected": "b"},
            "conversational",
            None,
        ),
        ({"prompt": "Human: x\n\nAssistant: y", "response_a": "a", "response_b": "b"}, "hh", None),
        ({"prompt": "why Assistant: ?", "response_a": "a", "response_b": "b"}, "text", "text"),
    ],
)
def test_the_format_shows_in_the_first_rows(
    tmp_path: Path, row: Any, spelled: str, kind: str | None
) -> None:
    write(tmp_path / "x.jsonl", lines(*(row if isinstance(row, list) else [row])))
    planned = plan(config(tmp_path / "x.jsonl"))
    assert planned.pieces[0].layout.format == spelled
    assert planned.kind == (kind or "conversational")


def test_one_conversational_source_makes_the_run_conversational(tmp_path: Path) -> None:
    write(tmp_path / "text.jsonl", lines(ROW))
    write(tmp_path / "hh.jsonl", lines(HH))
    planned = plan(config(tmp_path / "text.jsonl", tmp_path / "hh.jsonl"))
    assert planned.kind == "conversational"
    assert [piece.layout.format for piece in planned.pieces] == ["text", "hh"]
    as_text = {"path": str(tmp_path / "hh.jsonl"), "format": "text"}
    assert plan(config(tmp_path / "text.jsonl", as_text)).kind == "text"
    write(tmp_path / "messages.jsonl", lines(MESSAGES))
    with pytest.raises(ConfigError, match=r"sources\.0\.format: text transcripts cannot be mixed"):
        plan(config(as_text, tmp_path / "messages.jsonl"))


def test_columns_are_renamed_and_only_the_needed_ones_read(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", lines({"q": "p", "yes": "c", "no": "r", "label": 1, "junk": 0}))
    names = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    (piece,) = plan(config({"path": str(tmp_path / "x.jsonl"), "columns": names})).pieces
    assert piece.layout.columns == names
    assert piece.layout.needed == {"q", "yes", "no"}


def test_columns_named_in_the_config_win_over_those_found(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", lines(ROW | {"x": "1", "y": "2", "label": "a"}))
    names = {"response_a": "x", "response_b": "y"}
    (piece,) = plan(config({"path": str(tmp_path / "x.jsonl"), "columns": names})).pieces
    assert piece.layout.answers == ("response_a", "response_b")
    assert piece.layout.columns["label"] == "label"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"chosen": "best"}}, r"sources\.0\.columns\.chosen: .*'best'.*it has prompt"),
        ({"columns": {"winner": "chosen"}}, r"sources\.0\.columns: 'winner' is no field of ours"),
        ({"group_column": "topic"}, r"prepare\.group_column: .*no column 'topic'"),
        ({"keep_columns": ["topic"]}, r"prepare\.keep_columns: .*no column 'topic'"),
        ({"keep_columns": ["prompt"]}, r"'prompt' is a column of the pair record"),
        ({"test_fraction": 0.7, "validation_fraction": 0.5}, r"= 1\.2: at most 1"),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path / "x.jsonl", lines(ROW))
    source = {"path": str(tmp_path / "x.jsonl"), "columns": changes.pop("columns", {})}
    with pytest.raises(ConfigError, match=message):
        check(config(source, **changes))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.txt", b"x", r"unknown suffix; we read \.jsonl"),
        ("x.jsonl", b"", r"no row among the first .* \(it is empty\)"),
        ("x.jsonl", b"{\n{\n", r"no row .* \(malformed line\)"),
        ("x.jsonl", b"[1]\n", r"no row .* \(not a mapping\)"),
        ("x.jsonl.gz", b"no gzip", r"sources\.0\.path: .*x\.jsonl\.gz.*damaged file: cannot"),
        ("x.jsonl", lines({"text": "t"}), r"no columns for two answers; it has text"),
        ("x.jsonl", lines({"chosen": "c", "rejected": "r"}), r"columns\.prompt: .*no transcripts"),
    ],
)
def test_unusable_files_are_refused_before_a_worker_starts(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        check(config(tmp_path / name))


def test_a_source_for_one_side_may_lack_the_group(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", lines(ROW | {"topic": "t"}))
    write(tmp_path / "test.jsonl", lines(ROW))
    held_out = {"path": str(tmp_path / "test.jsonl"), "into": "test"}
    planned = plan(config(tmp_path / "train.jsonl", held_out, group_column="topic"))
    assert [piece.layout.group for piece in planned.pieces] == ["topic", None]
    assert planned.may_leak


def test_buckets_grow_with_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = write(tmp_path / "x.jsonl", lines(*[ROW] * 100))
    size = Path(part.uri).stat().st_size
    assert plan(config(part.uri)).n_buckets == 1
    monkeypatch.setattr(sources, "BUCKET_BYTES", (size - 1) // 3)
    assert plan(config(part.uri)).n_buckets == 4
