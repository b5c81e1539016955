"""What became of pieces and buckets in; the counts of `prepare`'s manifest out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import NotRequired, TypedDict, TypeVar

from cwpo_dist.config import Split
from cwpo_dist.pairs import numbers
from cwpo_dist.pairs.alone import AloneCounts
from cwpo_dist.pairs.buckets import BucketSummary
from cwpo_dist.pairs.listing import LeftOut
from cwpo_dist.pairs.numbers import Own
from cwpo_dist.pairs.piece_summary import PieceSummary
from cwpo_dist.pairs.records import Kind
from cwpo_dist.pairs.rejects import Tally
from cwpo_dist.pairs.row_forms import ListCounts
from cwpo_dist.pairs.sources import Plan
from cwpo_dist.pairs.splits import SPLITS
from cwpo_dist.pairs.unread import Unread

_FILES_LISTED = 100
K = TypeVar("K", bound=Hashable)


class _OfSources(TypedDict):
    kind: Kind
    formats: dict[str, str]
    columns: dict[str, str]
    files_left_out: dict[str, object]
    keep_columns: dict[str, str]


class _OfRows(TypedDict):
    rows_in: int
    rejects: dict[str, int]
    void_numbers: dict[str, int]
    not_read: dict[str, dict[str, dict[str, int]]]
    message_keys: list[str]
    votes_against_label: int
    damaged_files: int


class _OfPairs(TypedDict):
    pairs: int
    merged_duplicates: int
    conflicting_labels: int
    conflicting_numbers: int
    ties: int
    numbers: dict[Own, int]
    shards: int


class _OfSplits(TypedDict):
    splits: dict[Split, int]
    labelled: dict[Split, int]
    prompts: dict[Split, int]
    answers: dict[Split, int]


class _Lists(TypedDict):
    """What became of rows that hold lists of responses, by the names of `ListCounts`."""

    rows: int
    responses: int
    repeated: int
    set_aside: dict[str, int]
    pairs: int
    ties: int


class _OfLists(TypedDict):
    lists: NotRequired[_Lists]


class _OfAlone(TypedDict):
    alone: NotRequired[dict[str, int]]
    answers_alone: NotRequired[dict[Split, int]]
    prompts_alone: NotRequired[dict[Split, int]]


class PreparedCounts(_OfSources, _OfRows, _OfPairs, _OfSplits, _OfLists, _OfAlone):
    """What the manifest of `prepare` counts, by the names that it has there.

    Attributes:
        kind: `text` or `conversational`.
        formats, columns: by source, how its rows are spelled, and which columns were read.
        files_left_out: files below a source that are of no kind that is read.
        keep_columns: the types of kept columns.
        rows_in: rows that were read; rows_in = pairs + merged_duplicates + rejects, where a list
            counts as its pairs.
        rejects: rows that were set aside, by reason.
        void_numbers: rows whose own numbers cannot be used, by reason.
        not_read: by source, what nothing reads, with the rows that have a value there.
        message_keys: those that messages have beside role and content, and `tools`.
        votes_against_label: rows whose votes prefer another answer than their label.
        damaged_files: files that could not be read to their end.
        pairs: that were written.
        merged_duplicates: copies of a pair that became one.
        conflicting_labels, conflicting_numbers: pairs whose copies differ, and lose it.
        ties: pairs that people found equal.
        numbers: pairs with numbers of their own, by kind.
        shards: files of pairs.
        splits, labelled: by split, pairs, and those of them with a label.
        prompts, answers: by split, the different ones in its pairs. A prompt may be in `labelled`
            and in `unlabelled` and counts in both, as do its answers.
        lists: what became of rows with lists of responses, where there are some.
        alone: the same of responses in rows of their own.
        answers_alone, prompts_alone: by split, such answers that stand in no pair, and their
            prompts.
    """


def prepared_counts(
    planned: Plan,
    read: Sequence[PieceSummary],
    written: Sequence[BucketSummary],
    rejects: Tally,
    kept: dict[str, str],
    damaged: int,
) -> PreparedCounts:
    """The counts; rows_in = pairs + merged_duplicates + Σ rejects.

    A list, and all rows of one response, count as the pairs that are made of them.

    Args:
        planned: the sources.
        read: what became of their pieces.
        written: what became of the buckets.
        rejects: all that was set aside, by either.
        kept: the types of kept columns.
        damaged: how many files could not be read to their end.
    """
    rows, pairs = _of_rows(read, rejects, damaged), _of_pairs(planned, written)
    (lists, _), alone = of_lists(read), of_alone(written)
    accounted = pairs["pairs"] + pairs["merged_duplicates"] + rejects.reasons.total()
    made = rows["rows_in"] - lists.rows + lists.pairs - alone.rows + alone.pairs
    assert made == accounted, (rows, pairs, lists, alone)
    return {
        **_of_sources(planned, kept),
        **rows,
        **pairs,
        **_of_splits(written),
        **_of_lists(planned, read),
        **_of_alone(planned, written, alone),
    }


def _of_alone(planned: Plan, written: Sequence[BucketSummary], alone: AloneCounts) -> _OfAlone:
    if not any("response" in piece.layout.columns for piece in planned.pieces):
        return {}
    return {
        "alone": asdict(alone),
        "answers_alone": _by_split(bucket.answers_alone for bucket in written),
        "prompts_alone": _by_split(bucket.prompts_alone for bucket in written),
    }


def of_alone(written: Iterable[BucketSummary]) -> AloneCounts:
    """What became of all responses in rows of their own."""
    return sum((AloneCounts(**bucket.alone) for bucket in written), AloneCounts())


def _of_lists(planned: Plan, read: Sequence[PieceSummary]) -> _OfLists:
    if not any("responses" in piece.layout.columns for piece in planned.pieces):
        return {}
    lists, set_aside = of_lists(read)
    return {
        "lists": {
            "rows": lists.rows,
            "responses": lists.responses,
            "repeated": lists.repeated,
            "set_aside": dict(set_aside.reasons.most_common()),
            "pairs": lists.pairs,
            "ties": lists.ties,
        }
    }


def of_lists(read: Iterable[PieceSummary]) -> tuple[ListCounts, Tally]:
    """What became of all lists, and why responses of them were set aside."""
    counts, set_aside = ListCounts(), Tally()
    for piece in read:
        counts += piece.of_lists[0]
        set_aside.merge(piece.of_lists[1])
    return counts, set_aside


def _of_sources(planned: Plan, kept: dict[str, str]) -> _OfSources:
    return {
        "kind": planned.kind,
        "formats": {piece.source: piece.layout.format for piece in planned.pieces},
        "columns": {piece.source: piece.layout.described() for piece in planned.pieces},
        "files_left_out": _left_out(planned.left_out),
        "keep_columns": kept,
    }


def _of_rows(read: Sequence[PieceSummary], rejects: Tally, damaged: int) -> _OfRows:
    return {
        "rows_in": sum(piece.rows_in for piece in read),
        "rejects": dict(rejects.reasons.most_common()),
        "void_numbers": dict(added(piece.void for piece in read).most_common()),
        "not_read": _not_read(read),
        "message_keys": sorted({key for piece in read for key in piece.message_keys}),
        "votes_against_label": sum(piece.votes_against for piece in read),
        "damaged_files": damaged,
    }


def _of_pairs(planned: Plan, written: Sequence[BucketSummary]) -> _OfPairs:
    return {
        "pairs": sum(bucket.pairs for bucket in written),
        "merged_duplicates": sum(bucket.merged_duplicates for bucket in written),
        "conflicting_labels": sum(bucket.conflicting_labels for bucket in written),
        "conflicting_numbers": sum(bucket.conflicting_numbers for bucket in written),
        "ties": sum(bucket.ties for bucket in written),
        "numbers": _numbers(planned, written),
        "shards": sum(bucket.shards for bucket in written),
    }


def _of_splits(written: Sequence[BucketSummary]) -> _OfSplits:
    return {
        "splits": _by_split(bucket.splits for bucket in written),
        "labelled": _by_split(bucket.labelled for bucket in written),
        "prompts": _by_split(bucket.prompts for bucket in written),
        "answers": _by_split(bucket.answers for bucket in written),
    }


def _by_split(counts: Iterable[Mapping[Split, int]]) -> dict[Split, int]:
    """Their sums, of every split."""
    total = added(counts)
    return {split: total[split] for split in SPLITS}


def _numbers(planned: Plan, written: Iterable[BucketSummary]) -> dict[Own, int]:
    """Pairs with a number of their own, of each kind that some source has."""
    own = added(bucket.numbers for bucket in written)
    there = {kind for piece in planned.pieces for kind in numbers.kinds(piece.layout.columns)}
    return {kind: own[kind] for kind in numbers.COLUMNS if kind in there}


def _not_read(read: Iterable[PieceSummary]) -> dict[str, dict[str, dict[str, int]]]:
    unread = dict[str, Unread]()
    for piece in read:
        unread.setdefault(piece.source, Unread()).add(piece.unread)
    return {source: asdict(each) for source, each in unread.items() if each}


def _left_out(left_out: Sequence[LeftOut]) -> dict[str, object]:
    """How many files no source reads, and the first of them."""
    return {
        "count": len(left_out),
        "files": [asdict(each) for each in left_out[:_FILES_LISTED]],
    }


def added(counts: Iterable[Mapping[K, int]]) -> Counter[K]:
    """The sums of counts."""
    total: Counter[K] = Counter()
    for each in counts:
        total.update(each)
    return total
