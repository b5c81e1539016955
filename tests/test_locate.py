"""Every file that can be read is read, and each that is not is named, with why."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from datasets.data_files import SPLIT_KEYWORDS, _get_data_files_patterns
from fsspec.utils import glob_translate
from hypothesis import event, given, settings
from hypothesis import strategies as st
from located import found, make, names, why
from prepared import config, pairs

from cwpo_dist.config import ConfigError, Source
from cwpo_dist.pairs.listing import LeftOut, left_out_lines
from cwpo_dist.pairs.locate import reads_below
from cwpo_dist.pairs.readers import read
from cwpo_dist.pairs.sources import plan, source_fingerprints
from cwpo_dist.pairs.split_names import SPLIT_WORDS, NoSplitError, of_other_splits, split_of
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store

# -- folders


def test_a_folder_is_read_whole_whatever_its_files_are_called(tmp_path: Path) -> None:
    folder = make(tmp_path, "b/2025-06.jsonl", "extra.NDJSON", "train.jsonl", "_x.jsonl", "z.txt")
    (folder / "rows.csv.gz").write_bytes(gzip.compress(b"prompt,chosen,rejected\na,b,c\n"))
    of = found(folder)
    assert names(of, folder) == [
        *("_x.jsonl", "b/2025-06.jsonl", "extra.NDJSON", "rows.csv.gz", "train.jsonl")
    ]
    assert why(of).keys() == {"z.txt"}
    assert "unknown suffix; we read .jsonl" in why(of)["z.txt"]
    assert len(of.marks) == len(of.parts)


def test_what_a_folder_holds_beside_data_is_left_out_by_name(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", "a.jsonl", ".git/b.jsonl", "_temporary/0/c.jsonl", ".d.jsonl")
    make(folder, "dataset_infos.json", "e.parquet.gz", "f.jsonl.bak", "sub/config.json")
    elsewhere = make(tmp_path / "elsewhere", "x.jsonl")
    (folder / "empty.jsonl").touch()
    (folder / "signature.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    for name in ("torn.jsonl.zst", "torn.parquet"):
        (folder / name).write_bytes(b"\x28\xb5\x2f\xfd\x24"[: 5 * name.endswith("zst")])
    (folder / "again.jsonl").symlink_to("a.jsonl")
    (folder / "far.jsonl").symlink_to(elsewhere / "x.jsonl")
    (folder / "gone.jsonl").symlink_to("nothing.jsonl")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.jsonl")
    of = found(folder)
    assert names(of, folder) == ["a.jsonl", "far.jsonl", "torn.jsonl.zst", "torn.parquet"], (
        "what is damaged counts as that"
    )
    reasons = why(of)
    for name, word in {
        ".git/b.jsonl": "hidden",
        "_temporary/0/c.jsonl": "hidden",
        ".d.jsonl": "hidden",
        "dataset_infos.json": "describes a data set",
        "sub/config.json": "describes a data set",
        "e.parquet.gz": "unknown suffix",
        "f.jsonl.bak": "unknown suffix",
        "empty.jsonl": "it is empty",
        "signature.jsonl.zst": "it is empty",
        "again.jsonl": "a link to a.jsonl, which is read",
        "gone.jsonl": "a link to nothing",
        "loop": "a folder behind a link; give it as a source of its own",
        "pipe.jsonl": "no regular file",
    }.items():
        assert word in reasons.pop(name), name
    assert reasons == {}


def test_a_name_that_no_table_could_hold_is_left_out(tmp_path: Path) -> None:
    folder = make(tmp_path, "a.jsonl")
    try:
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jsonl")).write_text("{}")
    except OSError:
        pytest.skip("this disk takes UTF-8 names alone")
    assert why(found(folder)) == {"caf\\udce9.jsonl": "its name is not UTF-8; rename it"}


def test_a_folder_without_data_says_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sources\.0\.path: nothing to read .*it is empty"):
        found(tmp_path)
    make(tmp_path, "notes.txt", "b.xlsx")
    with pytest.raises(ConfigError, match=r"leaves out b\.xlsx, notes\.txt: unknown suffix"):
        found(tmp_path)


def test_a_folder_that_refuses_to_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a.jsonl", "closed/b.jsonl")
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match=r"cannot read .*access is denied .*closed"):
        found(tmp_path)
    for glob in ("**/*.jsonl", "*/b.jsonl", "c*/*.jsonl", "closed/*.jsonl"):
        with pytest.raises(ConfigError, match=r"cannot read .*access is denied .*closed"):
            found(tmp_path / glob)
    assert names(found(tmp_path / "*.jsonl"), tmp_path) == ["a.jsonl"]
    make(tmp_path, "open/b.jsonl")
    assert names(found(tmp_path / "o*/*.jsonl"), tmp_path / "open") == ["b.jsonl"], (
        "what cannot match may be closed"
    )


def test_a_file_in_a_closed_folder_is_no_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root is refused nothing, so the system's answer is given in its place."""
    make(tmp_path, "closed/b.jsonl")
    stat = os.stat

    def refuse(path: Any, **how: Any) -> Any:
        if "closed/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(ConfigError, match=r"cannot read .*access is denied .*; ask its owner"):
        found(tmp_path / "closed" / "b.jsonl")


