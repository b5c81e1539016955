"""The rows of all pieces in, sorted shards of pairs out, one range of pair ids (bucket) a task.

Ids are hashes that begin with their prompt's, so their order is a shuffle of prompts. A bucket's
files depend on the pieces and the arguments alone and are written put-if-absent, the summary last:
done twice, by anyone, they stay the same. What is read is known by name and never listed: another
driver that ends first removes `work/`, and of a listing made meanwhile a part would pass for the
whole.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cwpo_dist.config import Split
from cwpo_dist.pairs import kept_columns, numbers
from cwpo_dist.pairs.alone import Comparing, are_named
from cwpo_dist.pairs.chosen import OTHER
from cwpo_dist.pairs.copies import gathered
from cwpo_dist.pairs.records import PROMPT_DIGITS, Kind, Reject, rows_of, unit_hash
from cwpo_dist.pairs.rejects import row_text, write_rejects
from cwpo_dist.pairs.splits import LEAKED, SIDE_SCHEMA, SIDES, leaks, split_of
from cwpo_dist.pairs.stored import IDS, Told, pairs_of, whole_schema, write_shard
from cwpo_dist.storage import Store

LEAKS = "work/leaks"
COUNTS = "work/counts"
SUMMARIES = "work/buckets"

TRAINING = ("labelled", "unlabelled")
_DECIDES = ("side", "in_labelled_part", "label", "tie")  # … a split


@dataclass(frozen=True)
class Shards:
    """How the shards of all buckets are cut.

    Attributes:
        kind: text or conversational.
        kept: settled type of each kept column.
        rows_per_shard: pairs of a shard, at most; see `cuts`.
        first: number of each bucket's first shard.
        flipped: share of the training pairs' labels to turn round, with the votes behind them.
        seed: which labels these are.
        learn_ties: whether pairs that people found equal may be in the labelled part.
    """

    kind: Kind
    kept: Mapping[str, str]
    rows_per_shard: int
    first: tuple[int, ...]
    flipped: float = 0.0
    seed: int = 0
    learn_ties: bool = False


@dataclass(frozen=True)
class Work:
    """What was read, for all buckets alike.

    Attributes:
        store: of the stage.
        rows: the files of all pieces, in their order.
        leaks: in how many files the prompts stand that lie on several sides; 0: none can.
        comparing: how answers in rows of their own make pairs; None: no source has such rows.
    """

    store: Store
    rows: tuple[str, ...]
    leaks: int
    comparing: Comparing | None = None


@dataclass
class BucketSummary:
    """What became of one bucket.

    Of each split: its pairs, those with a label, and the different prompts and answers that they
    are of; the answers that stand in no pair, and their prompts. A prompt lies in one bucket, so
    sums over buckets count none of these twice.
    """

    pairs: int = 0
    merged_duplicates: int = 0
    conflicting_labels: int = 0
    conflicting_numbers: int = 0
    ties: int = 0
    shards: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    splits: dict[Split, int] = field(default_factory=dict)
    labelled: dict[Split, int] = field(default_factory=dict)
    prompts: dict[Split, int] = field(default_factory=dict)
    answers: dict[Split, int] = field(default_factory=dict)
    numbers: dict[numbers.Own, int] = field(default_factory=dict)
    alone: dict[str, int] = field(default_factory=dict)
    answers_alone: dict[Split, int] = field(default_factory=dict)
    prompts_alone: dict[Split, int] = field(default_factory=dict)


def bucket_summaries(store: Store, count: int) -> list[BucketSummary]:
    """The summaries of all buckets, which are all done."""
    return [BucketSummary(**store.read_json(_named(SUMMARIES, at, "json"))) for at in range(count)]


def write_leaks(work: Work, part: int) -> None:
    """Writes which prompts lie on several sides, for one of `leaks` ranges of prompt hashes."""
    store, parts, name = work.store, work.leaks, _named(LEAKS, part, "parquet")
    if store.exists(name):
        return
    bounds = [*(f"{(at << 32) // parts:08x}" for at in range(parts)), "g"]  # behind all hex digits
    columns = SIDE_SCHEMA.names
    inside = (pc.field(columns[0]) >= bounds[part]) & (pc.field(columns[0]) < bounds[part + 1])
    sides = []
    for rows in work.rows:
        with store.parquet(rows) as file:
            table = file.read(columns, use_threads=False)
        sides.append(table.filter(inside).group_by(columns).aggregate([]))
    store.create_table(name, leaks(pa.concat_tables(sides)))


def count_shards(work: Work, bucket: int, rows_per_shard: int) -> None:
    """Counts a bucket's shards by its pairs' ids alone; writes `work/counts/<bucket>.json`."""
    name = _named(COUNTS, bucket, "json")
    if work.store.exists(name):
        return
    alone = work.comparing is not None  # then pairs are still to be made, of whole rows
    rows = _bucket_rows(work, bucket, None if alone else ["pair_id", *SIDE_SCHEMA.names])
    staying, _ = _without_leaks(rows, _kept_on(work, rows["prompt_hash"]))
    ids = gathered(staying, work.comparing).ids if alone else pc.unique(staying["pair_id"])
    work.store.create_json(name, len(cuts(ids, rows_per_shard)))


def number_shards(store: Store, count: int) -> tuple[int, ...]:
    """The number of each bucket's first shard, from the counts: shards are numbered from 0."""
    shards = (int(store.read_json(_named(COUNTS, at, "json"))) for at in range(count))
    return tuple(itertools.accumulate(shards, initial=0))[:-1]


