"""What has a name is on the disk; a file that a power cut left empty or torn is said."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from cwpo_dist.canonical import parquet_bytes
from cwpo_dist.storage import MANIFEST, StorageError, Store


def test_what_has_a_name_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content before the name, the name's folder after it, and folders above as they are made."""
    done: list[tuple[str, str]] = []
    fsync, link, replace = os.fsync, os.link, os.replace

    def synced(opened: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{opened}"))
        done.append(("sync", "partial" if path.suffix == ".partial" else path.name))
        fsync(opened)

    def linked(source: str, to: str) -> None:
        done.append(("link", Path(to).name))
        link(source, to)

    def replaced(source: str, to: str) -> None:
        done.append(("replace", Path(to).name))
        replace(source, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    monkeypatch.setattr(os, "replace", replaced)
    root = tmp_path / "root"
    root.mkdir()
    store = Store(str(root))
    store.create("a/b/x", b"1")
    folders = [("sync", tmp_path.name), ("sync", "root"), ("sync", "a")]
    assert done == [*folders, ("sync", "partial"), ("link", "x"), ("sync", "b")]
    del done[:]
    store.write("a/b/x", b"2")
    assert done == [("sync", "partial"), ("replace", "x"), ("sync", "b")]
    del done[:]
    (tmp_path / "given").write_bytes(b"3")
    store.copy_in(tmp_path / "given", "a/y")
    assert done == [("sync", "partial"), ("replace", "y"), ("sync", "a")]


def test_a_folder_that_another_made_and_was_killed_is_on_the_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut takes it, and the file that was put there since, whose writer went on."""
    (tmp_path / "run" / "scores").mkdir(parents=True)
    synced: list[Path] = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
    )
    store = Store(str(tmp_path / "run"))
    store.create("scores/x", b"1")
    assert tmp_path / "run" in synced
    del synced[:]
    store.create("scores/y", b"1")
    assert tmp_path / "run" not in synced, "once is enough"


@pytest.mark.parametrize(("kept", "said"), [(0, "is empty"), (5, "is torn"), (-9, "is torn")])
def test_a_shard_that_a_power_cut_left_is_said(store: Store, kept: int, said: str) -> None:
    data = parquet_bytes(pa.table({"pair_id": ["a", "b"]}))
    store.create("scores/part-00000.parquet", data[:kept])

    def footer(name: str) -> None:
        with store.parquet(name):
            pass

    for ask in (store.read_table, lambda name: store.read_table(name, ["pair_id"]), footer):
        with pytest.raises(StorageError, match=rf"part-00000\.parquet' {said}.*remove it and, if"):
            ask("scores/part-00000.parquet")


def test_a_damaged_column_is_said(store: Store) -> None:
    data = bytearray(parquet_bytes(pa.table({"pair_id": [str(i) for i in range(1000)]})))
    data[100:200] = bytes(100)
    store.create("x.parquet", bytes(data))
    with pytest.raises(StorageError, match=r"x\.parquet' is torn"):
        store.read_table("x.parquet")


@pytest.mark.parametrize(("content", "said"), [(b"", "is empty"), (b'{"counts": {', "is torn")])
def test_a_file_that_a_power_cut_left_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    """By a version that did not wait for the disk, or on one that lies."""
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(
        StorageError, match=rf"manifest\.json' {said}.* remove it, then run the same"
    ):
        Store(str(tmp_path)).read_json(MANIFEST)
