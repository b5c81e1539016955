"""A manifest: the same bytes as ever, and read whatever version wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cwpo_dist.manifest import Manifest
from cwpo_dist.storage import MANIFEST, FileMissing, StorageError, Store

RECORD: dict[str, Any] = {
    "stage": "fit",
    "key": "0123456789abcdef",
    "settings": {"seed": 0, "splits": ["labelled"]},
    "inputs": {"prepare": "prepare/89ab"},
    "counts": {"rows": 7, "last": {"loss": 0.5}, "column": None},
    "seconds": 1.25,
    "versions": {"torch": "2.13.0"},
    "device": "cpu x86_64",
    "device_hours": 0.001,
}


def test_it_is_written_as_it_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    Manifest(**RECORD).write(store)
    assert json.loads(store.read(MANIFEST)) == RECORD
    assert Manifest.read(store) == Manifest(**RECORD)
    store.create_json("manifest.retry-1.json", RECORD | {"seconds": 2.0})
    assert Manifest.read(store, "manifest.retry-1.json").seconds == 2.0


def test_what_another_version_lacks_or_adds_does_no_harm(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.create_json(MANIFEST, {"counts": {"rows": 1}, "of": "tomorrow"})
    found = Manifest.read(store)
    assert (found.counts, found.device_hours, found.versions) == ({"rows": 1}, None, {})


def test_an_output_that_is_not_finished_or_torn_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(FileMissing):
        Manifest.read(store)
    store.create(MANIFEST, b'{"counts": ')
    with pytest.raises(StorageError, match=MANIFEST):
        Manifest.read(store)
