"""The counts of `prepare`'s manifest in; the lines that its log says of them out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from cwpo_dist.config import PrepareConfig, Split
from cwpo_dist.pairs.alone import AloneCounts
from cwpo_dist.pairs.piece_summary import PieceSummary
from cwpo_dist.pairs.rejects import Tally
from cwpo_dist.pairs.row_forms import ListCounts
from cwpo_dist.pairs.sources import MAP_LABELS
from cwpo_dist.pairs.splits import SPLITS
from cwpo_dist.pairs.unread import Unread
from cwpo_dist.runs.prepared_counts import PreparedCounts, of_lists

Said = Iterator[tuple[int, str]]  # the level of a line of the log, and its text


def in_words(
    counts: PreparedCounts, read: Sequence[PieceSummary], rejects: Tally, config: PrepareConfig
) -> Said:
    """What a reader of the log should know of them."""
    yield from _rows_told(counts, rejects)
    yield from _lists_told(*of_lists(read))
    if "alone" in counts:
        for line in AloneCounts(**counts["alone"]).sentences():
            yield logging.INFO, line
    if counts["pairs"]:
        yield from _numbers_told(counts, read)
    yield from _rest_told(counts)
    if counts["pairs"]:
        yield from _empty_told(counts, config)


def _rows_told(counts: PreparedCounts, rejects: Tally) -> Said:
    """What became of the rows, and where the pairs are."""
    yield (
        logging.INFO,
        f"{counts['rows_in']} rows: {counts['pairs']} pairs, {counts['merged_duplicates']} copies "
        f"of pairs merged ({counts['conflicting_labels']} with conflicting labels), "
        f"{rejects.reasons.total()} set aside",
    )
    for line in rejects.lines(most=len(rejects.reasons)):
        yield logging.INFO, f"set aside:{line.removeprefix(' ')}"
    told = [f"{split} {counts['splits'][split]} ({counts['labelled'][split]})" for split in SPLITS]
    yield logging.INFO, f"pairs by split (with a label): {', '.join(told)}"


def _lists_told(lists: ListCounts, set_aside: Tally) -> Said:
    """What became of lists of responses."""
    if lists.rows:
        yield logging.INFO, lists.sentence()
    for line in set_aside.lines(most=len(set_aside.reasons)):
        yield logging.INFO, f"responses set aside:{line.removeprefix(' ')}"


def _numbers_told(counts: PreparedCounts, read: Sequence[PieceSummary]) -> Said:
    """Of the data's own numbers: how many there are, and which cannot be used."""
    for own, pairs in counts["numbers"].items():
        yield logging.INFO, f"{own}: the data's own, of {pairs} of {counts['pairs']} pairs"
    for why, rows in counts["void_numbers"].items():
        first = next(piece.void_first[why] for piece in read if why in piece.void_first)
        yield (
            logging.WARNING,
            f"{why}, of {rows} rows (first: {first}): they count as without it",
        )
    if counts["conflicting_numbers"]:
        yield (
            logging.WARNING,
            f"copies of {counts['conflicting_numbers']} pairs have different numbers, which then "
            "count as none",
        )


def _rest_told(counts: PreparedCounts) -> Said:
    for source, unread in counts["not_read"].items():
        for sentence in Unread(**unread).sentences():
            yield logging.WARNING, f"{source}: {sentence}"
    if counts["votes_against_label"]:
        yield (
            logging.WARNING,
            f"in {counts['votes_against_label']} rows more people voted for the other answer than "
            "for the one that the label names; the label counts",
        )
    if counts["ties"]:
        yield logging.INFO, f"{counts['ties']} pairs are ties, kept without a label"


def _empty_told(counts: PreparedCounts, config: PrepareConfig) -> Said:
    """Names each split that has a share and no pair, with what would give it one."""
    shares: dict[Split, float] = {
        "labelled": config.labelled_fraction,
        "validation": config.validation_fraction,
        "test": config.test_fraction,
    }
    for split, share in shares.items():
        if share and not counts["splits"][split]:
            remedy = _remedy(split, share, counts["labelled"], config)
            yield (
                logging.WARNING,
                f"no pair is in split {split}, though prepare.{split}_fraction is {share:g}; "
                f"{remedy}",
            )


def _remedy(split: Split, share: float, labelled: dict[Split, int], config: PrepareConfig) -> str:
    if split == "labelled" and not labelled["labelled"] + labelled["unlabelled"]:
        return f"no training pair has a label: {MAP_LABELS}"
    if split != "labelled" and all(source.into for source in config.sources):
        return "every source goes to one side (`into`), so that no share acts: set it to 0"
    # A hash knows no quota: of a few prompts or groups none may fall into a small share.
    larger = "a larger fraction, " if share < 1 else ""
    return f"take {larger}another seed, or a source of its own (`into`)"
