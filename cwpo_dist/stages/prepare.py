"""Sources → pairs and rejects: every input is read and parsed, then merged, split and sharded."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import ray

from cwpo_dist.config import ConfigError, PrepareConfig, Split
from cwpo_dist.manifest import Manifest
from cwpo_dist.pairs import buckets, cutting, kept_columns, numbers
from cwpo_dist.pairs.buckets import BucketSummary, Shards
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.listing import LeftOut
from cwpo_dist.pairs.pieces import (
    COUNT,
    Piece,
    PieceSummary,
    damage_fault,
    piece_summaries,
    read_piece,
)
from cwpo_dist.pairs.readers import SourceError
from cwpo_dist.pairs.rejects import Tally, refuse_past
from cwpo_dist.pairs.sources import MAP_LABELS, Plan, plan, source_fingerprints
from cwpo_dist.pairs.splits import SPLITS, SplitRule
from cwpo_dist.pairs.unread import Unread
from cwpo_dist.runs.arms import ArmRun
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.node import Node, Nodes, Settings
from cwpo_dist.runs.stage import Stage, Work
from cwpo_dist.scoring.ray_tasks import run_tasks
from cwpo_dist.storage import MANIFEST, FileMissing, StorageError, Store, to_json

logger = logging.getLogger(__name__)

_SPANS = "work/spans/{:05d}.json"
_FILES_LISTED = 100
# How often a driver whose `work/` is gone looks again: the other that removes it commits then.
_TRIES, _PAUSE_S = 30, 1.0


@dataclass(frozen=True)
class PrepareSettings(Settings):
    """What `prepare` is told.

    Attributes:
        config: the sources and the split settings.
        seed: of order and splits.
        sources_now: the sources' fingerprints.
    """

    stage = "prepare"

    config: PrepareConfig
    seed: int
    sources_now: list[Any]


def nodes(run: ArmRun, given: Nodes) -> Nodes:
    """The sources as they are now."""
    config = run.config
    return {"prepare": Node(PrepareSettings(config.prepare, config.seed, run.sources_now))}


def make(context: Context, node: Node[PrepareSettings]) -> dict[str, Any]:
    """Writes `pairs/part-*.parquet` and `rejects/part-*.parquet` and returns the counts."""
    told = node.settings
    return prepare(context.place(node), told.config, told.seed, told.sources_now)


def work(context: Context, node: Node[PrepareSettings], counted: Census) -> Work:
    """How many pairs go where."""
    splits = ", ".join(f"{n:,} {name}" for name, n in sorted(counted.splits.items()))
    own = "".join(
        f"; {kind} of its own: {sum(found.values()):,} pairs" for kind, found in counted.own.items()
    )
    copies = f"; {counted.merged:,} copies merged" if counted.merged else ""
    text = f"{splits}{copies}; {counted.rejects:,} set aside{own}"
    return Work(text, sum(counted.splits.values()), "pairs")


def prepare(
    store: Store, config: PrepareConfig, seed: int, known: list[Any] | None = None
) -> dict[str, Any]:
    """Does the stage in the folder `store`; run again after a kill, it goes on where it was.

    Of two drivers that do so at once the first to end removes `work/`, maybe while the other reads
    there: that one then has the first one's counts, or should the first have died, begins anew.

    Args:
        store: where it writes.
        config: the sources and the split settings.
        seed: of order and splits.
        known: the sources' fingerprints of which its key was made; None: as they are now.

    Returns:
        The counts for the manifest; rows_in = pairs + merged_duplicates + Σ rejects.

    Raises:
        ConfigError: before anything is read in full, for inputs or columns that are missing.
        SourceError: for storage that refuses to be read, files that changed meanwhile, and past
            `max_reject_fraction` of files that are damaged.
        RejectsError: past `max_reject_fraction`, or when no pair is left.
    """
    known = source_fingerprints(config) if known is None else known
    for _ in range(_TRIES):
        try:
            return _prepare(store, config, seed, known)
        except FileMissing as error:
            missing = error
            logger.warning("prepare: %s. Another command may have ended this stage", error)
            time.sleep(_PAUSE_S)
        if store.exists(MANIFEST):
            counts = Manifest.read(store).counts
            clear(store)
            return dict(counts)
    raise missing


def _prepare(store: Store, config: PrepareConfig, seed: int, known: list[Any]) -> dict[str, Any]:
    planned = plan(config)
    _refuse_changed(store, config, known, "before it was read")
    for line in planned.remarks:
        logger.warning("prepare: %s", line)
    _check_placement(config.num_cpus)
    _read(store, planned, config, seed)
    _refuse_changed(store, config, known, "while it was read", more=True)
    read = piece_summaries(store)
    damaged = _damaged_files(planned, read, config)
    rejects = Tally()
    for piece in read:
        rejects.merge(piece.tally)
    rows_in = sum(piece.rows_in for piece in read)
    valid = rows_in - rejects.reasons.total()
    refuse_past(config.max_reject_fraction, rejects, rows_in, valid, store.uri)
    kept = _kept_types(read, config)
    rows = tuple(name for piece in read for name in piece.files)
    leaks = planned.n_buckets if planned.may_leak else 0
    _write(buckets.Work(store, rows, leaks), planned, config, kept, seed)
    written = buckets.bucket_summaries(store, planned.n_buckets)
    rejects.merge(Tally(_added(bucket.rejects for bucket in written)))
    counts = _counts(planned, written, rejects.reasons, rows_in)
    counts |= {"keep_columns": kept, "damaged_files": damaged} | _beside(read)
    counts["void_numbers"] = dict(_added(piece.void for piece in read).most_common())
    counts["files_left_out"] = _left_out(planned.left_out)
    refuse_past(config.max_reject_fraction, rejects, rows_in, counts["pairs"], store.uri)
    _tell_done(counts, rejects)
    _tell_numbers(counts, read)
    _tell_beside(counts)
    _tell_empty(counts, config)
    clear(store)
    return counts


def clear(store: Store) -> None:
    """Removes what nobody reads any more; a driver that is still at work there notices."""
    try:
        store.remove("work")
    except StorageError as error:  # no reason to end a run
        logger.warning("prepare: %s/work is of no more use, but stays: %s", store.uri, error)


def _refuse_changed(
    store: Store, config: PrepareConfig, known: list[Any], when: str, *, more: bool = False
) -> None:
    """What is read would lie under the key of what it was before.

    Args:
        store: of the stage.
        config: the sources.
        known: their fingerprints when the key was made.
        when: of the change, for people.
        more: files that came since do no harm, as they were not read.
    """
    now = source_fingerprints(config)
    changed = [
        source.path
        for source, old, new in zip(config.sources, known, now, strict=True)
        if (any(mark not in new for mark in old) if more else old != new)
    ]
    if changed:
        clear(store)
        raise SourceError(
            f"prepare.sources: {', '.join(map(repr, changed))} changed {when}, and nothing is kept "
            "of it; run the same command again when nobody writes there"
        )


def _check_placement(num_cpus: float) -> None:
    """Refuses a task that fits on no node: Ray would wait for it for ever, silently."""
    nodes: list[dict[str, Any]] = ray.nodes()
    largest = max(float(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"])
    if num_cpus > largest:
        raise ConfigError(
            f"prepare.num_cpus: {num_cpus:g}, but the largest node has {largest:g} CPUs: such a "
            "task can never be placed; lower it or add a larger node"
        )


def _read(store: Store, planned: Plan, config: PrepareConfig, seed: int) -> None:
    rule = SplitRule(
        seed=seed,
        labelled=config.labelled_fraction,
        validation=config.validation_fraction,
        test=config.test_fraction,
    )
    pieces = _numbered(store, cutting.cut(planned.pieces), config)
    for piece in planned.pieces:
        logger.info("prepare: %s: %s", piece.source, piece.layout.described())
    logger.info("prepare: reading %d inputs", len(pieces))
    store.write(COUNT, to_json(len(pieces)))

    def task(index: int) -> None:
        read_piece(store, index, pieces[index], rule, planned.n_buckets)

    run_tasks(task, len(pieces), config.num_cpus)


def _numbered(store: Store, pieces: list[Piece], config: PrepareConfig) -> list[Piece]:
    """Cuts large text files by their lines and rows, which rejects name by their numbers."""
    parts = [piece.parts[0] for piece in pieces if not cutting.is_numbered(piece)]

    def task(index: int) -> None:
        if not store.exists(_SPANS.format(index)):
            store.create_json(_SPANS.format(index), cutting.spans(parts[index]))

    if parts:
        logger.info("prepare: counting the rows of %d parts of large files", len(parts))
        run_tasks(task, len(parts), config.num_cpus)
    found = (store.read_json(_SPANS.format(index)) for index in range(len(parts)))
    return cutting.number_rows(pieces, found)


def _damaged_files(planned: Plan, read: list[PieceSummary], config: PrepareConfig) -> int:
    """How many files could not be read to their end; each was set aside from there on."""
    damaged = {name: why for piece in read for name, why in piece.damaged.items()}
    files = len({str(part) for piece in planned.pieces for part in piece.parts})
    for name, why in damaged.items():
        logger.warning("prepare: %s %s; the rows before it are kept", name, why)
    if fault := damage_fault(damaged, files, config.max_reject_fraction):
        raise SourceError(fault)
    return len(damaged)


def _left_out(left_out: Sequence[LeftOut]) -> dict[str, Any]:
    """How many files no source reads, and the first of them."""
    return {
        "count": len(left_out),
        "files": [asdict(each) for each in left_out[:_FILES_LISTED]],
    }


def _write(
    work: buckets.Work, planned: Plan, config: PrepareConfig, kept: dict[str, str], seed: int
) -> None:
    count = planned.n_buckets
    if work.leaks:
        run_tasks(partial(buckets.write_leaks, work), count, config.num_cpus)
    first: tuple[int, ...] = (0,)
    if count > 1:
        run_tasks(partial(buckets.count_bucket, work), count, config.num_cpus)
        first = buckets.number_shards(work.store, count, config.rows_per_shard)
    shards = Shards(
        planned.kind,
        kept,
        config.rows_per_shard,
        first,
        flipped=config.flipped_labels,
        seed=seed,
        learn_ties=config.ties == "labelled",
    )
    logger.info("prepare: writing %d buckets", count)
    run_tasks(partial(buckets.write_bucket, work, shards=shards), count, config.num_cpus)


def _kept_types(read: Iterable[PieceSummary], config: PrepareConfig) -> dict[str, str]:
    seen: dict[str, set[str]] = {name: set() for name in config.keep_columns}
    for piece in read:
        for name, types in piece.kept_types.items():
            seen[name].update(types)
    return {name: kept_columns.settle(types) for name, types in seen.items()}


def _counts(
    planned: Plan, written: list[BucketSummary], rejects: Counter[str], rows_in: int
) -> dict[str, Any]:
    pairs = sum(bucket.pairs for bucket in written)
    merged = sum(bucket.merged_duplicates for bucket in written)
    assert rows_in == pairs + merged + rejects.total(), (rows_in, pairs, merged, rejects)
    splits = _added(bucket.splits for bucket in written)
    labelled = _added(bucket.labelled for bucket in written)
    own = _added(bucket.numbers for bucket in written)
    there = {kind for piece in planned.pieces for kind in numbers.kinds(piece.layout.columns)}
    return {
        "rows_in": rows_in,
        "pairs": pairs,
        "merged_duplicates": merged,
        "conflicting_labels": sum(bucket.conflicting_labels for bucket in written),
        "conflicting_numbers": sum(bucket.conflicting_numbers for bucket in written),
        "ties": sum(bucket.ties for bucket in written),
        "rejects": dict(rejects.most_common()),
        "splits": {split: splits[split] for split in SPLITS},
        "labelled": {split: labelled[split] for split in SPLITS},
        "numbers": {kind: own[kind] for kind in numbers.COLUMNS if kind in there},
        "kind": planned.kind,
        "formats": {piece.source: piece.layout.format for piece in planned.pieces},
        "columns": {piece.source: piece.layout.described() for piece in planned.pieces},
        "shards": sum(bucket.shards for bucket in written),
    }


def _tell_done(counts: dict[str, Any], rejects: Tally) -> None:
    """What became of the rows, and where the pairs are."""
    logger.info(
        "prepare: %d rows: %d pairs, %d copies of pairs merged (%d with conflicting labels), "
        "%d set aside",
        *(counts["rows_in"], counts["pairs"], counts["merged_duplicates"]),
        *(counts["conflicting_labels"], rejects.reasons.total()),
    )
    for line in rejects.lines(most=len(rejects.reasons)):
        logger.info("prepare: set aside:%s", line.removeprefix(" "))
    told = [f"{split} {counts['splits'][split]} ({counts['labelled'][split]})" for split in SPLITS]
    logger.info("prepare: pairs by split (with a label): %s", ", ".join(told))


def _tell_numbers(counts: dict[str, Any], read: list[PieceSummary]) -> None:
    """Of the data's own numbers: how many there are, and which cannot be used."""
    for own, pairs in counts["numbers"].items():
        logger.info("prepare: %s: the data's own, of %d of %d pairs", own, pairs, counts["pairs"])
    for why, rows in counts["void_numbers"].items():
        first = next(piece.void_first[why] for piece in read if why in piece.void_first)
        logger.warning(
            "prepare: %s, of %d rows (first: %s): they count as without it", why, rows, first
        )
    if counts["conflicting_numbers"]:
        logger.warning(
            "prepare: copies of %d pairs have different numbers, which then count as none",
            counts["conflicting_numbers"],
        )


