"""The whole stage: every row is a pair, a merged duplicate or a reject, in the right place."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from prepared import Rows, add_up, config, files, pairs, rejects, row, write

from cwpo_dist.config import ConfigError
from cwpo_dist.pairs import pieces, sources
from cwpo_dist.pairs.readers import SourceError
from cwpo_dist.pairs.stored import pair_schema, read_whole, whole_schema
from cwpo_dist.placement import Machine
from cwpo_dist.stages import prepare as stage
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import Store

UKP_VOTES = {"votes_a": "votes_chosen", "votes_b": "votes_rejected"}


@pytest.mark.usefixtures("ray_local")
def test_hh_harmless(cwpo_data: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    counts = prepare(store, config(str(cwpo_data / "hh_harmless.jsonl.gz")), seed=0)
    add_up(counts, store)
    assert counts["rows_in"] == 2312
    assert counts["pairs"] == 2303
    assert counts["rejects"] == {"differing prefixes": 5, "empty answer: chosen": 4}
    assert counts["kind"] == "conversational"
    written = pairs(store)
    assert abs(sum(row["label"] == "a" for row in written) / 2303 - 0.5) < 4 * 0.5 / 2303**0.5
    assert all(row["prompt"][0]["role"] == "user" for row in written)
    share = counts["splits"]["labelled"] / (2303 - counts["splits"]["test"])
    assert abs(share - 0.3) < 0.04


@pytest.mark.usefixtures("ray_local")
def test_ukp_split_by_topic(cwpo_data: Path, tmp_path: Path) -> None:
    source = {"path": str(cwpo_data / "ukp_convincing.jsonl.gz"), "columns": UKP_VOTES}
    store = Store(str(tmp_path))
    given_config = config(
        source, group_column="topic", keep_columns=["topic"], validation_fraction=0.2
    )
    counts = prepare(store, given_config, seed=1)
    add_up(counts, store)
    assert (counts["rows_in"], counts["pairs"]) == (11650, 11443)
    assert (counts["merged_duplicates"], counts["conflicting_labels"]) == (207, 11)
    assert counts["rejects"] == {}
    written = pairs(store)
    assert sum(row["label"] is None for row in written) == 11
    sides: dict[str, set[str]] = {}
    for each in written:
        side = each["split"] if each["split"] in ("validation", "test") else "train"
        sides.setdefault(each["topic"], set()).add(side)
    assert len(sides) == 32
    assert all(len(side) == 1 for side in sides.values())
    with gzip.open(source["path"]) as raw:
        assert {key_of(row): outcome(row) for row in written} == merged_by_hand(
            map(json.loads, raw)
        )


def key_of(row: dict[str, Any]) -> tuple[str, frozenset[str]]:
    return row["prompt"], frozenset((row["response_a"], row["response_b"]))


def outcome(row: dict[str, Any]) -> tuple[str | None, dict[str, int | None]]:
    """The winning answer and the votes of each answer, without a and b."""
    winner = row["label"] and row[f"response_{row['label']}"]
    return winner, {row[f"response_{x}"]: row[f"votes_{x}"] for x in "ab"}


def merged_by_hand(raws: Iterable[dict[str, Any]]) -> dict[Any, Any]:
    winners: dict[Any, set[str]] = defaultdict(set)
    votes: dict[Any, dict[str, int | None]] = defaultdict(dict)
    for raw in raws:
        key = raw["prompt"], frozenset((raw["chosen"], raw["rejected"]))
        winners[key].add(raw["chosen"])
        for answer in ("chosen", "rejected"):
            count, before = raw[f"votes_{answer}"], votes[key].get(raw[answer])
            votes[key][raw[answer]] = before if count is None else count + (before or 0)
    return {
        key: (next(iter(names)) if len(names) == 1 else None, votes[key])
        for key, names in winners.items()
    }


@pytest.mark.usefixtures("ray_local", "many_files")
def test_sources_and_output_on_s3(s3_store: Store, tmp_path: Path) -> None:
    inputs = s3_store.child("inputs")
    lines = [json.dumps(row(i, chosen=f"yes {i}")) for i in range(60)]
    inputs.create("a.jsonl.gz", gzip.compress("\n".join([*lines[:30], "{broken"]).encode()))
    table = pa.Table.from_pylist([json.loads(line) for line in lines[20:]])
    inputs.create_table("b.parquet", table)
    store = s3_store.child("prepare", "key")
    given_config = config(inputs.uri + "/*", rows_per_shard=8)
    counts = prepare(store, given_config, seed=0)
    add_up(counts, store)
    assert (counts["rows_in"], counts["pairs"], counts["merged_duplicates"]) == (71, 60, 10)
    assert counts["rejects"] == {"malformed line": 1}
    (bad,) = rejects(store)
    assert bad["source"].startswith("s3://")
    assert bad["source"].endswith("a.jsonl.gz")
    assert (bad["position"], bad["row"]) == (31, "{broken")
    shutil.rmtree(tmp_path / "local", ignore_errors=True)
    local = Store(str(tmp_path / "local"))
    prepare(local, given_config, seed=0)
    assert files(local) == files(store)


@pytest.mark.usefixtures("ray_local")
def test_what_is_wrong_with_a_source_is_said_without_rays_wrapping(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"))
    rows = b"".join(json.dumps(row(os.urandom(30).hex())).encode() + b"\n" for _ in range(3000))
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(rows)[:-9])
    with pytest.raises(
        SourceError, match=r"1 of 1 files are damaged[^|]*torn\.jsonl\.gz cannot be"
    ):
        prepare(store, config(str(tmp_path / "torn.jsonl.gz")), seed=0)
    path = write(tmp_path / "x.jsonl", [row(0)])
    with pytest.raises(
        ConfigError, match=r"prepare\.num_cpus: 99, but the largest node of .* has 4"
    ):
        prepare(store, config(path, num_cpus=99), seed=0)


def test_where_nodes_come_on_demand_none_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "alive_machines", lambda: [Machine(4.0, 0.0)])
    with pytest.raises(ConfigError, match=r"prepare\.num_cpus: 99"):
        stage._check_placement(99)
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --no-monitor")
    stage._check_placement(99)


@pytest.mark.usefixtures("in_process", "many_files")
def test_shards_are_full_numbered_and_sorted(tmp_path: Path) -> None:
    # Two thirds are duplicates, so that buckets shrink by whole shards.
    rows = [row(i // 3 if i % 3 else f"{i} alone") for i in range(300)]
    store = Store(str(tmp_path / "out"))
    counts = prepare(store, config(write(tmp_path / "x.jsonl", rows), rows_per_shard=4), seed=0)
    add_up(counts, store)
    assert counts["shards"] > 20
    written = pairs(store)
    assert [row["pair_id"] for row in written] == sorted(row["pair_id"] for row in written)
    sizes = [
        store.read_table(f"pairs/part-{i:05d}.parquet").num_rows for i in range(counts["shards"])
    ]
    assert set(sizes) <= {1, 2, 3, 4}
    n_buckets = sources.plan(config(str(tmp_path / "x.jsonl"))).n_buckets
    assert sum(size < 4 for size in sizes) <= n_buckets
    assert "work" not in {name.split("/")[0] for name in store.names()}


@pytest.mark.usefixtures("in_process")
def test_the_pairs_do_not_depend_on_how_the_work_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(i % 90, chosen=f"yes {i % 100}", mark=i) for i in range(200)]
    whole = config(write(tmp_path / "x.jsonl", rows), keep_columns=["mark"])
    prepare(Store(str(tmp_path / "whole")), whole, seed=0)
    write(tmp_path / "y1.jsonl", rows[:70])
    write(tmp_path / "y2.jsonl", rows[70:])
    monkeypatch.setattr(sources, "BUCKET_BYTES", 500)
    monkeypatch.setattr(pieces, "CHUNK_ROWS", 7)
    cut = config(str(tmp_path / "y*.jsonl"), keep_columns=["mark"], rows_per_shard=3)
    prepare(Store(str(tmp_path / "cut")), cut, seed=0)

    def content(name: str) -> Rows:
        return [row | {"source": None} for row in pairs(Store(str(tmp_path / name)))]

    assert content("whole") == content("cut")


@pytest.mark.usefixtures("in_process", "many_files")
def test_prompts_and_answers_are_counted_once_a_split(tmp_path: Path) -> None:
    """Six prompts with four answers each, in all pairs; of each prompt one pair has no label."""
    texts = ("yes", "no", "maybe", "never")
    rows = [
        {"prompt": f"p{i}", "response_a": a, "response_b": b, "label": label}
        for i in range(6)
        for (a, b), label in zip(combinations(texts, 2), [None, *"ababa"], strict=True)
    ]
    given = config(write(tmp_path / "x.jsonl", rows), labelled_fraction=1.0, test_fraction=0)
    store = Store(str(tmp_path / "out"))
    counts = prepare(store, given, seed=0)
    add_up(counts, store)
    none = dict.fromkeys(("validation", "test"), 0)
    assert counts["splits"] == {"labelled": 30, "unlabelled": 6} | none
    assert counts["prompts"] == {"labelled": 6, "unlabelled": 6} | none
    assert counts["answers"] == {"labelled": 24, "unlabelled": 12} | none


@pytest.mark.usefixtures("in_process")
def test_a_seed_moves_order_and_splits_but_no_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [row(i) for i in range(200)])
    for seed in (0, 1):
        prepare(Store(str(tmp_path / str(seed))), config(path, validation_fraction=0.2), seed)
    zero, one = (pairs(Store(str(tmp_path / str(seed)))) for seed in (0, 1))
    assert [row["pair_id"] for row in zero] == [row["pair_id"] for row in one]
    assert [row["label"] for row in zero] != [row["label"] for row in one]
    for split in ("labelled", "validation", "test"):  # each of its own draw
        ours, theirs = ({r["pair_id"] for r in rows if r["split"] == split} for rows in (zero, one))
        assert ours != theirs


@pytest.mark.usefixtures("in_process")
def test_tomorrows_rows_move_none_of_yesterdays(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [row(i) for i in range(100)])
    more = write(tmp_path / "b.jsonl", [row(i) for i in range(100, 300)])
    prepare(Store(str(tmp_path / "yesterday")), config(first), seed=0)
    prepare(Store(str(tmp_path / "today")), config(first, more), seed=0)
    today = {row["pair_id"]: row for row in pairs(Store(str(tmp_path / "today")))}
    yesterday = pairs(Store(str(tmp_path / "yesterday")))
    assert len(today) == 300
    assert [today[row["pair_id"]] for row in yesterday] == yesterday


@pytest.mark.usefixtures("in_process")
def test_labels_are_never_made_up(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{i}", "response_a": "x", "response_b": "y", "label": [None, "a", "b"][i % 3]}
        for i in range(300)
    ]
    store = Store(str(tmp_path / "out"))
    path = write(tmp_path / "x.jsonl", rows)
    counts = prepare(store, config(path, labelled_fraction=1.0), seed=0)
    add_up(counts, store)
    assert counts["labelled"]["unlabelled"] == 0
    assert counts["labelled"]["labelled"] == counts["splits"]["labelled"]
    for each in pairs(store):
        raw = rows[int(each["prompt"][1:])]
        wanted = raw["label"] and raw[f"response_{raw['label']}"]
        assert (each["label"] and each[f"response_{each['label']}"]) == wanted


@pytest.mark.usefixtures("in_process")
def test_mixed_sources_are_conversations(tmp_path: Path) -> None:
    text = write(tmp_path / "text.jsonl", [row(0)])
    turn = "\n\nHuman: hi\n\nAssistant: "
    hh = write(tmp_path / "hh.jsonl", [{"chosen": turn + "yes", "rejected": turn + "no"}])
    store = Store(str(tmp_path / "out"))
    counts = prepare(store, config(text, hh), seed=0)
    assert counts["kind"] == "conversational"
    assert counts["formats"] == {text: "text", hh: "hh"}
    table = read_whole(store, 0)
    assert table.schema == whole_schema("conversational")
    prompts = {row["prompt"][0]["content"]: row for row in table.to_pylist()}
    assert prompts.keys() == {"prompt 0", "hi"}
    said = {"role": "user", "content": "prompt 0", "extra": None}
    assert prompts["prompt 0"]["prompt"] == [said]


@pytest.mark.usefixtures("in_process")
def test_kept_columns_have_one_type_over_all_shards(tmp_path: Path) -> None:
    rows = [row(i, n=i, x=i if i % 2 else i / 2, tags=[i]) for i in range(20)]
    rows += [row(20)]
    store = Store(str(tmp_path / "out"))
    given_config = config(
        write(tmp_path / "x.jsonl", rows), keep_columns=["n", "x", "tags"], rows_per_shard=4
    )
    counts = prepare(store, given_config, seed=0)
    assert counts["keep_columns"] == {"n": "int", "x": "float", "tags": "json"}
    expected = pair_schema(
        pa.schema([("n", pa.int64()), ("x", pa.float64()), ("tags", pa.string())])
    )
    for index in range(counts["shards"]):
        assert store.read_table(f"pairs/part-{index:05d}.parquet").schema == expected
    for each in pairs(store):
        raw = rows[int(each["prompt"].split()[1])]
        tags = each["tags"] and json.loads(each["tags"])
        assert (each["n"], each["x"], tags) == (raw.get("n"), raw.get("x"), raw.get("tags"))


@pytest.mark.usefixtures("in_process", "many_files")
def test_no_prompt_is_on_two_sides_and_leaks_are_set_aside(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [row(i, rejected=f"no {i % 7}") for i in range(60)])
    test = write(tmp_path / "test.jsonl", [row(i) for i in range(40, 70)])
    validation = write(tmp_path / "validation.jsonl", [row(i) for i in (*range(5), 69)])
    store = Store(str(tmp_path / "out"))
    given_config = config(
        {"path": train, "into": "train"},
        {"path": test, "into": "test"},
        {"path": validation, "into": "validation"},
        max_reject_fraction=0.5,
        rows_per_shard=2,
    )
    counts = prepare(store, given_config, seed=0)
    add_up(counts, store)
    assert counts["rejects"] == {"prompt also in test": 21, "prompt also in validation": 5}
    found = rejects(store)
    assert sum(each["source"] == train for each in found) == 25
    (of_validation,) = [each for each in found if each["source"] == validation]
    assert of_validation["reason"] == "prompt also in test"
    assert of_validation["position"] == 6
    assert json.loads(of_validation["row"])["prompt"] == "prompt 69"
    assert counts["splits"]["test"] == 30
    assert counts["splits"]["validation"] == 5


@pytest.mark.usefixtures("in_process")
def test_groups_that_share_a_prompt_leak_and_are_set_aside(tmp_path: Path) -> None:
    # Every topic asks the same question: whatever the sides, one of them keeps it.
    rows = [
        {"prompt": "same", "chosen": f"yes {i}", "rejected": "no", "topic": i % 50}
        for i in range(200)
    ]
    store = Store(str(tmp_path / "out"))
    path = write(tmp_path / "x.jsonl", rows)
    given_config = config(path, group_column="topic", test_fraction=0.3, max_reject_fraction=1.0)
    counts = prepare(store, given_config, seed=0)
    add_up(counts, store)
    assert counts["splits"]["test"] == counts["pairs"] > 0
    assert counts["rejects"]["prompt also in test"] == 200 - counts["pairs"]


@pytest.mark.usefixtures("in_process")
def test_a_topic_stays_on_one_side_however_its_sources_spell_it(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [row(i, topic=i % 40) for i in range(160)]
    write(data / "a.jsonl", rows[:80])
    frame = pd.DataFrame([*rows[80:120], row("none", topic=None)])  # its topics become floats
    frame.to_parquet(data / "b.parquet")
    pd.DataFrame([*rows[120:], row("nor here", topic=None)]).to_csv(data / "c.csv", index=False)
    store = Store(str(tmp_path / "out"))
    given_config = config(
        str(data), group_column="topic", test_fraction=0.4, max_reject_fraction=0.1
    )
    counts = prepare(store, given_config, seed=0)
    add_up(counts, store)
    assert counts["rejects"] == {"missing field: topic": 2}
    sides: dict[int, set[bool]] = {}
    for each in pairs(store):
        topic = int(each["prompt"].split()[1]) % 40
        sides.setdefault(topic, set()).add(each["split"] == "test")
    assert len(sides) == 40
    assert all(len(side) == 1 for side in sides.values())
    assert {True} in sides.values()
    assert {False} in sides.values()


@pytest.mark.usefixtures("in_process")
def test_a_limit_reads_so_many_rows_and_no_more(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [row(i) for i in range(5)])
    write(tmp_path / "b.jsonl", [row(i) for i in range(5, 10)])
    store = Store(str(tmp_path / "out"))
    counts = prepare(store, config({"path": str(tmp_path / "*.jsonl"), "limit": 7}), seed=0)
    assert counts["rows_in"] == 7
    assert {row["prompt"] for row in pairs(store)} == {f"prompt {i}" for i in range(7)}


@pytest.mark.usefixtures("in_process")
def test_a_split_that_stayed_empty_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "x.jsonl", [row(0)])
    with caplog.at_level("WARNING"):
        prepare(Store(str(tmp_path / "out")), config(path, test_fraction=0.01), seed=0)
    assert "no pair is in split test, though prepare.test_fraction is 0.01" in caplog.text
    assert "take a larger fraction, another seed" in caplog.text
    assert "validation" not in caplog.text


@pytest.mark.usefixtures("in_process")
def test_what_is_advised_for_an_empty_split_can_help(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = {"prompt": "p", "response_a": "x", "response_b": "y"}
    unlabelled = write(tmp_path / "x.jsonl", [bare, bare | {"prompt": "q", "label": None}])
    for share in (0.3, 1.0):
        given_config = config(unlabelled, labelled_fraction=share, test_fraction=0.0)
        prepare(Store(str(tmp_path / f"out{share}")), given_config, seed=0)
        assert f"labelled_fraction is {share:g}; no training pair has a label" in caplog.text
        assert "prepare.sources.N.columns (label" in caplog.text
        assert "fraction, another seed" not in caplog.text
        caplog.clear()
    labelled = {"path": write(tmp_path / "y.jsonl", [row(0)]), "into": "train"}
    prepare(Store(str(tmp_path / "into")), config(labelled, test_fraction=0.1), seed=0)
    assert "every source goes to one side (`into`), so that no share acts" in caplog.text
    caplog.clear()
    whole = config(write(tmp_path / "z.jsonl", [row(0)]), validation_fraction=0.0, test_fraction=1)
    prepare(Store(str(tmp_path / "whole")), whole, seed=0)
    assert "larger" not in caplog.text
    assert "labelled_fraction is 0.3; take another seed" not in caplog.text


@pytest.mark.usefixtures("in_process")
def test_a_source_that_is_the_test_part_is_all_of_it_unless_told(tmp_path: Path) -> None:
    rows = [row(i) for i in range(200)]
    held_out = {"path": write(tmp_path / "held.jsonl", rows[:20]), "into": "test"}
    rest = write(tmp_path / "rest.jsonl", rows[20:])
    for name, settings, drawn in (("alone", {}, False), ("both", {"test_fraction": 0.3}, True)):
        counts = prepare(Store(str(tmp_path / name)), config(rest, held_out, **settings), seed=0)
        assert (counts["splits"]["test"] > 20) is drawn
        assert counts["splits"]["test"] >= 20


@pytest.mark.usefixtures("in_process")
def test_what_became_of_the_rows_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row(i) for i in range(40)] + [row(0), row(1, "no", "yes"), row(50, chosen="  ")]
    given = config(write(tmp_path / "x.jsonl", rows), test_fraction=0.0, labelled_fraction=1.0)
    with caplog.at_level("INFO", logger="cwpo_dist.stages.prepare"):
        prepare(Store(str(tmp_path / "out")), given, seed=0)
    told = "\n".join(record.message for record in caplog.records)
    assert (
        "43 rows: 40 pairs, 2 copies of pairs merged (1 with conflicting labels), 1 set aside"
        in told
    )
    assert "set aside: 1 × empty answer: chosen: correct or remove these rows" in told
    assert (
        "pairs by split (with a label): labelled 39 (39), unlabelled 1 (0), validation 0 (0), "
        "test 0 (0)" in told
    )
