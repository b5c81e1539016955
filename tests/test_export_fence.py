"""A writer that lost its lease while it exported, and goes on: what can be read is its follower's.

A follower of other code stands in for all that could mix: it exports other bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from exported_runs import Alone
from tiny import tiny_causal_lm, tiny_tokenizer

from cwpo_dist.storage import Store
from cwpo_dist.training import saving
from cwpo_dist.training.lease import Lease, LeaseLost, LeaseToken

Bytes = dict[str, bytes]


def export(token: LeaseToken, code: str, fence: saving.Fence | None = None) -> None:
    """All but the tokenizer depends on who exports."""
    model = tiny_causal_lm("llama", seed=len(code))
    model.config.code = model.generation_config.code = code
    saving.export_full(Alone(), model, tiny_tokenizer(), token.store, fence or token.check)


def read(store: Store) -> Bytes:
    return {name: store.read(name) for name in store.names("model")}


def followed(old: LeaseToken) -> Bytes:
    """Another takes over and exports; what it leaves."""
    export(old.for_new_group(1), "another")
    return read(old.store)


def writer(store: Store) -> LeaseToken:
    with Lease.acquire(store) as lease:
        return lease.token.for_new_group(1)


def before_file(number: int, then: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    """Something happens when an object store is asked to take this file, the first one being 0."""
    create_from, puts = Store.create_from, []

    def put(self: Store, path: Path, name: str) -> bool:
        puts.append(name)
        if len(puts) == number + 1:
            then()
        return create_from(self, path, name)

    patch.setattr(Store, "create_from", put)


def test_on_a_disk(tmp_path: Path) -> None:
    """It has asked whether it may, and is stopped before its folder gets its name."""
    left: Bytes = {}
    old = writer(Store(str(tmp_path / "run")))

    def asked() -> None:
        old.check()
        left.update(followed(old))

    with pytest.raises(LeaseLost):
        export(old, "old", asked)
    assert read(old.store) == left
    assert b"another" in left["model/config.json"]


@pytest.mark.parametrize("number", range(6))
def test_on_an_object_store(number: int, s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has asked whether it may, and is stopped before any of its six files."""
    left: Bytes = {}
    old = writer(s3_store)
    before_file(number, lambda: left.update(followed(old)), monkeypatch)
    # Its last file is the tokenizer's, of the same bytes: then nothing is amiss, and it ends well.
    with pytest.raises(LeaseLost) if number < 5 else nullcontext():
        export(old, "old")
    assert read(s3_store) == left
    assert len(left) == 6
    assert b"another" in left["model/config.json"]


def test_what_a_dead_writer_left_is_replaced(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    old = writer(s3_store)
    before_file(4, die, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        export(old, "old")
    assert b'"old"' in s3_store.read("model/config.json")
    left = followed(old)
    assert b'"another"' in left["model/config.json"]
    copied: list[str] = []
    monkeypatch.setattr(Store, "copy_in", lambda self, path, name: copied.append(name))
    assert followed(old) == left
    assert copied == [], "equal bytes stay"
