"""A hundred random blows leave what a run without any leaves; and what is planted is found."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from history import Did, load, violations
from recorded import Log, synced
from small_recipe import configured, nodes, write_inputs
from strikes import cut_power, unsynced
from test_checkpoint import save
from tiny import tiny_causal_lm, tiny_tokenizer

from cwpo_dist.execution import run
from cwpo_dist.runs.context import Context
from cwpo_dist.storage import MANIFEST, Store
from cwpo_dist.training import saving

PROGRAM = [sys.executable, str(Path(__file__).parent / "blows.py")]
MODEL = "align/key/model/config.json"
STAGE, COMMIT = "align/key", "align/key/checkpoints/step-000001-a/commit.json"


def strike(*options: str) -> subprocess.CompletedProcess[str]:
    """Some blows, in a process that Ray and pytest have no threads in."""
    return subprocess.run([*PROGRAM, *options], capture_output=True, text=True, check=False)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("blows", "seed"),
    [(100, 469), pytest.param(300, 1, marks=pytest.mark.long)],  # of few, 469 draws each kind
)
def test_blows_leave_what_a_run_without_any_leaves(tmp_path: Path, blows: int, seed: int) -> None:
    """Each kind of blow, on a disk and on S3; every operation is explained."""
    count = ["--blows", str(blows), "--lanes", "1", "--seed", str(seed)]
    ended = strike(*count, "--folder", str(tmp_path / "x"))
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    told = re.search(r"(\d+) blows in (\d+) runs, 0 of them wrong; (\d+) operations", ended.stdout)
    assert told is not None, ended.stdout
    assert int(told[1]) >= 0.8 * blows, "some are meant for steps that a driver never comes to"
    assert int(told[3]) > 100 * blows
    kinds = set(re.findall(r"^\| ([a-z ]+) \| (\w+) \|", ended.stdout, re.MULTILINE))
    assert {kind for kind, place in kinds if place == "disk"} == {
        *("kill", "kill two", "kill one of two", "stop", "power", "full", "refuse", "clock")
    }
    assert "s3" in {place for _, place in kinds}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("plant", "kind", "said"),
    [
        ("overwriting-create", "kill", "two created it"),
        pytest.param(
            *("never-refused", "stop", "may commit though driver"), marks=pytest.mark.long
        ),
    ],
)
def test_a_fault_that_is_planted_in_the_code_is_found(
    tmp_path: Path, plant: str, kind: str, said: str
) -> None:
    given = ["--blows", "8", "--seed", "1", "--lanes", "1", "--s3", "0", "--kinds", kind]
    done = strike(*given, "--plant", plant, "--folder", str(tmp_path / "x"))
    assert done.returncode == 1, done.stdout + done.stderr[-2000:]
    assert said in done.stdout


def honest() -> list[Did]:
    """Two drivers: the first creates, commits and is followed; the second reads, and trains."""
    return [
        Did("a", "create", "scores/1", 1, 2, "won", "x"),
        Did("b", "create", "scores/1", 1.5, 3, "lost", "x"),
        Did("b", "read", "scores/1", 3, 4, "here", "x"),
        Did("b", "names", "scores", 4, 5, "here", seen=frozenset({"scores/1"})),
        Did("a", "acquire", STAGE, 5, 6, "done", epoch=1),
        Did("a", "write", "align/key/lease/000001.beat", 6.1, 6.2, "done", "1"),
        Did("b", "read", "align/key/lease/000001.beat", 6.3, 6.4, "here", "1"),
        Did("a", "check", STAGE, 7, 8, "done", epoch=1),
        Did("a", "create", COMMIT, 9, 10, "won", "c"),
        Did("b", "acquire", STAGE, 11, 12, "done", epoch=2),
        Did("a", "check", STAGE, 13, 14, "failed", epoch=1),
        Did("b", "check", STAGE, 15, 16, "done", epoch=2),
        Did("b", "export", "align/key/model", 17, 18, "done"),
        Did("b", "names", "align/key/model", 19, 20, "here", seen=frozenset({MODEL})),
        Did("b", "remove", "scores", 21, 22, "done"),
        Did("b", "exists", "scores/1", 23, 24, "missing"),
        Did("b", "create", "scores/1", 25, 26, "won", "y"),
        Did("b", "read", "scores/1", 27, 28, "here", "y"),
    ]


def tampered(old: Did, *new: Did) -> list[str]:
    """What is found where the honest history has others in the place of one operation."""
    history = honest()
    place = history.index(old)
    history[place : place + 1] = new
    return violations(history)


def test_an_honest_history_is_explained() -> None:
    assert violations(honest()) == []


def test_each_tampered_history_is_refused() -> None:
    h = {(did.who, did.op, did.begin): did for did in honest()}
    lost, read = h["b", "create", 1.5], h["b", "read", 3]
    beat, commit = h["b", "read", 6.3], h["a", "create", 9]
    refused, asked = h["a", "check", 13], h["b", "check", 15]
    for old, new, said in (
        (lost, [replace(lost, outcome="won")], "two created it"),
        (read, [replace(read, digest="z")], "bytes that nobody put there"),
        (lost, [replace(lost, digest="z"), replace(read, begin=4, digest="z")], "not the winner's"),
        (read, [replace(read, begin=0.1, end=0.2)], "before anybody began to put it there"),
        (read, [replace(read, outcome="missing", digest="")], "missing after it was there"),
        (read, [Did("b", "names", "scores", 3, 4, "here")], "missing after it was there"),
        (beat, [replace(beat, digest="2")], "bytes that nobody put there"),
        (beat, [Did("a", "write", beat.name, 6.21, 6.22, "done", "2"), beat], "had been replaced"),
        (refused, [replace(refused, outcome="done")], "may commit though b holds the lease"),
        (h["a", "check", 7], [], "committed without asking"),
        (h["a", "acquire", 5], [], "committed without the lease"),
        (
            refused,
            [replace(refused, outcome="done"), replace(commit, begin=14.1, end=14.2)],
            "whom b had followed",
        ),
        (
            asked,
            [
                Did("b", "cut", "", 15, 16, "done"),
                asked,
                replace(read, begin=16.1, end=16.2, outcome="missing"),
            ],
            "missing after it was there",
        ),
    ):
        found = tampered(old, *new)
        assert any(said in line for line in found), (said, found)


def test_a_power_cut_may_take_what_was_still_being_put_there() -> None:
    create = Did("a", "create", "x", 1, 2)
    history = [Did("b", "exists", "x", 1.5, 1.6, "here"), Did("b", "exists", "x", 5, 6, "missing")]
    cut = Did("the machine", "cut", "", 3, 4, "done")
    assert violations([create, cut, *history]) == []
    assert len(violations([create, *history])) == 1
    assert len(violations([replace(create, outcome="won"), cut, *history])) == 1


def test_a_log_is_read_back(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", "a")
    number = log.began(op="create", name="x", digest="d")
    log.began(op="names", name="")
    log.ended(number, outcome="won")
    Log(tmp_path / "log", "the machine").line(gone="a")
    first, second = load(tmp_path / "log")
    assert (first.op, first.outcome, first.digest) == ("create", "won", "d")
    assert (second.op, second.outcome) == ("names", "cut short")
    assert first.end < second.end < float("inf"), "when its process ended"


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A folder, and a log of what is brought to the disk there."""
    log = tmp_path / "log"
    monkeypatch.setattr(os, "fsync", synced(Log(log, "a"), os.fsync))
    (tmp_path / "run").mkdir()
    return SimpleNamespace(root=tmp_path / "run", store=Store(str(tmp_path / "run")), log=log)


