"""The rows of a bucket in; a row for all copies of a pair, given or made, and answers alone out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cwpo_dist.pairs import numbers
from cwpo_dist.pairs.alone import AloneCounts, Comparing, are_alone, are_named, pairs_made
from cwpo_dist.pairs.records import rows_of, table_of
from cwpo_dist.pairs.splits import merge
from cwpo_dist.pairs.stored import Told


@dataclass(frozen=True)
class Gathered:
    """A bucket's pairs, a row each in the order of their ids, and its answers that stand in none.

    Attributes:
        pairs: given, and made ones without texts.
        alone: the answers, as pairs with themselves.
        paired: those that stand in pairs, the same way: theirs are the texts of made ones.
        copies: how many rows of pairs were merged into others.
        conflicts: pairs whose copies have different labels.
        differing: those whose copies have different numbers.
        counts: what became of answers in rows of their own.
    """

    pairs: pa.Table
    alone: pa.Table
    paired: pa.Table
    copies: int
    conflicts: int
    differing: int
    counts: AloneCounts

    @property
    def ids(self) -> pa.Array:
        """The ids by which shards are cut, sorted."""
        both = [*self.pairs["pair_id"].chunks, *self.alone["pair_id"].chunks]
        return pa.chunked_array(both, pa.string()).combine_chunks().sort()


def gathered(rows: pa.Table, comparing: Comparing | None) -> Gathered:
    """The rows that stay, put together."""
    counts, none = AloneCounts(), rows.slice(0, 0)
    if comparing is None:  # as most data are
        pairs, conflicts, differing = _merge_copies(rows)
        return Gathered(pairs, none, none, len(rows) - len(pairs), conflicts, differing, counts)
    are = are_alone(rows)
    given, single = rows.filter(pc.invert(are)), rows.filter(are)
    alone, _, counts.rated_twice = _merge_copies(single)
    counts.rows, counts.answers = len(single), len(alone)
    made = pairs_made(alone, comparing, counts)
    rows = pa.concat_tables([given, made]).sort_by("pair_id")  # stable: those given come first
    pairs, conflicts, differing = _merge_copies(rows)
    pairs = _as_first_read(pairs, rows)
    named = are_named(alone, pairs)
    paired, alone = alone.filter(named), alone.filter(pc.invert(named))
    counts.in_no_pair = len(alone)
    return Gathered(pairs, alone, paired, len(rows) - len(pairs), conflicts, differing, counts)


def _merge_copies(rows: pa.Table) -> tuple[pa.Table, int, int]:
    """One row for all copies of a pair, which lie side by side.

    Returns:
        The rows, and of how many the labels conflicted, and the data's own numbers.
    """
    starts = _starts(rows)
    if len(starts) == len(rows):
        return rows, 0, 0
    ends = np.append(starts[1:], len(rows))
    pairs, all_copies = rows.take(starts), rows.select(Told._fields)
    values = rows_of(Told, pairs)
    # Who was asked for a label of a pair said it of a copy: one that may be used is enough.
    usable = rows["in_labelled_part"].to_numpy(zero_copy_only=False)
    usable = pa.array(np.logical_or.reduceat(usable, starts))
    place = pairs.schema.get_field_index("in_labelled_part")
    pairs = pairs.set_column(place, "in_labelled_part", usable)
    conflicts = differing = 0
    for place in np.flatnonzero(ends - starts > 1):
        copies = rows_of(Told, all_copies.slice(starts[place], ends[place] - starts[place]))
        agreed, differ = numbers.agreed(copies)
        values[place], conflict = merge([agreed, *copies[1:]])
        conflicts, differing = conflicts + conflict, differing + differ
    merged = table_of(values, all_copies.schema)
    for name in Told._fields:
        pairs = pairs.set_column(pairs.schema.get_field_index(name), name, merged[name])
    return pairs, conflicts, differing


def _as_first_read(pairs: pa.Table, rows: pa.Table) -> pa.Table:
    """With source and kept columns of the copy that was read first, given or made.

    Args:
        pairs: one for all copies.
        rows: the copies, sorted by `pair_id`.
    """
    order = [(name, "ascending") for name in ("pair_id", "piece", "number")]
    first = rows.take(pc.sort_indices(rows, sort_keys=order)).take(_starts(rows))
    for name in ("source", "kept"):
        pairs = pairs.set_column(pairs.schema.get_field_index(name), name, first[name])
    return pairs


def _starts(rows: pa.Table) -> NDArray[np.intp]:
    """Where the copies of each pair begin."""
    ids = rows["pair_id"].combine_chunks()
    is_first = np.ones(len(ids), bool)
    is_first[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    return np.flatnonzero(is_first)