def cuts(pair_ids: pa.Array, rows_per_shard: int) -> list[int]:
    """Where the shards of sorted pairs begin: a prompt lies in one, if it alone does not fill more.

    One with more pairs than `rows_per_shard` begins a shard and fills as many as it needs; answers
    of it may stand in several.
    """
    prompts = pc.utf8_slice_codeunits(pair_ids, 0, PROMPT_DIGITS)
    begins, last = [0], 0
    for end in pc.run_end_encode(prompts).run_ends.to_pylist():
        if end - begins[-1] > rows_per_shard and last > begins[-1]:
            begins.append(last)
        begins += range(begins[-1] + rows_per_shard, end, rows_per_shard)
        last = end
    return begins if last else []


def write_bucket(work: Work, bucket: int, shards: Shards) -> None:
    """Gathers, merges and writes one bucket: `pairs/`, `rejects/`, `work/buckets/<bucket>.json`."""
    store, name = work.store, _named(SUMMARIES, bucket, "json")
    if store.exists(name):
        return
    rows = _bucket_rows(work, bucket)
    staying, leaking = _without_leaks(rows, _kept_on(work, rows["prompt_hash"]))
    rejects = list(_rejects(leaking))
    write_rejects(store, f"part-leak-{bucket:05d}.parquet", rejects)
    found = gathered(staying, work.comparing)
    table, alone, paired = (
        _as_pairs(rows, shards) for rows in (found.pairs, found.alone, found.paired)
    )
    summary = BucketSummary(
        pairs=len(table),
        merged_duplicates=found.copies,
        conflicting_labels=found.conflicts,
        conflicting_numbers=found.differing,
        ties=pc.sum(table["tie"]).as_py() or 0,
        shards=_write_shards(work, pa.concat_tables([table, alone]), paired, shards, bucket),
        rejects=dict(Counter(reject.reason for reject in rejects)),
        splits=dict(Counter(table["split"].to_pylist())),
        labelled=dict(Counter(table.filter(pc.is_valid(table["label"]))["split"].to_pylist())),
        prompts=_different(table, "prompt_id"),
        answers=_different(table, "answer_a", "answer_b"),
        numbers=_with_numbers(table),
        alone=asdict(found.counts),
        answers_alone=_different(alone, "answer_a"),
        prompts_alone=_different(alone, "prompt_id"),
    )
    store.create_json(name, asdict(summary))