def test_a_committed_checkpoint_survives_a_power_cut(disk: SimpleNamespace) -> None:
    """With the folders that it lies in."""
    save(disk.store.child("align", "key"), 3)
    assert unsynced(disk.root, disk.log) == ([], [])


def test_an_exported_model_is_on_the_disk_when_the_export_ends(disk: SimpleNamespace) -> None:
    """Its manifest is written next, and would stand for nothing after a power cut."""
    alone = SimpleNamespace(rank=0, gathered=lambda _: nullcontext())
    saving.export_full(alone, tiny_causal_lm("llama"), tiny_tokenizer(), disk.store, lambda: None)
    assert (disk.root / "model" / "model.safetensors").exists()
    assert unsynced(disk.root, disk.log) == ([], [])


def test_what_a_killed_writer_named_is_settled_before_a_manifest(disk: SimpleNamespace) -> None:
    """Killed after it made the name, or the folder, and before it brought that to the disk."""
    (disk.root / "scores").mkdir()
    disk.store.create("b", b"2")
    os.link(disk.root / "b", disk.root / "scores" / "part-00000.parquet")
    assert len(unsynced(disk.root, disk.log)[0]) == 1
    disk.store.settle()
    assert unsynced(disk.root, disk.log) == ([], [])


def test_what_a_slower_driver_left_beside_committed_pairs_goes(tmp_path: Path) -> None:
    """It was killed while it still wrote there, and the first one had committed."""
    write_inputs(tmp_path / "inputs")
    config = configured(tmp_path / "inputs", str(tmp_path / "run"))
    context, node = Context(Store(config.output_dir)), nodes(config)["prepare"]
    context.place(node).create_json(MANIFEST, {})
    context.place(node).create("work/buckets/00001.json", b"{}")
    assert context.done(node)
    assert len(context.place(node).names()) == 2, "a question changes nothing"
    run.execute(context, node)
    assert context.place(node).names() == [MANIFEST]


def test_a_power_cut_takes_what_was_not_synced_and_nothing_else(disk: SimpleNamespace) -> None:
    disk.store.create("kept", b"12345678")
    for number in range(20):
        (disk.root / f"name-{number}").write_bytes(b"12345678")
    lost = cut_power(disk.root, disk.log, random.Random(0))
    left = list(disk.root.iterdir())
    assert disk.store.read("kept") == b"12345678"
    assert lost == {"names": 21 - len(left), "torn": 20}
    assert 5 < len(left) < 16
    assert {path.stat().st_size for path in left} == {0, 4, 8}
