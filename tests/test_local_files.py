"""What killed writers leave: no foreign reader sees it, nothing copies it, and it is removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from cwpo_dist import local_files
from cwpo_dist.file_marks import fingerprint, mark
from cwpo_dist.node_disk import upload
from cwpo_dist.processes import Process
from cwpo_dist.storage import Store

KILLED = """
import os, signal, stat, sys
import pyarrow as pa
from cwpo_dist.storage import Store
done = getattr(os, sys.argv[2])
def killed(given, *more):
    if isinstance(given, int) and stat.S_ISDIR(os.fstat(given).st_mode):
        return done(given, *more)  # a folder is synced: the write has not begun
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, sys.argv[2], killed)
Store(sys.argv[1]).{call}
"""
SHARD = "create_table('preferences/part-00001.parquet', pa.table({'pair_id': ['c', 'd']}))"
OLD = f"part-00001.parquet.{'0a' * 16}.partial"  # as versions before called it


def kill_while_writing(folder: Path, step: str, call: str) -> list[Path]:
    """A process that is killed at a step of a write; what it leaves."""
    before = set(folder.rglob("*"))
    command = [sys.executable, "-c", KILLED.replace("{call}", call), str(folder), step]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    left = [path for path in set(folder.rglob("*")) - before if path.is_file()]
    assert left, "it was at work"
    return left


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_others_read_committed_rows_alone(tmp_path: Path, step: str) -> None:
    store = Store(str(tmp_path / "run"))
    store.create_table("preferences/part-00000.parquet", pa.table({"pair_id": ["a", "b"]}))
    kill_while_writing(tmp_path / "run", step, SHARD)
    folder = tmp_path / "run" / "preferences"
    assert list(pd.read_parquet(folder)["pair_id"]) == ["a", "b"]
    assert ds.dataset(folder).to_table()["pair_id"].to_pylist() == ["a", "b"]
    read = datasets.load_dataset(
        "parquet", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert read["pair_id"] == ["a", "b"]
    shown = [path for path in folder.iterdir() if path.name[0] not in "._"]  # Spark's rule
    assert [path.name for path in shown] == ["part-00000.parquet"]


def test_what_the_dead_left_goes_and_what_the_living_write_stays(tmp_path: Path) -> None:
    (tmp_path / "run" / "scores").mkdir(parents=True)
    store, scores = Store(str(tmp_path / "run")), tmp_path / "run" / "scores"
    dead = kill_while_writing(tmp_path / "run", "link", SHARD)
    (old := scores / OLD).write_bytes(b"x")
    here = Process.current()
    living = scores / f".x.{here.machine}-{here.pid}-{here.started}-00000000.partial"
    reused = scores / f".x.{here.machine}-{here.pid}-{here.started - 1}-00000000.partial"
    elsewhere = scores / f".x.{'0' * 8}-{here.pid}-{here.started - 1}-00000000.partial"
    silent = scores / f".y.{'0' * 8}-1-1-00000000.partial"
    users = scores / "users.partial"
    for path in (living, reused, elsewhere, silent, users):
        path.write_bytes(b"x")
    written = time.time() - local_files.QUIET_S - 60
    os.utime(silent, (written, written))
    assert store.names() == []
    store.sweep()
    assert not [path for path in (*dead, old, reused, silent) if path.exists()]
    assert sorted(path for path in scores.iterdir()) == sorted([living, elsewhere, users])


def test_a_folder_gets_its_name_whole_and_the_first_stays(tmp_path: Path) -> None:
    """Of an export that was stopped for long the successor's is there when it goes on."""
    store = Store(str(tmp_path / "run"))
    place = f"{store.root}/model"
    with local_files.whole_folder(place) as late:
        (late / "weights").write_bytes(b"late")
        assert store.names() == []
        with local_files.whole_folder(place) as first:
            (first / "weights").write_bytes(b"1st!")
            store.sweep()
    assert store.names() == ["model/weights"]
    assert store.read("model/weights") == b"1st!"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]


def test_a_folder_that_is_there_by_half_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"to")
    with local_files.whole_folder(str(tmp_path / "model")) as folder:
        (folder / "weights").write_bytes(b"whole")
    assert (tmp_path / "model" / "weights").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), local_files.whole_folder(f"{tmp_path}/model") as folder:
        folder.write_bytes(b"x")
    assert not list(tmp_path.iterdir())
    dead = tmp_path / f".model.{Process.current().machine}-1-1-00000000.partial"
    dead.mkdir()
    (dead / "weights").write_bytes(b"x")
    Store(str(tmp_path)).sweep()
    assert not dead.exists()


def test_a_link_whose_reply_nfs_lost_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def again(source: str, path: str) -> None:
        link(source, path)
        link(source, path)

    monkeypatch.setattr(os, "link", again)
    store = Store(str(tmp_path))
    assert store.create("x", b"1")
    assert not store.create("x", b"1")


def test_a_clock_that_is_an_hour_off_takes_no_living_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk stamps both files: this machine's clock is not asked."""
    path = tmp_path / f".x.{'0' * 8}-1-1-00000000.partial"
    path.write_bytes(b"x")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    Store(str(tmp_path)).sweep()
    assert path.exists()


@pytest.mark.parametrize("stamp", ["ETag", "mtime", "blob_id", "sha"])
def test_two_versions_of_one_size_have_two_marks(stamp: str) -> None:
    """Also where a store says neither when nor by what tag: the hub has `blob_id`, GitHub `sha`."""
    one, other = (mark("x", {"size": 3, stamp: version}) for version in ("first", "second"))
    assert one != other


def test_nothing_copies_or_counts_what_was_left(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    before = fingerprint(str(model))
    (model / OLD).write_bytes(b"x")
    kill_while_writing(model, "link", "create('model.safetensors', b'x')")
    assert fingerprint(str(model)) == before
    to = Store(str(tmp_path / "to"))
    upload(model, to)
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["config.json"]


def test_a_write_that_fails_at_its_last_step_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "given").write_bytes(b"x")
    store = Store(str(tmp_path / "run"))
    for step in ("link", "replace"):
        monkeypatch.setattr(os, step, full)
    for write in (store.create, store.write):
        with pytest.raises(OSError, match="refused to write"):
            write("x", b"x")
    with pytest.raises(OSError, match="refused to write"):
        store.copy_in(tmp_path / "given", "x")
    assert not list((tmp_path / "run").iterdir())


def test_what_cannot_be_removed_is_named_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / OLD).write_bytes(b"x")

    def refused(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "unlink", refused)
    Store(str(tmp_path)).sweep()
    assert f"{OLD} was left half-written and cannot be removed" in caplog.text