@pytest.mark.parametrize(
    ("files", "settings", "read"),
    [
        # names that tell several splits: the one asked for, and what tells none
        (["train.jsonl", "more.jsonl", "test.jsonl"], {}, ["more.jsonl", "train.jsonl"]),
        (
            ["train/0.jsonl", "train/1.jsonl", "test/0.jsonl"],
            {},
            ["train/0.jsonl", "train/1.jsonl"],
        ),
        (["rows.jsonl", "Test.jsonl", "my-dev.jsonl"], {}, ["rows.jsonl"]),
        (["split=train/0.jsonl", "split=test/0.jsonl"], {}, ["split=train/0.jsonl"]),
        (
            ["a/train.jsonl", "b/train.jsonl", "b/test.jsonl"],
            {},
            ["a/train.jsonl", "b/train.jsonl"],
        ),
        # all of one split, or words that are none
        (["test.jsonl"], {}, ["test.jsonl"]),
        (["latest.jsonl", "devices.jsonl"], {}, ["devices.jsonl", "latest.jsonl"]),
        # a source that goes to one side prefers the files that are called so
        (["train.jsonl", "test.jsonl"], {"into": "test"}, ["test.jsonl"]),
        (["train.jsonl"], {"into": "test"}, ["train.jsonl"]),
        # asked for by name, as `datasets` has it
        (["train.jsonl", "more.jsonl", "val.jsonl"], {"split": "validation"}, ["val.jsonl"]),
        (["train.jsonl", "more.jsonl"], {"split": "train"}, ["train.jsonl"]),
        (["more.jsonl"], {"split": "train"}, ["more.jsonl"]),
        (
            ["data/prefs-00000-of-00001.jsonl", "data/sft-00000-of-00001.jsonl"],
            {"split": "prefs"},
            ["data/prefs-00000-of-00001.jsonl"],
        ),
    ],
)
def test_names_that_tell_splits_are_never_mixed(
    tmp_path: Path, files: list[str], settings: dict[str, str], read: list[str]
) -> None:
    of = found(make(tmp_path, *files), **settings)
    assert names(of, tmp_path) == read
    assert sorted([*read, *why(of)]) == sorted(files), "each file is read or named"
    assert all("split" in reason for reason in why(of).values())


PLACES = st.sampled_from(["", "train/", "test/", "data/", "a [v2]/", ".git/", "_tmp/"])
BASES = st.sampled_from(["rows", "train", "test-1", ".x", "ü", "a*b", "dataset_info", "latest"])
SUFFIXES = st.sampled_from([".jsonl", ".json", ".JSONL.gz", ".parquet", ".txt", "-0", ".csv.zip"])
TREES = st.sets(st.builds("".join, st.tuples(PLACES, BASES, SUFFIXES)), min_size=1, max_size=9)


@settings(max_examples=80)
@given(files=TREES, into=st.sampled_from([None, "test"]), asked=st.sampled_from([None, "train"]))
def test_each_file_of_any_folder_is_read_or_named(
    files: set[str], into: str | None, asked: str | None
) -> None:
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
        try:
            of = found(folder, into=into, split=asked)
        except ConfigError:
            event("refused")
            return
        assert sorted([*names(of, folder), *why(of)]) == sorted(files)
        read_splits = {split_of(name) for name in names(of, folder)} - {None}
        assert len(read_splits) <= 1, "splits are never mixed"


