"""Sources are found, and what cannot work is refused early, by name."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_readers import HH, ROW, lines, write

from cwpo_dist.config import ConfigError, PrepareConfig
from cwpo_dist.pairs import sources
from cwpo_dist.pairs.pieces import raw_rows
from cwpo_dist.pairs.readers import read
from cwpo_dist.pairs.row_forms import parse_raw
from cwpo_dist.pairs.sources import check, plan, source_fingerprints
from cwpo_dist.storage import Store

MESSAGES = {
    "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}],
}


def config(*given: Any, **changes: Any) -> PrepareConfig:
    listed = [{"path": str(each)} if isinstance(each, str | Path) else each for each in given]
    return PrepareConfig(sources=listed, **changes)


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
    with pytest.raises(ConfigError, match=r"sources\.0\.split.*'dev'.*test, train"):
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
        split = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
        every = datasets.IterableDatasetDict({"train": split, "test": split})
        return every if options["split"] is None else every[options["split"]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"path": "someone/pairs", "name": "en", "data_dir": "base", "revision": "abc"}
    planned = plan(config(source))
    (piece,) = planned.pieces
    assert [each.file for each in planned.left_out] == ["split 'test'"]
    assert len(piece.parts) == 2
    prompts = [row.value["prompt"] for part in piece.parts for row in read(part, ROW)]
    assert sorted(prompts) == ["p0", "p1", "p2", "p3"]
    assert str(piece.parts[1]) == "someone/pairs@abc[en/base/train]#1/2"
    options = {"data_dir": "base", "split": None, "revision": "abc", "streaming": True}
    assert asked[0] == (("someone/pairs", "en"), options)
    assert asked[-1] == (("someone/pairs", "en"), options | {"split": "train"})


def test_a_path_that_is_nowhere_is_refused_with_what_was_tried(tmp_path: Path) -> None:
    for path in (tmp_path / "no.jsonl", tmp_path / "*.jsonl", tmp_path / "no" / "folder"):
        with pytest.raises(ConfigError, match=r"prepare\.sources\.0\.path: nothing to read"):
            check(config(path))
        with pytest.raises(ConfigError, match=r"prepare\.sources\.0\.path: nothing to read"):
            source_fingerprints(config(path))
    with pytest.raises(ConfigError, match=r"'no/such' is neither a file nor a folder here"):
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
    place.write("test.jsonl", lines(ROW, ROW))  # which is not read
    assert source_fingerprints(config(place.uri)) == before
    place.write("train-0.jsonl.gz", gzip.compress(lines(ROW, ROW)))
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
        ({"columns": {"winner": "chosen"}}, r"sources\.0\.columns: 'winner' is unknown"),
        ({"group_column": "topic"}, r"prepare\.group_column: .*no column 'topic'"),
        ({"keep_columns": ["topic"]}, r"prepare\.keep_columns: .*no column 'topic'"),
        ({"keep_columns": ["prompt"]}, r"'prompt' is a column of the record"),
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


def _in_parquet(path: Path, **columns: pa.Array) -> str:
    texts = {name: [f"{name} {i}" for i in range(3)] for name in ROW}
    pq.write_table(pa.table({**texts, **columns}), path)
    return str(path)


@pytest.mark.parametrize("limit", [None, 3])
def test_a_cell_that_nobody_needs_voids_no_row(tmp_path: Path, limit: int | None) -> None:
    beyond = pa.array([10**17] * 3, pa.timestamp("ms"))  # what Python's dates cannot hold
    path = _in_parquet(tmp_path / "x.parquet", when=beyond)
    (piece,) = plan(config({"path": path, "limit": limit})).pieces
    made = [parse_raw(raw, piece.layout) for _, raw in raw_rows(piece)]
    assert [pair.prompt for row in made for pair in row.pairs] == [f"prompt {i}" for i in range(3)]


@pytest.mark.parametrize(
    ("column", "kept", "said"),
    [
        (
            {"when": pa.array([10**17] * 3, pa.timestamp("ms"))},
            ["when"],
            r"3 × cannot be kept: when: a kept column holds",
        ),
        (
            {"took": pa.array([7] * 3, pa.duration("s"))},
            ["took"],
            r"3 × cannot be kept: took \(.*leave the column out of prepare\.keep_columns",
        ),
        (
            {"chosen": pa.array([b"\xff"] * 3).view(pa.string())},
            [],
            r"3 × invalid Unicode: chosen: write the file as UTF-8",
        ),
    ],
)
def test_a_needed_cell_that_cannot_be_read_is_named(
    tmp_path: Path, column: dict[str, pa.Array], kept: list[str], said: str
) -> None:
    path = _in_parquet(tmp_path / "x.parquet", **column)
    with pytest.raises(ConfigError, match=said):
        check(config(path, keep_columns=kept))


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