def _named(folder: str, number: int, ending: str) -> str:
    return f"{folder}/{number:05d}.{ending}"


def _bucket_rows(work: Work, bucket: int, columns: list[str] | None = None) -> pa.Table:
    """One bucket's rows from all pieces, copies of a pair side by side in the sources' order."""
    order = ["pair_id", "piece", "number"]
    wanted = None if columns is None else list(dict.fromkeys([*columns, *order]))
    tables = [_rows_in(work.store, name, bucket, wanted) for name in work.rows]
    return pa.concat_tables(tables).sort_by([(column, "ascending") for column in order])


def _rows_in(store: Store, name: str, bucket: int, columns: list[str] | None) -> pa.Table:
    """A bucket's rows in one file of a piece, which has a row group for each of its buckets."""
    with store.parquet(name) as rows:
        column = rows.schema.names.index("bucket")  # among leaves: messages have several
        numbers = [
            rows.metadata.row_group(group).column(column).statistics.min
            for group in range(rows.num_row_groups)
        ]
        groups = [group for group, number in enumerate(numbers) if number == bucket]
        return rows.read_row_groups(groups, columns=columns, use_threads=False)


def _kept_on(work: Work, prompts: pa.ChunkedArray) -> dict[str, int]:
    """Prompt hash → the side that keeps it, for those of the prompts that lie on several."""
    names = (_named(LEAKS, part, "parquet") for part in range(work.leaks))
    tables = map(work.store.read_table, names)
    found = (table.filter(pc.is_in(table["prompt_hash"], value_set=prompts)) for table in tables)
    sides: dict[str, int] = {}
    for table in found:
        columns = (table[name].to_pylist() for name in SIDE_SCHEMA.names)
        sides.update(zip(*columns, strict=True))
    return sides


def _without_leaks(rows: pa.Table, kept_on: Mapping[str, int]) -> tuple[pa.Table, pa.Table]:
    """The rows that stay; and those whose prompt stays on another side, with the `reason`."""
    if not kept_on:
        return rows, rows.slice(0, 0).append_column("reason", pa.array([], pa.string()))
    columns = (rows[name].to_pylist() for name in SIDE_SCHEMA.names)
    sides = ((kept_on.get(prompt, side), side) for prompt, side in zip(*columns, strict=True))
    given = [None if keeps == side else str(LEAKED[SIDES[keeps]]) for keeps, side in sides]
    reasons = pa.array(given, pa.string())
    leaking = rows.append_column("reason", reasons).filter(pc.is_valid(reasons))
    return rows.filter(pc.is_null(reasons)), leaking


def _rejects(leaking: pa.Table) -> Iterator[Reject]:
    """The rows that leak, each with its pair as its text; numbers of its own where it has some."""
    places = (leaking[name].to_pylist() for name in ("reason", "origin", "position"))
    for pair, reason, origin, position in zip(pairs_of(leaking), *places, strict=True):
        shown = {
            name: value
            for name, value in pair._asdict().items()
            if name not in ("split", "source", *numbers.RECORD)
            or (name in numbers.RECORD and value is not None)
        }
        if pair.response_a == pair.response_b:  # of a row of its own
            shown = {"prompt": pair.prompt, "response": pair.response_a}
        yield Reject(reason, None, origin, position, row_text(shown))


def _different(pairs: pa.Table, *columns: str) -> dict[Split, int]:
    """How many different ids stand in some columns, by split."""
    named = [pairs.select(["split", ids]).rename_columns(["split", "id"]) for ids in columns]
    found = pa.concat_tables(named).group_by("split").aggregate([("id", "count_distinct")])
    by_split = (found[name].to_pylist() for name in ("split", "id_count_distinct"))
    return dict(zip(*by_split, strict=True))


