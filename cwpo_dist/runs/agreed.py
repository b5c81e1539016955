"""Held-out pairs, some judged by people and all by gold, in; who prefers what they prefer, out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cwpo_dist.config import Split
from cwpo_dist.pairs.chosen import Label, signs
from cwpo_dist.pairs.records import read_rows
from cwpo_dist.pairs.stored import pair_schema
from cwpo_dist.runs.annotations import Annotated, annotated
from cwpo_dist.runs.arms import Chooser
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.joined import Margins, pair_log_probs
from cwpo_dist.runs.output_key import Node
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.storage import Store

AGREED = "agreed.parquet"
AGREED_SCHEMA = pa.schema(
    [
        *(("pair_id", pa.string()), ("of", pa.string())),
        *(("people", pa.float64()), ("gold", pa.float64())),
    ]
)
Both = tuple[float, float]  # of answers a and b


class Agreed(NamedTuple):
    """Whether annotator or policy choose an answer of a held-out pair that others choose.

    Attributes:
        pair_id: of the pair.
        of: whose choice it is, of the `annotator` or the `policy`.
        people: 1: people choose the same answer, 0: the other; ½: a tie, on either side; null:
            nobody judged.
        gold: the same of the gold reward; null: it has none of an answer, most often a long one.
    """

    pair_id: str
    of: str
    people: float | None
    gold: float | None


class _Said(NamedTuple):
    pair_id: str
    label: Label | None
    tie: bool | None
    split: Split | None


def agreed(
    context: Context, node: Node, chooser: Chooser, split: Split, gold: Callable[[], Margins]
) -> list[Agreed]:
    """All pairs of a split; none where people judged each, so that gold has nothing to add.

    Args:
        context: the run.
        node: `evaluate`.
        chooser: that of `weigh`; of people's labels, and the data's own, no annotator is measured.
        split: the pairs'.
        gold: called where it is needed; what it has no margin of has no choice of gold.
    """
    said = [_said(context.prepared(node), index, split) for index in range(context.shards(node))]
    if not any(side is None for shard in said for side in shard.values()):
        return []
    by_gold, measured = gold(), {"policy": partial(_rewards, context, node)}
    if chooser.labels == "annotator" or chooser.judged is not None:
        given = annotated(context, node, chooser, judged=True)
        measured["annotator"] = partial(_opinions, given)
    return [
        Agreed(
            *(pair_id, of),
            None if side is None else _alike(known[pair_id], side),
            _alike(known[pair_id], by_gold[pair_id]) if pair_id in by_gold else None,
        )
        for of, margins in measured.items()
        for index, shard in enumerate(said)
        for known in [margins(index)]
        for pair_id, side in shard.items()
        if pair_id in known
    ]


def _said(prepared: Store, index: int, split: Split) -> dict[str, float | None]:
    """What people prefer, as a margin: 1, −1, or 0 in a tie; None: nobody judged."""
    found = read_rows(prepared, part("pairs", index), _Said, pair_schema())
    pairs = [pair for pair in found if pair.split == split]
    return {
        pair.pair_id: float(side) if side or pair.tie else None
        for pair, side in zip(pairs, signs([pair.label for pair in pairs]), strict=True)
    }


def _alike(ours: float, theirs: float) -> float:
    return (1 + float(np.sign(ours) * np.sign(theirs))) / 2


def _opinions(given: Annotated, index: int) -> Margins:
    opinions, _ = given.opinions(index)
    return {pair_id: found.margin for pair_id, found in (opinions or {}).items()}


def _rewards(context: Context, node: Node, index: int) -> Margins:
    """Differences a − b of the implicit reward, but for β."""
    return {
        pair_id: (after[0] - before[0]) - (after[1] - before[1])
        for pair_id, (after, before) in log_probs(context, node, index).items()
    }


def log_probs(context: Context, node: Node, index: int) -> dict[str, tuple[Both, Both]]:
    """Of a shard's pairs, by pair id: log-probs after the alignment and before, for the reward.

    Without a reference they are a token's mean, and 0 before.
    """
    prepared, reference = context.prepared(node), node.inputs.get("reference")
    new = pair_log_probs(context.place(node.inputs["aligned"]), prepared, index)
    if reference is None:
        return {pair_id: (of.means, (0.0, 0.0)) for pair_id, of in new.items()}
    old = pair_log_probs(context.place(reference), prepared, index)
    return {i: (of.sums, old[i].sums) for i, of in new.items() if i in old}
