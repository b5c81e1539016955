"""Readers lose no row and fail on none, whatever the bytes."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import feather

from cwpo_dist.pairs import readers
from cwpo_dist.pairs.readers import Part, RawRow, SourceError, read
from cwpo_dist.pairs.rejects import Reason
from cwpo_dist.pairs.unread import columnar, tree

ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}
HH = {
    "chosen": "\n\nHuman: hi\n\nAssistant: hello",
    "rejected": "\n\nHuman: hi\n\nAssistant: go away",
}
IN_TMP = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


def by_arrow(codec: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return bytes(sink.getvalue())

    return compress


COMPRESS = [
    *((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)),
    *((".zst", by_arrow("zstd")), (".lz4", by_arrow("lz4"))),
]


def test_compressed_files_of_a_kind_begin_alike() -> None:
    assert {suffix for suffix, _ in COMPRESS} == readers.SIGNATURES.keys()
    for suffix, compress in COMPRESS:
        size = readers.SIGNATURES[suffix]
        heads = {compress(data)[:size] for data in (b"", b"0", os.urandom(10**5))}
        assert len(heads) == 1
        assert len(heads.pop()) == size > 0


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), *COMPRESS])
def test_compressed_files_read_as_plain_ones(tmp_path: Path, suffix: str, compress: Any) -> None:
    part = write(tmp_path / f"x.jsonl{suffix}", compress(lines(ROW, HH)))
    assert [row.value for row in read(part)] == [ROW, HH]


@pytest.mark.parametrize(("suffix", "compress"), COMPRESS)
def test_a_compressed_file_may_have_several_parts(
    tmp_path: Path, suffix: str, compress: Any
) -> None:
    part = write(tmp_path / f"x.jsonl{suffix}", compress(lines(ROW)) + compress(lines(HH)))
    assert [row.value for row in read(part)] == [ROW, HH]


@pytest.mark.parametrize(("suffix", "compress"), COMPRESS)
def test_of_a_torn_file_the_head_is_read_and_the_rest_is_one_row(
    tmp_path: Path, suffix: str, compress: Any
) -> None:
    whole = lines(*[ROW | {"noise": os.urandom(1000).hex()} for _ in range(1000)])
    rows = list(read(write(tmp_path / f"x.jsonl{suffix}", compress(whole)[:-20])))
    assert len(rows) > 700 or suffix == ".bz2"  # its block is 900 kB
    assert {row.fault for row in rows[:-1]} <= {None}
    assert (rows[-1].fault, rows[-1].position) == (Reason.DAMAGED, len(rows))
    assert "cannot be read from here on" in rows[-1].as_text()


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "lines"])
@pytest.mark.parametrize(("suffix", "compress"), COMPRESS)
def test_of_a_torn_array_the_whole_elements_are_read(
    tmp_path: Path, suffix: str, compress: Any, indent: int | None
) -> None:
    """As of torn lines; also where the file is called JSON lines."""
    elements = [ROW | {"noise": os.urandom(1000).hex(), "number": i} for i in range(1000)]
    torn = compress(json.dumps(elements, indent=indent).encode())[:-20]
    for name in ("x.json", "x.jsonl"):
        rows = list(read(write(tmp_path / f"{name}{suffix}", torn)))
        assert len(rows) > 700 or suffix == ".bz2"
        assert [row.value for row in rows[:-1]] == elements[: len(rows) - 1]
        assert (rows[-1].fault, rows[-1].position) == (Reason.DAMAGED, len(rows))
        assert "cannot be read from here on" in rows[-1].as_text()


def test_a_number_that_a_tear_cut_is_no_element(tmp_path: Path) -> None:
    data = zlib.compressobj(wbits=31)
    torn = data.compress(b"[1, 23") + data.flush(zlib.Z_SYNC_FLUSH)  # of [1, 2345]
    rows = list(read(write(tmp_path / "x.json.gz", torn)))
    assert faults(rows) == [(1, None), (2, Reason.DAMAGED)]


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

    def slow(*given: Any, **options: Any) -> Any:
        yield 1, ROW, "", None
        raise TimeoutError("after 30 s")

    write(tmp_path / "y.jsonl", lines(ROW))
    monkeypatch.setattr(readers, "json_rows", slow)
    with pytest.raises(SourceError, match=r"y\.jsonl: cannot be read: after 30 s"):
        list(read(Part(str(tmp_path / "y.jsonl"), "jsonl")))


def test_a_json_file_is_an_array_or_lines(tmp_path: Path) -> None:
    array = write(tmp_path / "array.json", json.dumps([ROW, 5, HH], indent=2).encode())
    assert [(row.position, row.value) for row in read(array)] == [(1, ROW), (2, 5), (3, HH)]
    assert [row.value for row in read(write(tmp_path / "lines.json", lines(ROW, HH)))] == [ROW, HH]
    assert list(read(write(tmp_path / "none.json", b"[]"))) == []


def test_one_object_over_several_lines_is_one_row_of_a_json_file(tmp_path: Path) -> None:
    whole = json.dumps(ROW, indent=2).encode()
    (row,) = read(write(tmp_path / "one.json", b"\xef\xbb\xbf" + whole))
    assert (row.position, row.value, row.fault) == (1, ROW, None)
    torn = b'{"prompt": \n' + lines(ROW)
    rows = list(read(write(tmp_path / "torn.json", torn)))
    assert faults(rows) == [(1, Reason.MALFORMED), (2, None)]


ARRAY = [ROW, HH, ROW | {"more": [{"role": "user"}]}]


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.json", "x.jsonl.gz"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ARRAY),
        json.dumps(ARRAY, indent=2) + "\n",
        json.dumps(ARRAY, indent=None, separators=(",\n", ":")),
        "\n \n" + json.dumps(ARRAY) + "\n\n",
        "[\n" + ",\n".join(map(json.dumps, ARRAY)) + "\n]\n",
        "\ufeff[" + ",\n".join(map(json.dumps, ARRAY)) + "]",
    ],
)
def test_an_array_is_read_as_one_whatever_the_file_is_called(
    tmp_path: Path, name: str, text: str
) -> None:
    data = gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
    rows = list(read(write(tmp_path / name, data)))
    assert [(row.position, row.value) for row in rows] == list(enumerate(ARRAY, 1))


def test_lines_that_are_lists_are_no_array(tmp_path: Path) -> None:
    rows = list(read(write(tmp_path / "x.jsonl", lines([ROW], ROW, [ROW, ROW]))))
    assert [row.value for row in rows] == [[ROW], ROW, [ROW, ROW]]
    rows = list(read(write(tmp_path / "y.jsonl", b'[{"torn":\n' + lines(ROW, HH))))
    assert faults(rows) == [(1, Reason.MALFORMED), (2, None), (3, None)]


@pytest.mark.parametrize(
    ("text", "good"),
    [('[{"a": 1}, {"a": ]', 1), ('[{"a": 1} {"a": 2}]', 1), ("[1, 2] tail", 2), ("[1,", 1)],
)
def test_a_broken_array_gives_what_it_has_and_one_fault(
    tmp_path: Path, text: str, good: int
) -> None:
    rows = list(read(write(tmp_path / "x.json", text.encode())))
    assert [row.fault for row in rows] == [None] * good + [Reason.MALFORMED]


def test_parquet_reads_only_the_columns_it_needs(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["p"], "chosen": ["c"], "rejected": ["r"], "huge": ["x"]})
    pq.write_table(table, tmp_path / "x.parquet")
    part = Part(str(tmp_path / "x.parquet"), "parquet")
    assert [row.value for row in read(part, ROW)] == [ROW]


def save_arrow(path: Path, table: pa.Table, kind: str) -> Part:
    if kind == "feather":
        feather.write_feather(table, path)
    else:
        open_writer = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as file, open_writer(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    return Part(str(path), "arrow")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("x.arrow", "stream"), ("x.arrow", "file"), ("x.ipc", "file"), ("x.feather", "feather")],
)
def test_arrow_files_and_streams_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    assert readers.reader_of(name) == "arrow"
    monkeypatch.setattr(readers, "BATCH_ROWS", 4)
    rows = [ROW | {"prompt": f"p{i}", "more": i} for i in range(20)]
    part = save_arrow(tmp_path / name, pa.Table.from_pylist(rows), kind)
    assert [row.value for row in read(part)] == rows
    assert [row.position for row in read(part, ["prompt"])] == list(range(1, 21))
    data = Path(part.uri).read_bytes()
    torn = list(read(write(tmp_path / name, data[: len(data) // 2])))
    assert torn[-1].fault is Reason.DAMAGED


@pytest.mark.parametrize("columns", [None, ROW])
@pytest.mark.parametrize("kind", ["file", "stream", "parquet"])
def test_two_columns_of_one_name_are_read_as_neither(
    tmp_path: Path, kind: str, columns: Any
) -> None:
    """The last one would pass for what was chosen; of a CSV file that is refused as well."""
    names, values = [*ROW, "chosen"], [*ROW.values(), "another"]
    table = pa.Table.from_arrays([pa.array([value]) for value in values], names=names)
    if kind == "parquet":
        pq.write_table(table, tmp_path / "x.parquet")
        part = Part(str(tmp_path / "x.parquet"), "parquet")
    else:
        part = save_arrow(tmp_path / "x.arrow", table, kind)
    (row,) = read(part, columns)
    assert row.fault is Reason.DAMAGED
    assert "several columns called 'chosen'" in row.as_text()


def test_two_columns_of_one_name_that_nothing_reads_harm_nothing(tmp_path: Path) -> None:
    names, values = [*ROW, "tags", "tags"], [*ROW.values(), [1], [2]]
    table = pa.Table.from_arrays([pa.array([value]) for value in values], names=names)
    pq.write_table(table, tmp_path / "x.parquet")
    part = Part(str(tmp_path / "x.parquet"), "parquet")
    assert [row.value for row in read(part, ROW)] == [ROW]
    assert columnar(part, tree(ROW)).columns == {"tags": 1}


def test_an_arrow_file_that_lies_about_its_content_is_damaged(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["one", "two", "three"] * 10})
    part = save_arrow(tmp_path / "x.arrow", table, "stream")
    data = Path(part.uri).read_bytes()
    ends = np.array([0, 3, 6, 11, 14, 17, 22, 25], np.int32)  # of the texts of one batch
    assert ends.tobytes() in data
    lie = np.array([0, 3, 6, 2**30, 14, 17, 22, 25], np.int32)
    rows = list(read(write(tmp_path / "x.arrow", data.replace(ends.tobytes(), lie.tobytes()))))
    assert [row.fault for row in rows] == [Reason.DAMAGED]


JSON_ROW = {
    "messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": None, "n": [1]}],
    "inner": {"any": {"deep": [1, "x", None]}, "text": '["stays text"]'},
    "plain": '{"stays": "text"}',
}
JSON_FEATURES = {
    "messages": datasets.List(datasets.Json()),
    "inner": {"any": datasets.Json(), "text": datasets.Value("string")},
    "plain": datasets.Value("string"),
}


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets < 5 has no Json feature")
def test_json_cells_of_datasets_are_values_in_all_it_writes(tmp_path: Path) -> None:
    rows = [JSON_ROW, {"messages": None, "inner": None, "plain": None}, JSON_ROW]
    made = datasets.Dataset.from_list(rows, features=datasets.Features(JSON_FEATURES))
    made.to_parquet(str(tmp_path / "x.parquet"))
    made.save_to_disk(tmp_path / "saved")
    (cache,) = (tmp_path / "saved").glob("*.arrow")
    given = [Part(str(tmp_path / "x.parquet"), "parquet"), Part(str(tmp_path / "saved"), "saved")]
    given += [Part(str(cache), "arrow"), Part(str(tmp_path), "hub", split="train")]
    wanted = [made[i] for i in range(3)]
    first = made[0]
    if isinstance(first["inner"]["any"], str):  # datasets 4.7 spells JSON in an object twice
        first["inner"]["any"] = json.loads(first["inner"]["any"])
    assert first == JSON_ROW
    for part in given:
        assert [row.value for row in read(part)] == wanted, part
        assert [row.fault for row in read(part)] == [None] * 3, part


def test_a_json_cell_that_is_no_json_is_a_fault_of_its_row(tmp_path: Path) -> None:
    texts = pa.array(['{"a": 1}', "{torn", "[" * 10_000, None])
    table = pa.table({"j": texts.cast(pa.json_()), "n": [0, 1, 2, 3]})
    pq.write_table(table, tmp_path / "x.parquet")
    rows = list(read(Part(str(tmp_path / "x.parquet"), "parquet")))
    assert [row.cells for row in rows] == [{}, {"j": Reason.MALFORMED}, {"j": Reason.TYPE}, {}]
    assert rows[0].value == {"j": {"a": 1}, "n": 0}
    assert rows[3].value == {"j": None, "n": 3}
    assert "{torn" in rows[1].as_text()


def test_parquet_marks_cells_that_python_cannot_hold(tmp_path: Path) -> None:
    text = pa.array([b"fine", b"bad \xff", b"fine"]).view(pa.string())
    nested = pa.StructArray.from_arrays(
        [pa.array([b"x", b"y", b"\xfe"]).view(pa.string())], names=["content"]
    )
    dates = pa.array([0, 10**17, 0], pa.timestamp("ms"))
    pq.write_table(pa.table({"text": text, "nested": nested}), tmp_path / "x.parquet")
    rows = list(read(Part(str(tmp_path / "x.parquet"), "parquet")))
    assert [row.cells for row in rows] == [
        {},
        {"text": Reason.UNICODE},
        {"nested": Reason.UNICODE},
    ]
    assert "bad \\\\xff" in rows[1].as_text()
    pq.write_table(pa.table({"dates": dates}), tmp_path / "y.parquet")
    rows = list(read(Part(str(tmp_path / "y.parquet"), "parquet")))
    assert [row.cells for row in rows] == [{}, {"dates": Reason.TYPE}, {}]


def is_array(data: bytes) -> bool:
    """Whether JSON lines are one array: they open with a bracket and cannot be lines."""
    first, *others = [line.strip() for line in data.split(b"\n") if line.strip()] or [b""]
    first = first.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not first.startswith(b"["):
        return False
    try:
        json.loads(first.decode())
    except (ValueError, RecursionError):
        return first == b"[" or not any(is_object(line) for line in others[:1])
    return not others


def is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


@IN_TMP
@given(data=st.binary(max_size=400) | st.text("[]{}1,\n ", max_size=12).map(str.encode))
def test_any_bytes_as_json_lines_give_one_row_a_line(tmp_path: Path, data: bytes) -> None:
    rows = list(read(write(tmp_path / "x.jsonl", data)))
    filled = [at for at, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    assert [row.position for row in rows] == (
        list(range(1, len(rows) + 1)) if is_array(data) else filled  # of elements; of lines
    )
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
