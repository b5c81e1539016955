"""Rows in, small files of them; and what `prepare` left of them, read back and added up, out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from cwpo_dist.config import PrepareConfig
from cwpo_dist.pairs.records import REJECT_SCHEMA, answer_id, canonical, check, prompt_id
from cwpo_dist.pairs.splits import SPLITS
from cwpo_dist.pairs.stored import pairs_of, read_whole
from cwpo_dist.storage import Store

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(i: Any, chosen: str = "yes", rejected: str = "no", **more: Any) -> dict[str, Any]:
    return {"prompt": f"prompt {i}", "chosen": chosen, "rejected": rejected, **more}


def config(*given: Any, **changes: Any) -> PrepareConfig:
    listed = [{"path": each} if isinstance(each, str) else each for each in given]
    return PrepareConfig(sources=listed, **changes)


def files(store: Store) -> dict[str, bytes]:
    return {name: store.read(name) for name in store.names()}


def pairs(store: Store) -> Rows:
    return list(_rows(whole(store))) if store.names("pairs") else []


def whole(store: Store) -> pa.Table:
    """The pairs of all shards, with their texts."""
    return pa.concat_tables(read_whole(store, index) for index in range(len(store.names("pairs"))))


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """With the columns that were kept, and each message with its own keys alone."""
    for row, pair in zip(table.to_pylist(), pairs_of(table), strict=True):
        yield row | pair._asdict()


def rejects(store: Store) -> Rows:
    names = [name for name in store.names() if name.startswith("rejects/")]
    return [
        row
        for name in names
        for row in check(store.read_table(name), REJECT_SCHEMA, name).to_pylist()
    ]


def ids_of(pair: dict[str, Any]) -> tuple[str, str]:
    """The ids of a pair's answers, by its texts."""
    asked = prompt_id(pair["prompt"], pair["tools"])
    return answer_id(asked, pair["response_a"]), answer_id(asked, pair["response_b"])


def scores_of(pairs: Rows, scores: Rows) -> dict[str, tuple[float, float]]:
    """By pair id: the scores of its answers, of pairs both of whose answers have one."""
    found = {row["answer_id"]: row["score"] for row in scores}
    assert len(found) == len(scores), "an answer twice"
    both = {pair["pair_id"]: ids_of(pair) for pair in pairs}
    return {name: (found[a], found[b]) for name, (a, b) in both.items() if {a, b} <= found.keys()}


def add_up(counts: dict[str, Any], store: Store) -> None:
    """What the manifest says is what lies there, and no row is missing."""
    written, set_aside = pairs(store), rejects(store)
    assert counts["rows_in"] == len(written) + counts["merged_duplicates"] + len(set_aside)
    assert counts["pairs"] == len(written) == len({row["pair_id"] for row in written})
    assert sum(counts["rejects"].values()) == len(set_aside)
    assert sum(counts["splits"].values()) == len(written)
    assert sum(counts["labelled"].values()) == sum(row["label"] is not None for row in written)
    for split in SPLITS:
        prompts, answers = _of_split(written, split)
        assert (counts["prompts"][split], counts["answers"][split]) == (prompts, answers), split
    shards = [name for name in store.names() if name.startswith("pairs/")]
    assert shards == [f"pairs/part-{index:05d}.parquet" for index in range(counts["shards"])]


def _of_split(written: Rows, split: str) -> tuple[int, int]:
    """How many different prompts and answers stand in the pairs of a split, by their content."""
    prompts, answers = set[str](), set[tuple[str, str]]()
    for row in written:
        if row["split"] == split:
            prompt = canonical([row["prompt"], row["tools"]])
            prompts.add(prompt)
            answers |= {(prompt, canonical(row[f"response_{x}"])) for x in "ab"}
    return len(prompts), len(answers)


def said(text: Any) -> Any:
    """The words of a prompt or answer: of messages, all that they say."""
    return text if isinstance(text, str) else "\n".join(each["content"] for each in text)


def winners(store: Store) -> dict[str, Any]:
    """By prompt: the text of the answer that the label names; `tie`, or None without a label."""
    found = {}
    for row in pairs(store):
        winner = row["label"] and said(row[f"response_{row['label']}"])
        found[said(row["prompt"])] = "tie" if row["tie"] else winner
    return found


def votes(store: Store) -> dict[str, Any]:
    """By prompt: the votes of each answer by its text, and those for neither."""
    return {
        said(row["prompt"]): {said(row[f"response_{x}"]): row[f"votes_{x}"] for x in "ab"}
        | {"tie": row["votes_tie"]}
        for row in pairs(store)
    }
