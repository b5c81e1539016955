"""Rows in, small files of them; and what `prepare` left of them, read back and added up, out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from cwpo_dist.config import PrepareConfig
from cwpo_dist.pairs.records import REJECT_SCHEMA, check
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


def add_up(counts: dict[str, Any], store: Store) -> None:
    """What the manifest says is what lies there, and no row is missing."""
    written, set_aside = pairs(store), rejects(store)
    assert counts["rows_in"] == len(written) + counts["merged_duplicates"] + len(set_aside)
    assert counts["pairs"] == len(written) == len({row["pair_id"] for row in written})
    assert sum(counts["rejects"].values()) == len(set_aside)
    assert sum(counts["splits"].values()) == len(written)
    assert sum(counts["labelled"].values()) == sum(row["label"] is not None for row in written)
    shards = [name for name in store.names() if name.startswith("pairs/")]
    assert shards == [f"pairs/part-{index:05d}.parquet" for index in range(counts["shards"])]


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