def _beside(read: Iterable[PieceSummary]) -> dict[str, Any]:
    """What is to be known of the rows beside their pairs.

    `not_read` has, by source, the columns and message keys that nothing reads, each with the rows
    that have a value there; `message_keys` what messages have beside role and content, and `tools`.
    """
    read, unread = list(read), dict[str, Unread]()
    for piece in read:
        unread.setdefault(piece.source, Unread()).add(piece.unread)
    return {
        "not_read": {source: asdict(each) for source, each in unread.items() if each},
        "message_keys": sorted({key for piece in read for key in piece.message_keys}),
        "votes_against_label": sum(piece.votes_against for piece in read),
    }


def _tell_beside(counts: dict[str, Any]) -> None:
    for source, unread in counts["not_read"].items():
        for sentence in Unread(**unread).sentences():
            logger.warning("prepare: %s: %s", source, sentence)
    if counts["votes_against_label"]:
        logger.warning(
            "prepare: in %d rows more people voted for the other answer than for the one that the "
            "label names; the label counts",
            counts["votes_against_label"],
        )
    if counts["ties"]:
        logger.info("prepare: %d pairs are ties, kept without a label", counts["ties"])


def _tell_empty(counts: dict[str, Any], config: PrepareConfig) -> None:
    """Names each split that has a share and no pair, with what would give it one."""
    shares: dict[Split, float] = {
        "labelled": config.labelled_fraction,
        "validation": config.validation_fraction,
        "test": config.test_fraction,
    }
    for split, share in shares.items():
        if share and not counts["splits"][split]:
            logger.warning(
                "prepare: no pair is in split %s, though prepare.%s_fraction is %g; %s",
                *(split, split, share, _remedy(split, share, counts["labelled"], config)),
            )


def _remedy(split: Split, share: float, labelled: dict[Split, int], config: PrepareConfig) -> str:
    if split == "labelled" and not labelled["labelled"] + labelled["unlabelled"]:
        return f"no training pair has a label: {MAP_LABELS}"
    if split != "labelled" and all(source.into for source in config.sources):
        return "every source goes to one side (`into`), so that no share acts: set it to 0"
    # A hash knows no quota: of a few prompts or groups none may fall into a small share.
    larger = "a larger fraction, " if share < 1 else ""
    return f"take {larger}another seed, or a source of its own (`into`)"


def _added(counts: Iterable[dict[Any, int]]) -> Counter[Any]:
    total: Counter[Any] = Counter()
    for each in counts:
        total.update(each)
    return total


STAGE = Stage(PrepareSettings, nodes, make, work, clear)