def _with_numbers(pairs: pa.Table) -> dict[numbers.Own, int]:
    """How many pairs can be weighed by each kind of their own numbers."""
    if all(pairs[name].null_count == len(pairs) for name in numbers.RECORD):  # as most data are
        return {}
    return dict(Counter(own for told in rows_of(Told, pairs) for own in numbers.usable(told)))


def _as_pairs(rows: pa.Table, shards: Shards) -> pa.Table:
    """Merged rows as the pair record has them."""
    columns = {name: rows[name] for name in rows.column_names} | {
        "split": pa.array(_splits(rows, shards.learn_ties), pa.string()),
        "prompt_id": pc.utf8_slice_codeunits(rows["pair_id"], 0, PROMPT_DIGITS),
    }
    if shards.kept:
        values = [json.loads(kept) for kept in rows["kept"].to_pylist()]
        for name, kind in shards.kept.items():
            columns[name] = [kept_columns.spell(value.get(name), kind) for value in values]
    if shards.flipped:
        columns |= turned(columns, shards)
    kept = kept_columns.kept_schema(shards.kept)
    schema = pa.schema([*whole_schema(shards.kind), *IDS, *kept])
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def _splits(rows: pa.Table, learn_ties: bool) -> list[Split]:
    decided = zip(*(rows[name].to_pylist() for name in _DECIDES), strict=True)
    return [
        split_of(SIDES[side], part, label, learned_tie=learn_ties and tie)
        for side, part, label, tie in decided
    ]


def turned(columns: Mapping[str, pa.ChunkedArray], shards: Shards) -> dict[str, Any]:
    """Labels of training pairs, a share of them turned round with their votes, and the votes.

    Held-out ones stay true.
    """
    rows = zip(*(columns[name].to_pylist() for name in ("pair_id", "split", "label")), strict=True)
    round_ = pa.array(
        [
            label is not None and split in TRAINING and _is_turned(shards, pair_id)
            for pair_id, split, label in rows
        ]
    )
    label, for_a, for_b = (columns[name] for name in ("label", "votes_a", "votes_b"))
    other = pc.if_else(pc.equal(label, "a"), OTHER["a"], OTHER["b"])
    return {
        "label": pc.if_else(round_, other, label),
        "votes_a": pc.if_else(round_, for_b, for_a),
        "votes_b": pc.if_else(round_, for_a, for_b),
    }


def _is_turned(shards: Shards, pair_id: str) -> bool:
    """Whether a training pair's label is turned round: by hash, so a rerun agrees."""
    return unit_hash(shards.seed, "flipped", pair_id) < shards.flipped


def _write_shards(work: Work, rows: pa.Table, paired: pa.Table, shards: Shards, bucket: int) -> int:
    """Writes a bucket's shards.

    Args:
        work: where they go.
        rows: pairs, and answers that stand in none as pairs with themselves.
        paired: answers that stand in some and came in rows of their own, as these: they go in
            front of the pairs that are made of them, and have their texts.
        shards: how they are cut.
        bucket: its number.

    Returns:
        How many there are.
    """
    alone = work.comparing is not None
    if alone:
        rows = rows.sort_by("pair_id")
        place = paired.schema.get_field_index("split")  # for it says that an answer is in no pair
        paired = paired.set_column(place, "split", pa.nulls(len(paired), pa.string()))
    begins = cuts(rows["pair_id"].combine_chunks(), shards.rows_per_shard)
    kept, ends = kept_columns.kept_schema(shards.kept), [*begins, len(rows)]
    for number, (start, end) in enumerate(itertools.pairwise(ends), shards.first[bucket]):
        part = rows.slice(start, end - start)
        if alone:
            part = pa.concat_tables([paired.filter(are_named(paired, part)), part])
        write_shard(work.store, number, part, kept, alone=alone)
    return len(begins)
