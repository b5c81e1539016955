"""Sources → pairs and rejects: every input is read and parsed, then merged, split and sharded."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

from cwpo_dist.canonical import to_json
from cwpo_dist.config import ConfigError, PrepareConfig
from cwpo_dist.manifest import Manifest
from cwpo_dist.pairs import buckets, cutting, kept_columns, late_columns
from cwpo_dist.pairs.alone import comparing
from cwpo_dist.pairs.buckets import Shards
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.piece_summary import PieceSummary
from cwpo_dist.pairs.pieces import (
    COUNT,
    Piece,
    damage_fault,
    piece_summaries,
    read_piece,
)
from cwpo_dist.pairs.readers import SourceError
from cwpo_dist.pairs.rejects import RejectsError, Tally, refuse_past
from cwpo_dist.pairs.row_forms import ListCounts
from cwpo_dist.pairs.sources import Fingerprint, Plan, plan, source_fingerprints
from cwpo_dist.pairs.splits import SplitRule
from cwpo_dist.placement import alive_machines, task_faults
from cwpo_dist.runs.arms import ArmRun
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node, Nodes, Settings
from cwpo_dist.runs.prepared_counts import (
    PreparedCounts,
    added,
    of_lists,
    prepared_counts,
)
from cwpo_dist.runs.prepared_words import in_words
from cwpo_dist.runs.stage import Stage, Work
from cwpo_dist.scoring.ray_tasks import run_tasks
from cwpo_dist.storage import MANIFEST, FileMissing, StorageError, Store

logger = logging.getLogger(__name__)

_SPANS = "work/spans/{:05d}.json"
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
    format = 5

    config: PrepareConfig
    seed: int
    sources_now: list[Fingerprint]


def nodes(run: ArmRun, given: Nodes) -> Nodes:
    """The sources as they are now."""
    config = run.config
    return {"prepare": Node(PrepareSettings(config.prepare, config.seed, run.sources_now))}


def make(context: Context, node: Node[PrepareSettings]) -> Mapping[str, object]:
    """Writes `prompts/`, `answers/`, `pairs/` and `rejects/`, and returns the counts."""
    told = node.settings
    return prepare(context.place(node), told.config, told.seed, told.sources_now)


def work(context: Context, node: Node[PrepareSettings], counted: Census) -> Work:
    """How many pairs go where."""
    found = [(n, name) for name, n in sorted(counted.splits.items())]
    if counted.alone.in_no_pair:
        found.append((counted.alone.in_no_pair, "answers in no pair"))
    splits = ", ".join(f"{n:,} {name}" for n, name in found)
    own = "".join(
        f"; {kind} of its own: {sum(found.values()):,} pairs" for kind, found in counted.own.items()
    )
    copies = f"; {counted.merged:,} copies merged" if counted.merged else ""
    text = f"{splits}{copies}; {counted.rejects:,} set aside{own}"
    return Work(text, sum(counted.splits.values()), "pairs")


def prepare(
    store: Store, config: PrepareConfig, seed: int, known: list[Fingerprint] | None = None
) -> PreparedCounts:
    """Does the stage in the folder `store`; run again after a kill, it goes on where it was.

    Of two drivers that do so at once the first to end removes `work/`, maybe while the other reads
    there: that one then has the first one's counts, or should the first have died, begins anew.

    Args:
        store: where it writes.
        config: the sources and the split settings.
        seed: of order and splits.
        known: the sources' fingerprints of which its key was made; None: as they are now.

    Returns:
        The counts for the manifest; rows_in = pairs + merged_duplicates + Σ rejects, where a list
        counts as its pairs.

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
            counts = cast("PreparedCounts", Manifest.read(store).counts)  # by another command
            clear(store)
            return counts
    raise missing


def _prepare(
    store: Store, config: PrepareConfig, seed: int, known: list[Fingerprint]
) -> PreparedCounts:
    planned = plan(config)
    _refuse_changed(store, config, known, "before it was read")
    for line in planned.remarks:
        logger.warning("prepare: %s", line)
    _check_placement(config.num_cpus)
    _read(store, planned, config, seed)
    _refuse_changed(store, config, known, "while it was read", more=True)
    read = piece_summaries(store)
    late_columns.refuse_unmet(planned.pieces, read)
    damaged = _damaged_files(planned, read, config)
    rejects, lists = _set_aside(store, read, config.max_reject_fraction)
    kept = _kept_types(read, config)
    rows = tuple(name for piece in read for name in piece.files)
    leaks = planned.n_buckets if planned.may_leak else 0
    layouts = [piece.layout for piece in planned.pieces]
    together = comparing(layouts, config.pairing, seed, planned.kind)
    _write(buckets.Work(store, rows, leaks, together), planned, config, kept, seed)
    written = buckets.bucket_summaries(store, planned.n_buckets)
    rejects.merge(Tally(added(bucket.rejects for bucket in written)))
    counts = prepared_counts(planned, read, written, rejects, kept, damaged)
    made = lists.rows_of(counts["rows_in"])  # each is used now, a copy, or a reject
    left = counts["pairs"] + sum(counts.get("answers_alone", {}).values())
    refuse_past(config.max_reject_fraction, rejects, made, left, store.uri)
    for level, line in in_words(counts, read, rejects, config):
        logger.log(level, "prepare: %s", line)
    for line in late_columns.lost(planned.pieces, late_columns.unread_of(planned.pieces, read)):
        logger.warning("prepare: %s", line)
    clear(store)
    return counts


def _set_aside(store: Store, read: list[PieceSummary], most: float) -> tuple[Tally, ListCounts]:
    """What was set aside while rows were read, and what became of lists.

    Raises:
        RejectsError: past that share of rows, or of the responses in lists.
    """
    rejects = Tally()
    for piece in read:
        rejects.merge(piece.tally)
    rows_in, (lists, of_responses) = sum(piece.rows_in for piece in read), of_lists(read)
    left = lists.rows_of(rows_in) - rejects.reasons.total()
    refuse_past(most, rejects, rows_in, left, store.uri)
    if fault := lists.fault(most, of_responses.lines()):
        raise RejectsError(f"{fault}\n  see {store.uri}/rejects")
    return rejects, lists


def clear(store: Store) -> None:
    """Removes what nobody reads any more; a driver that is still at work there notices."""
    try:
        store.remove("work")
    except StorageError as error:  # no reason to end a run
        logger.warning("prepare: %s/work is of no more use, but stays: %s", store.uri, error)


def _refuse_changed(
    store: Store, config: PrepareConfig, known: list[Fingerprint], when: str, *, more: bool = False
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
    for fault in task_faults("prepare.", "num_cpus", num_cpus, alive_machines()):
        raise ConfigError(fault)


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


def _write(
    work: buckets.Work, planned: Plan, config: PrepareConfig, kept: dict[str, str], seed: int
) -> None:
    count = planned.n_buckets
    if work.leaks:
        run_tasks(partial(buckets.write_leaks, work), count, config.num_cpus)
    first: tuple[int, ...] = (0,)
    if count > 1:
        task = partial(buckets.count_shards, work, rows_per_shard=config.rows_per_shard)
        run_tasks(task, count, config.num_cpus)
        first = buckets.number_shards(work.store, count)
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


STAGE = Stage(PrepareSettings, nodes, make, work, clear)