def test_splits_that_nobody_chose_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "data/prefs-00000-of-00001.jsonl", "data/sft-00000-of-00001.jsonl")
    with pytest.raises(ConfigError, match=r"sources\.0\.split: .*has the splits prefs, sft"):
        found(tmp_path)
    with pytest.raises(ConfigError, match=r"sources\.0\.split: .*no split 'train'; it has prefs"):
        found(tmp_path, split="train")
    with pytest.raises(ConfigError, match=r"no split 'test'; it has train"):
        found(make(tmp_path / "plain", "rows.jsonl"), split="test")


def test_split_words_are_those_of_datasets() -> None:
    assert {str(split): tuple(words) for split, words in SPLIT_KEYWORDS.items()} == SPLIT_WORDS


WORDS = [word for words in SPLIT_WORDS.values() for word in words]
NAMES = st.lists(
    st.lists(st.sampled_from([*WORDS, "rows", "latest", "0", "2025"]), min_size=1, max_size=2),
    min_size=1,
    max_size=3,
).map(lambda parts: "/".join("-".join(words) for words in parts) + ".jsonl")


@given(st.lists(NAMES, min_size=1, max_size=5, unique=True), st.sampled_from(["train", "test"]))
def test_a_file_is_read_where_datasets_would_read_it(files: list[str], asked: str) -> None:
    """Where all names tell one split each, and in the same way, choices are those of `datasets`."""
    tells = [split_of(name) for name in files]
    in_folders = [split_of(name.rpartition("/")[0] + "/x.jsonl") for name in files]
    alike = all(in_folders) or not any(in_folders)
    if None in tells or not alike or any(len(set(words_in(name))) > 1 for name in files):
        return
    patterns = _get_data_files_patterns(lambda pattern: [f for f in files if matches(f, pattern)])
    theirs = {f for pattern in patterns.get(asked, []) for f in files if matches(f, pattern)}
    try:
        ours = set(files) - of_other_splits(files, asked, None).keys()
    except NoSplitError:
        ours = set()
    assert ours == theirs


def words_in(name: str) -> list[str]:
    parts = name.replace(".", "-").replace("/", "-").split("-")
    return [split for split, words in SPLIT_WORDS.items() for part in parts if part in words]


def matches(name: str, pattern: str) -> bool:
    return re.match(glob_translate(pattern), name) is not None


# -- globs and single files


def test_a_path_that_exists_wins_over_a_glob(tmp_path: Path) -> None:
    make(tmp_path, "set [v2]/pairs [a-z]?.jsonl", "set [v2]/pairs ab.jsonl", "set v/pairs x.jsonl")
    for path, count in {
        "set [v2]/pairs [a-z]?.jsonl": 1,
        "set [v2]/*.jsonl": 2,
        "set [v2]": 2,
        "set [v]/*.jsonl": 1,
        "*/pairs*": 3,
    }.items():
        wanted = config(str(tmp_path / path))
        assert len(plan(wanted).pieces[0].parts) == count, path
        assert len(source_fingerprints(wanted)[0]) == count, path
    (piece,) = plan(config(str(tmp_path / "set [v2]/pairs [a-z]?.jsonl"))).pieces
    assert [raw.value["prompt"] for raw in read(piece.parts[0])] == [
        "prompt set [v2]/pairs [a-z]?.jsonl"
    ]


def test_a_glob_names_what_matches_and_cannot_be_read(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "b.txt", "sub/c.jsonl", ".d.jsonl")
    of = found(tmp_path / "*")
    assert names(of, tmp_path) == ["a.jsonl"]
    assert why(of)["sub"] == "a folder; give it as a source of its own"
    assert why(of).keys() == {"b.txt", "sub", ".d.jsonl"}
    assert names(found(tmp_path / ".*"), tmp_path) == [".d.jsonl"]
    assert names(found(tmp_path / "**" / "*.jsonl"), tmp_path) == ["a.jsonl", "sub/c.jsonl"]
    with pytest.raises(ConfigError, match=r"leaves out b\.txt: unknown suffix"):
        found(tmp_path / "b*")


