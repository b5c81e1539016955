"""Copies of stores on a node's own disk: whole, of one version, and nobody else's."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import fsspec
import pytest

from cwpo_dist import node_disk
from cwpo_dist.node_disk import staged
from cwpo_dist.storage import StorageError, Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A model of two files on no local disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    there = Store(f"memory://{tmp_path.name}/model")
    for name in ("a.json", "b.json"):
        there.write(name, b"first")
    return there


def test_a_folder_in_which_others_can_write_is_not_used(store: Store, tmp_path: Path) -> None:
    """Whoever makes it first could put another model in the place of this one."""
    (tmp_path / f"cwpo-stage-{os.getuid()}").mkdir()
    (tmp_path / f"cwpo-stage-{os.getuid()}").chmod(0o777)
    with pytest.raises(StorageError, match=r"others can write in this folder.*TMPDIR"):
        staged(store)
    (tmp_path / f"cwpo-stage-{os.getuid()}").chmod(0o700)
    assert (staged(store) / "a.json").read_bytes() == b"first"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_nor_is_the_folder_of_another_user(store: Store, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    os.chown(elsewhere, 12345, 12345)
    (tmp_path / f"cwpo-stage-{os.getuid()}").symlink_to(elsewhere)
    with pytest.raises(StorageError, match="others can write in this folder"):
        staged(store)


def test_what_changes_while_it_is_copied_is_not_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first file would be of one version and its last of another, for all later commands."""
    fetch = Store.fetch

    def slow(self: Store, name: str, path: Path) -> None:
        fetch(self, name, path)
        self.write("b.json", b"the second version")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "fetch", slow)
        with pytest.raises(StorageError, match="changed while it was copied"):
            staged(store)
    fsspec.filesystem("memory").pipe_file(store.path("b.json"), b"first")
    assert {path.read_bytes() for path in staged(store).iterdir()} == {b"first"}
    assert not list(node_disk._cache().glob("*.partial"))
