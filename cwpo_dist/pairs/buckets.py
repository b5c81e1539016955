"""The rows of all pieces in, sorted shards of pairs out, one range of pair ids (bucket) a task.

Pair ids are hashes, so their order is a shuffle. A bucket's files depend on the pieces and the
arguments alone and are written put-if-absent, the summary last: done twice, by anyone, they stay
the same.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cwpo_dist.config import Split
from cwpo_dist.pairs import keep, pieces
from cwpo_dist.pairs.records import Kind, pair_schema
from cwpo_dist.pairs.rejects import Reject, row_text, write_rejects
from cwpo_dist.pairs.splits import LEAKED, SIDE_SCHEMA, SIDES, leaks, merge, split_of
from cwpo_dist.storage import Store

LEAKS = "work/leaks.parquet"
COUNTS = "work/counts"
SUMMARIES = "work/buckets"


@dataclass(frozen=True)
class Shards:
    """How the shards of all buckets are cut.

    Attributes:
        kind: text or conversational.
        kept: settled type of each kept column.
        rows_per_shard: rows of every shard but the last of a bucket.
        first: number of each bucket's first shard.
    """

    kind: Kind
    kept: Mapping[str, str]
    rows_per_shard: int
    first: tuple[int, ...]


@dataclass
class BucketSummary:
    """What became of one bucket."""

    pairs: int = 0
    merged_duplicates: int = 0
    conflicting_labels: int = 0
    shards: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    splits: dict[Split, int] = field(default_factory=dict)
    labelled: dict[Split, int] = field(default_factory=dict)


def bucket_summaries(store: Store) -> list[BucketSummary]:
    """The summaries of all buckets that are done."""
    return [BucketSummary(**store.read_json(name)) for name in store.names(SUMMARIES)]


def write_leaks(store: Store) -> int:
    """Writes which prompts lie on several sides, over all buckets; returns how many."""
    sides = [
        _read(store, name, columns=SIDE_SCHEMA.names).group_by(SIDE_SCHEMA.names).aggregate([])
        for name in store.names(pieces.ROWS)
    ]
    found = leaks(pa.concat_tables([SIDE_SCHEMA.empty_table(), *sides]))
    store.create_table(LEAKS, found)
    return int(found.num_rows)


def count_bucket(store: Store, bucket: int) -> None:
    """Counts a bucket's pairs by their ids alone; writes `work/counts/<bucket>.json`."""
    name = f"{COUNTS}/{bucket:05d}.json"
    if store.exists(name):
        return
    kept_on = _kept_on(store)
    rows = _bucket_rows(store, bucket, ["pair_id", *SIDE_SCHEMA.names])
    store.create_json(name, len({row["pair_id"] for row in rows if _leak(row, kept_on) is None}))


def number_shards(store: Store, rows_per_shard: int) -> tuple[int, ...]:
    """The number of each bucket's first shard, from the counts: shards are numbered from 0."""
    sizes = [int(store.read_json(name)) for name in store.names(COUNTS)]
    shards = (-(-size // rows_per_shard) for size in sizes)
    return tuple(itertools.accumulate(shards, initial=0))[:-1]


def write_bucket(store: Store, bucket: int, shards: Shards) -> None:
    """Gathers, merges and writes one bucket: `pairs/`, `rejects/`, `work/buckets/<bucket>.json`."""
    name = f"{SUMMARIES}/{bucket:05d}.json"
    if store.exists(name):
        return
    kept_on = _kept_on(store)
    rows = _bucket_rows(store, bucket)
    reasons = [_leak(row, kept_on) for row in rows]
    found = list(zip(rows, reasons, strict=True))
    rejects = [_leaked(row, reason) for row, reason in found if reason is not None]
    staying = [row for row, reason in found if reason is None]
    summary = BucketSummary()
    pairs = list(_merged(staying, shards.kept, summary))
    summary.shards = _write_shards(store, pairs, shards, shards.first[bucket])
    write_rejects(store, f"part-leak-{bucket:05d}.parquet", rejects)
    _count(summary, pairs, rejects)
    store.create_json(name, asdict(summary))


def _bucket_rows(
    store: Store, bucket: int, columns: list[str] | None = None
) -> list[dict[str, Any]]:
    """One bucket's rows from all pieces, copies of a pair side by side in the sources' order."""
    of_bucket = [("bucket", "=", bucket)]
    order = ["pair_id", "piece", "number"]
    wanted = None if columns is None else list(dict.fromkeys([*columns, *order]))
    tables = [
        _read(store, name, filters=of_bucket, columns=wanted) for name in store.names(pieces.ROWS)
    ]
    if not tables:
        return []
    table = pa.concat_tables(tables).sort_by([(column, "ascending") for column in order])
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _read(store: Store, name: str, **options: Any) -> pa.Table:
    return pq.read_table(
        store.path(name), filesystem=store.filesystem, use_threads=False, **options
    )


def _kept_on(store: Store) -> dict[str, int]:
    """Prompt hash → the side that keeps it, for prompts that lie on several."""
    if not store.exists(LEAKS):
        return {}
    table = store.read_table(LEAKS)
    return dict(zip(*(table[column].to_pylist() for column in SIDE_SCHEMA.names), strict=True))


def _leak(row: Mapping[str, Any], kept_on: Mapping[str, int]) -> str | None:
    """The reason to set a row aside whose prompt stays on another side."""
    side = kept_on.get(row["prompt_hash"], row["side"])
    return None if side == row["side"] else str(LEAKED[SIDES[side]])


def _leaked(row: Mapping[str, Any], reason: str) -> Reject:
    shown = ("pair_id", "prompt", "response_a", "response_b", "label", "votes_a", "votes_b")
    text = row_text({name: row[name] for name in shown})
    return Reject(reason, row["origin"], row["position"], text)


def _merged(
    rows: list[dict[str, Any]], kept: Mapping[str, str], summary: BucketSummary
) -> Iterator[dict[str, Any]]:
    """The pairs as they are written, one for all its copies."""
    for _, copies in itertools.groupby(rows, key=lambda row: row["pair_id"]):
        same = list(copies)
        pair, conflict = merge(same)
        summary.merged_duplicates += len(same) - 1
        summary.conflicting_labels += conflict
        values = json.loads(pair["kept"])
        yield {
            **pair,
            "split": split_of(SIDES[pair["side"]], pair["in_labelled_part"], pair["label"]),
            **{name: keep.spell(values.get(name), kind) for name, kind in kept.items()},
        }


def _write_shards(store: Store, pairs: list[dict[str, Any]], shards: Shards, first: int) -> int:
    schema = pair_schema(shards.kind, keep.kept_schema(shards.kept))
    starts = range(0, len(pairs), shards.rows_per_shard)
    for number, start in enumerate(starts, first):
        rows = pairs[start : start + shards.rows_per_shard]
        table = pa.Table.from_pylist(rows, schema=schema)
        store.create_table(f"pairs/part-{number:05d}.parquet", table)
    return len(starts)


def _count(summary: BucketSummary, pairs: list[dict[str, Any]], rejects: list[Reject]) -> None:
    summary.pairs = len(pairs)
    summary.rejects = dict(Counter(reject.reason for reject in rejects))
    summary.splits = dict(Counter(pair["split"] for pair in pairs))
    with_label = (pair["split"] for pair in pairs if pair["label"] is not None)
    summary.labelled = dict(Counter(with_label))