def test_a_glob_reads_all_splits_and_says_so(tmp_path: Path) -> None:
    make(tmp_path, "train.jsonl", "test.jsonl", "rows.jsonl")
    of = found(tmp_path / "*.jsonl")
    assert len(of.parts) == 3
    assert of.note is not None
    assert "files of several splits by their names (test, train), and all are read" in of.note
    assert plan(config(str(tmp_path / "*.jsonl"))).remarks == (of.note,)
    of = found(tmp_path / "*.jsonl", split="test")
    assert names(of, tmp_path) == ["test.jsonl"]
    assert len(of.left_out) == 2


def test_settings_that_mean_nothing_for_a_path_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl")
    for path, setting in [
        *((tmp_path / "a.jsonl", name) for name in ("name", "data_dir", "revision")),
        *((tmp_path, name) for name in ("name", "revision")),
    ]:
        with pytest.raises(ConfigError, match=rf"sources\.0\.{setting}: 'x', which only .* has"):
            found(path, **{setting: "x"})
    assert len(found(tmp_path / "a.jsonl", split="train").parts) == 1
    with pytest.raises(ConfigError, match=r"sources\.0\.split: .*no split 'test'"):
        found(tmp_path / "a.jsonl", split="test")


# -- several sources


def test_a_file_that_two_sources_read_alike_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "b.jsonl")
    (tmp_path / "link").symlink_to(tmp_path)
    twice = {"path": str(tmp_path / "link" / "a.jsonl"), "into": "test"}
    with pytest.raises(ConfigError, match=r"sources\.1\.path: .*a\.jsonl is read by .*sources\.0"):
        plan(config(str(tmp_path / "*.jsonl"), twice))
    turned = {"chosen": "rejected", "rejected": "chosen"}
    plan(config(str(tmp_path), {"path": str(tmp_path / "a.jsonl"), "columns": turned}))


def test_a_source_that_would_read_what_the_run_leaves_is_told(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", "a.jsonl", "in/b.jsonl")
    (tmp_path / "link").symlink_to(folder)
    for place, path, given_too, reads in [
        (folder / "run", folder, {}, True),
        (folder, folder, {}, True),
        (tmp_path / "link" / "run", folder, {}, True),
        (folder / "run", f"{folder}/**/*.jsonl", {}, True),
        (folder / "run", folder, {"data_dir": "in"}, False),
        (folder / "run", f"{folder}/*.jsonl", {}, False),
        (folder / "run", folder / "a.jsonl", {}, False),
        (tmp_path / "set2", folder, {}, False),
        (f"s3://bucket{folder}/run", folder, {}, False),
        (folder / "run", "someone/pairs", {}, False),
    ]:
        source = Source(path=str(path), **given_too)
        assert reads_below(source, str(place)) is reads, (place, path)


# -- what is said of it


@pytest.mark.usefixtures("in_process")
def test_what_is_left_out_stands_in_the_log_and_the_manifest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(tmp_path / "set", "a.jsonl", "b.jsonl", *(f"n{i:03d}.txt" for i in range(120)))
    store = Store(str(tmp_path / "out"))
    with caplog.at_level("WARNING"):
        counts = prepare(store, config(str(folder), test_fraction=0.0), seed=0)
    assert {each["prompt"] for each in pairs(store)} == {"prompt a.jsonl", "prompt b.jsonl"}
    assert counts["files_left_out"]["count"] == 120
    listed = counts["files_left_out"]["files"]
    assert len(listed) == 100
    assert (listed[0]["source"], listed[0]["file"]) == (str(folder), "n000.txt")
    assert "unknown suffix" in listed[0]["why"]
    assert "leaves out n000.txt, n001.txt" in caplog.text
    assert "and 115 more: unknown suffix" in caplog.text


def test_a_line_for_each_source_and_reason() -> None:
    given = [LeftOut("s", "a", "x"), LeftOut("s", "b", "y"), LeftOut("s", "c", "x")]
    assert list(left_out_lines(given)) == ["'s' leaves out a, c: x", "'s' leaves out b: y"]
