"""The pairs by which a training is followed: the same sample as ever, of the first files alone."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any

import pytest
from prepared import config, pairs, row, write
from world import World

from cwpo_dist.runs.held_out_pairs import HeldOutPairs
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages import align, sft
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store
from cwpo_dist.training.tasks import TaskError

FEW = 5


@pytest.mark.usefixtures("in_process")
def test_no_file_is_read_behind_the_last_of_them(tmp_path: Path) -> None:
    rows = [row(i) for i in range(120)]
    given = config(
        write(tmp_path / "x.jsonl", rows), rows_per_shard=10, validation_fraction=0.3,
        test_fraction=0.1,
    )  # fmt: skip
    store = Store(tmp_path / "out")
    shards = prepare(store, given, seed=0)["shards"]
    labelled = {
        pair["pair_id"]: pair["label"] for pair in pairs(store) if pair["split"] == "validation"
    }
    few = dict(heapq.nsmallest(FEW, labelled.items()))
    found = HeldOutPairs(store, shards, "validation", FEW).labels
    assert {name: label for labels in found.values() for name, label in labels.items()} == few
    assert max(found) < shards - 1, "or this shows nothing"
    for index in range(max(found) + 1, shards):
        store.remove(part("pairs", index))
    assert HeldOutPairs(store, shards, "validation", FEW).labels == found


@pytest.mark.usefixtures("in_process")
def test_they_are_of_as_many_prompts_as_there_are(tmp_path: Path) -> None:
    """All pairs of a prompt lie side by side: the first five would be of one prompt."""
    rows = [row(i, chosen=f"yes {k}") for i in range(9) for k in range(12)]
    given = config(write(tmp_path / "x.jsonl", rows), rows_per_shard=20, validation_fraction=1.0,
        test_fraction=0.0, labelled_fraction=0.5)  # fmt: skip
    store = Store(tmp_path / "out")
    shards = prepare(store, given, seed=0)["shards"]
    prompts = {pair["pair_id"]: pair["prompt"] for pair in pairs(store)}
    for most, distinct in ((5, 5), (9, 9), (30, 9)):
        labels = HeldOutPairs(store, shards, "validation", most).labels
        found = [prompts[pair_id] for of_shard in labels.values() for pair_id in of_shard]
        assert (len(found), len(set(found))) == (most, distinct)


def test_a_split_without_labels_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path, ["human"])
    with pytest.raises(TaskError, match="no pair of split 'validation' has a human label"):
        _ = HeldOutPairs(world.place("prepare"), 1, "validation", FEW).labels


@pytest.mark.parametrize("stage", [sft, align])
def test_tokens_and_log_probs_of_other_files_are_not_read(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, ["human"])
    world.tokenise()
    world.log_probs("reference", None, len)
    specs: list[Any] = []
    monkeypatch.setattr(stage, "train", lambda spec: specs.append(spec) or {})
    role = stage.__name__.rpartition(".")[2]
    stage.make(world.context, world.node(role))
    world.place("tokens").remove(part("tokens", 0))
    world.place("reference").remove(part("reference", 0))
    held_out = specs[0].make_held_out(world.encoder)
    assert list(held_out.pair_ids) == [f"validation-{k}" for k in range(3)]
