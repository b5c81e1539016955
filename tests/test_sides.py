"""Where `prepare` puts each pair, and what it does to its label: reckoned anew, pair by pair.

Groups, sources of one side, shares, flipped labels and the seed, all in one run of the stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prepared import Rows, pairs, write

from cwpo_dist.config.load import parse_config
from cwpo_dist.graph import prepare_node
from cwpo_dist.pairs.records import unit_hash
from cwpo_dist.runs.context import Context
from cwpo_dist.stages import prepare
from cwpo_dist.storage import MANIFEST, Store

SEED = 3
SHARES = {"test_fraction": 0.15, "validation_fraction": 0.25, "labelled_fraction": 0.4}
FLIPPED = 0.2


@pytest.fixture
def prepared(tmp_path: Path, in_process: None) -> Rows:
    """Three sources: one drawn by topic, and one each for `validation` and `test` as a whole."""
    drawn = [
        {"prompt": f"prompt {i}", "chosen": f"won {i}", "rejected": f"lost {i}", "topic": i // 3}
        for i in range(600)
    ]
    sources: list[dict[str, Any]] = [{"path": write(tmp_path / "drawn.jsonl", drawn)}]
    for side in ("validation", "test"):
        rows = [{"prompt": f"{side} {i}", "chosen": "won", "rejected": "lost"} for i in range(40)]
        sources.append({"path": write(tmp_path / f"{side}.jsonl", rows), "into": side})
    config = parse_config(
        {
            "output_dir": str(tmp_path / "run"),
            "seed": SEED,
            "prepare": {"sources": sources, "group_column": "topic", "flipped_labels": FLIPPED}
            | SHARES,
        }
    )
    context, node = Context(Store(config.output_dir)), prepare_node(config)
    counts = prepare.make(context, node)
    context.place(node).create_json(MANIFEST, {"counts": counts})
    return pairs(context.place(node))


def split_of(topic: int) -> str:
    draw = unit_hash(SEED, "side", str(topic))
    if draw < SHARES["test_fraction"]:
        return "test"
    if draw < SHARES["test_fraction"] + SHARES["validation_fraction"]:
        return "validation"
    labelled = unit_hash(SEED, "labelled", str(topic)) < SHARES["labelled_fraction"]
    return "labelled" if labelled else "unlabelled"


def test_every_pair_lies_where_its_group_source_and_the_seed_say(prepared: Rows) -> None:
    assert len(prepared) == 680
    splits = {"labelled": 0, "unlabelled": 0, "validation": 0, "test": 0}
    for pair in prepared:
        kind, number = pair["prompt"].split()
        expected = split_of(int(number) // 3) if kind == "prompt" else kind
        assert pair["split"] == expected, pair["prompt"]
        splits[expected] += 1
    assert min(splits.values()) > 60


def test_labels_are_turned_round_by_the_seed_and_in_training_alone(prepared: Rows) -> None:
    turned = []
    for pair in prepared:
        is_training = pair["split"] in ("labelled", "unlabelled")
        flips = is_training and unit_hash(SEED, "flipped", pair["pair_id"]) < FLIPPED
        assert pair[f"response_{pair['label']}"].startswith("lost" if flips else "won")
        turned.append(flips)
    assert 40 < sum(turned) < 100


def test_places_are_drawn_by_the_seed(prepared: Rows) -> None:
    for pair in prepared:
        first, second = sorted((pair["response_a"], pair["response_b"]))
        swapped = unit_hash(SEED, "order", pair["pair_id"]) < 0.5
        assert pair["response_a"] == (second if swapped else first)


@pytest.mark.usefixtures("in_process")
def test_copies_of_a_pair_are_one_with_the_votes_of_all_and_no_label_in_doubt(
    tmp_path: Path,
) -> None:
    def row(i: int, won: str, votes: tuple[int, int]) -> dict[str, Any]:
        lost = "no" if won == "yes" else "yes"
        told = {"votes_a": votes[0], "votes_b": votes[1]}
        return {"prompt": f"p{i}", "chosen": won, "rejected": lost, **told}

    rows = [
        row(0, "yes", (5, 1)),
        row(1, "no", (4, 0)),
        row(0, "yes", (2, 1)),
        row(1, "yes", (3, 2)),
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    config = parse_config(
        {"output_dir": "unused", "prepare": {"sources": [{"path": path}], "labelled_fraction": 1.0}}
    )
    store = Store(str(tmp_path / "out"))
    counts = prepare.prepare(store, config.prepare, SEED)
    assert (counts["merged_duplicates"], counts["conflicting_labels"]) == (2, 1)
    told = {pair["prompt"]: pair for pair in pairs(store)}
    sides = {p: {told[p][f"response_{s}"]: s for s in "ab"} for p in told}
    votes = {p: {text: told[p][f"votes_{side}"] for text, side in sides[p].items()} for p in told}
    assert votes == {"p0": {"yes": 7, "no": 2}, "p1": {"yes": 3, "no": 6}}
    assert told["p0"]["label"] == sides["p0"]["yes"]
    assert told["p1"]["label"] is None
    assert told["p1"]["split"] != "labelled"
