"""A training's data in one file a node: made once, kept while it is read, and all as given."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import IDS, ROWS, WEIGHTS, Record, make_engine, make_run, make_task

from cwpo_dist import node_disk
from cwpo_dist.lm.batches import global_batch
from cwpo_dist.lm.rows import Row
from cwpo_dist.node_disk import shared_data
from cwpo_dist.pairs.records import TOKEN_SCHEMA, AnswerTokens, table_of
from cwpo_dist.scoring.answers_in import read_tokens
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.storage import FileMissing, Store
from cwpo_dist.training.loop import train
from cwpo_dist.training.micro_batches import micro_batches, parts_of
from cwpo_dist.training.tasks import Preference, TaskError
from cwpo_dist.training.token_file import Example, TokenFile, content, token_file

STOPPED = """
import os, signal, sys, tempfile
tempfile.tempdir = sys.argv[1]
from cwpo_dist.node_disk import shared_data

def make(folder):
    (folder / "x").write_text("who")
    print("at work", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    (folder / "x").write_text("whole")

shared_data("it", make)
"""
FIELDS = [("weight", "f8"), ("reference", "f8", (2,))]


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This node's, and what lies there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def staged(task: Preference, identity: object = "it", per_shard: int = 5) -> TokenFile:
    """A task's data as a file of several shards."""
    assert task.references is not None
    examples = [
        Example(name, row, (weight, reference))
        for name, row, weight, reference in zip(
            task.pair_ids, task.rows, task.weights, task.references, strict=True
        )
    ]

    def shards(left_out: Counter[str]) -> Iterator[list[Example]]:
        left_out["too long"] = 3
        yield []
        for start in range(0, len(examples), per_shard):
            yield examples[start : start + per_shard]

    return token_file(identity, 2, FIELDS, shards)


def mapped(task: Preference) -> Preference:
    """The same task over a file."""
    found = staged(task)
    given: dict[str, Any] = {field.name: getattr(task, field.name) for field in fields(task)}
    given |= {"rows": found.rows, "pair_ids": found.pair_ids}
    given |= {"weights": found.numbers("weight"), "references": found.numbers("reference")}
    return Preference(**given)


def as_lists(row: Row) -> Row:
    skipped = row.skipped if any(row.skipped) else ()
    return Row(list(row.prompt), tuple(list(answer) for answer in row.answers), skipped)


def folders(disk: Path) -> list[Path]:
    """The data that lie there."""
    return sorted(path for path in disk.glob("cwpo-stage-*/data/*") if path.is_dir())


def test_what_is_read_is_what_was_given() -> None:
    found = staged(make_task())
    assert [as_lists(row) for row in found.rows] == ROWS
    assert [as_lists(row) for row in found.rows[-3:]] == ROWS[-3:]
    assert list(found.pair_ids) == IDS
    assert found.numbers("weight").tolist() == WEIGHTS
    assert found.left_out == {"too long": 3}
    with pytest.raises(IndexError):
        found.rows[len(ROWS)]


def test_what_repeats_within_a_shard_is_stored_once(disk: Path) -> None:
    """All six pairs of four answers: the prompt once, each answer once."""
    answers = [[i] * (10 + i) for i in range(4)]
    rows = [Row([9] * 7, (answers[i], answers[j])) for j in range(4) for i in range(j)]
    task = Preference(rows, list("abcdef"), [1.0] * 6, [(-1.0, -2.0)] * 6, "sigmoid", 0.1)
    found = staged(task, per_shard=6)
    assert [as_lists(row) for row in found.rows] == rows
    (folder,) = folders(disk)
    assert (folder / "tokens").stat().st_size == 4 * (7 + 10 + 11 + 12 + 13)


def test_what_of_an_answer_is_its_prompts_comes_back_too() -> None:
    rows = [Row([1, 2], ([3, 4, 5], [6, 7]), (1, 0)), Row([1], ([2], [3, 4]), (0, 1))]
    found = staged(Preference(rows, ["a", "b"], [1.0] * 2, [(-1.0, -2.0)] * 2, "sigmoid", 0.1))
    assert [as_lists(row) for row in found.rows] == rows
    assert [row.n_scored for row in found.rows] == [(2, 2), (1, 1)]


@pytest.mark.parametrize("sampling", [None, "proportional"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_read_the_batches_that_lists_would_give_them(sampling, world_size) -> None:
    task = make_task("none" if sampling else "batch", sampling=sampling)
    from_file, run = mapped(task), make_run(130)
    for step in range(7):
        one, two = (global_batch(t.order, 8, run.seed, step)[1].tolist() for t in (task, from_file))
        assert one == two
        assert task.denominator(one) == from_file.denominator(one)
        for rank in range(world_size):
            parts = (parts_of(t, one, run.limits, world_size) for t in (task, from_file))
            both = (micro_batches(each, run.limits, rank, world_size, 2) for each in parts)
            for listed, read in zip(*both, strict=True):
                assert listed.positions == read.positions
                assert torch.equal(listed.batch.input_ids, read.batch.input_ids)
                assert torch.equal(listed.batch.target, read.batch.target)
                assert torch.equal(listed.batch.source, read.batch.source)


def test_a_training_from_a_file_has_the_losses_of_one_from_lists() -> None:
    told = []
    for task in (make_task("batch"), mapped(make_task("batch"))):
        hooks = Record()
        train(task, make_engine(), make_run(130), hooks)
        told.append([(r["loss"], r["grad_norm"], r["rewards/margins"]) for r in hooks.records])
    assert told[0] == told[1]


def test_one_of_a_nodes_ranks_makes_the_file_and_all_read_it(disk: Path) -> None:
    made: list[int] = []

    def shards(_: Counter[str]) -> Iterator[list[Example]]:
        made.append(1)
        yield [Example(IDS[0], ROWS[0])]

    with ThreadPoolExecutor(4) as ranks:
        found = list(ranks.map(lambda _: token_file("it", 2, [], shards), range(4)))
    assert made == [1]
    assert len(folders(disk)) == 1
    assert {tuple(each.rows[0].prompt) for each in found} == {tuple(ROWS[0].prompt)}


def test_data_stay_while_they_are_read_and_for_the_next_training_with_them(disk: Path) -> None:
    task = make_task()
    read, other = staged(task, "read"), staged(task, "other")
    first, second = folders(disk)
    assert {first, second} == set(folders(disk)), "both are read"
    del other
    again = staged(task, "other")
    assert len(folders(disk)) == 2, "nothing new was made"
    del again
    staged(task, "third")
    assert len(folders(disk)) == 2, "what nobody reads makes room"
    assert [as_lists(row) for row in read.rows] == ROWS


def test_a_maker_that_fails_leaves_nothing_and_the_next_one_makes_it(disk: Path) -> None:
    def fails(error: Exception) -> Callable[[Counter[str]], Iterator[list[Example]]]:
        def shards(_: Counter[str]) -> Iterator[list[Example]]:
            yield [Example(IDS[0], ROWS[0])]
            raise error

        return shards

    with pytest.raises(TaskError, match=r"no room for the token ids .* TMPDIR"):
        token_file("it", 2, [], fails(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(RuntimeError, match="broken"):
        token_file("it", 2, [], fails(RuntimeError("broken")))
    assert folders(disk) == []
    assert len(token_file("it", 2, [], lambda _: [[Example(IDS[0], ROWS[0])]]).rows) == 1


def test_no_pairs_are_refused_as_ever() -> None:
    found = token_file("none", 2, [("weight", "f8")], lambda _: [[]])
    with pytest.raises(TaskError, match="no pairs to train on"):
        Preference(found.rows, found.pair_ids, found.numbers("weight"), None, "simpo", 1.0)


def test_numbers_of_a_file_are_checked_as_those_of_lists() -> None:
    task = make_task()
    assert task.references is not None
    references = np.array(task.references)
    references[3, 1] = np.nan
    bad = staged(replace(task), "good").numbers("weight"), references
    with pytest.raises(TaskError, match=r"references: not finite for 1 pairs \(pair3\)"):
        replace(task, weights=bad[0], references=references)
    with pytest.raises(TaskError, match=r"weights: from -0\.9"):
        replace(task, weights=-np.array(WEIGHTS))


def test_tokens_of_a_stage_are_viewed_without_a_number_a_token(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "tokens"))
    rows = [
        AnswerTokens(name, row.prompt, row.answers[0]) for name, row in zip(IDS, ROWS, strict=True)
    ]
    store.create_table(part("tokens", 0), table_of(rows, TOKEN_SCHEMA))
    store.create_table(part("tokens", 1), TOKEN_SCHEMA.empty_table())
    for index in range(2):
        found = read_tokens(store, index)
        expected = {name: Row(prompt, (answer,)) for name, prompt, answer, _ in rows if not index}
        assert {name: as_lists(row) for name, row in found.items()} == expected
        assert all(isinstance(row.prompt, memoryview) for row in found.values())


def test_a_folder_that_is_written_anew_is_staged_anew(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "weigh"))
    with pytest.raises(FileMissing):
        content(store)
    store.write("preferences/part-00000.parquet", b"before")
    before = content(store)
    assert content(store) == before
    store.write("preferences/part-00000.parquet", b"and after")
    assert content(store) != before


def test_who_waits_for_one_that_was_stopped_makes_the_data_itself(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_disk, "STILL_S", 0.5)
    stopped = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(disk)], stdout=subprocess.PIPE, text=True
    )
    assert stopped.stdout is not None
    assert stopped.stdout.readline() == "at work\n"
    folder, in_use = shared_data("it", lambda folder: (folder / "x").write_text("whole"))
    assert (folder / "x").read_text() == "whole"
    stopped.send_signal(signal.SIGCONT)
    assert stopped.wait(20) == 0, "it ends as if nothing had been"
    assert (folder / "x").read_text() == "whole"
    in_use.close()
