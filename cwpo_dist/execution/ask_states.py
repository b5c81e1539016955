"""An annotator's last hidden states in; which labels would teach it most, together, out.

A pass of its own over the answers of training pairs, as `annotate` makes it, has of each answer
its projected state and its score.

Shapes: N = pairs, H = numbers of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cwpo_dist.acquisition import RIDGE, informative, whitened
from cwpo_dist.pairs.records import HEADS_SCHEMA, prompts_of, read_records
from cwpo_dist.pairs.stored import pair_schema, shard_file
from cwpo_dist.runs.annotations import gather
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node, Nodes, scored
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.scoring.scorers import states_module
from cwpo_dist.stages.annotate import AnnotateSettings, annotator, limit_of, shard_job
from cwpo_dist.storage import Store
from cwpo_dist.weighting import sigmoid

DECIDES = ("pair_id", "label", "tie", "split")
_ROWS = pa.schema(
    [
        *(("pair_id", pa.string()), ("shard", pa.int32()), ("free", pa.bool_())),
        ("difference", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class StatesSettings(AnnotateSettings):
    """What the pass is told: as `annotate` is, of training pairs."""

    stage = "states"
    format = 1
    scores = False


def states_node(nodes: Nodes) -> Node[StatesSettings]:
    """The states of the first annotator that a run would score by."""
    first = next(iter(scored(nodes).values()))
    told = {each.name: getattr(first.settings, each.name) for each in fields(first.settings)}
    return Node(StatesSettings(**told | {"splits": ("labelled", "unlabelled")}), first.inputs)


def make_states(context: Context, node: Node[StatesSettings]) -> Mapping[str, object]:
    """Writes `scores/`, whose heads are a projected state and, last, the score."""
    job, limit = shard_job(context, node), limit_of(context, node)
    job = replace(job, make_worker=partial(job.make_worker, load=states_module))
    counts = node.settings.by.run(job, annotator(context, node), states_module, limit.check)
    limit.check(counts, whole=True)
    return counts


def worth_together(
    context: Context, node: Node, free: Callable[[pa.Table], pa.Array], budget: int
) -> pa.Table:
    """The candidates; the first that is picked is worth most, one that is not −∞.

    NaN where the annotator could not read both answers.

    Args:
        context: the run.
        node: reads `prepare` and the states.
        free: which pairs of a table are candidates.
        budget: how many are picked at most.
    """
    pairs, states = (context.place(node.inputs[name]) for name in ("prepare", "states"))
    task = partial(_differences, pairs, states, free)
    rows = gather(task, context.shards(node), _ROWS).sort_by("pair_id")
    is_free, known = rows["free"].to_numpy(), pc.is_valid(rows["difference"]).to_numpy()
    worth = np.where(known, -np.inf, np.nan)
    places = np.flatnonzero(known & is_free)
    if len(places):
        picked = _picked(rows.filter(pa.array(known)), budget)
        worth[places[picked]] = -np.arange(len(picked), dtype=np.float64)
    found = rows.select(["pair_id", "shard"]).append_column("worth", pa.array(worth))
    return found.filter(rows["free"])


def _picked(rows: pa.Table, budget: int) -> list[int]:
    """Which of the candidates; what is labelled already has its part in the curvature."""
    free, flat = rows["free"].to_numpy(), pc.list_flatten(rows["difference"]).to_numpy()
    *state, score = range(len(flat) // len(rows))
    x_NH = flat.reshape(len(rows), -1)
    margin_N = x_NH[:, score].astype(np.float64)
    chance_N = sigmoid(margin_N) * sigmoid(-margin_N)
    x_NH = whitened(x_NH[:, state])
    past_NH = x_NH[~free].astype(np.float64)
    past_HH = (past_NH * chance_N[~free, None]).T @ past_NH + RIDGE * np.eye(x_NH.shape[1])
    prompts = prompts_of(rows["pair_id"].filter(rows["free"])).combine_chunks()
    numbers = prompts.dictionary_encode().indices.to_numpy()
    return informative(x_NH[free], chance_N[free], past_HH, numbers, budget)


def _differences(
    pairs: Store, states: Store, free: Callable[[pa.Table], pa.Array], index: int
) -> pa.Table:
    """A shard's candidates and labelled pairs: states and scores, a − b; null where one lacks."""
    ids = ("answer_a", "answer_b")
    table = read_records(pairs, shard_file("pairs", index), pair_schema(), (*DECIDES, *ids))
    labelled = pc.and_(pc.equal(table["split"], "labelled"), pc.is_valid(table["label"]))
    table = table.append_column("free", free(table))
    table = table.filter(pc.or_(table["free"], labelled))
    found = read_records(states, part("scores", index), HEADS_SCHEMA, ("answer_id", "heads"))
    heads = pc.list_flatten(found["heads"]).to_numpy().reshape(len(found), -1 if len(found) else 1)
    answers = found["answer_id"].combine_chunks()
    a, b = (pc.index_in(table[name], value_set=answers) for name in ids)
    known = pc.and_(pc.is_valid(a), pc.is_valid(b))
    both = (place.filter(known).to_numpy() for place in (a, b))
    a_NH, b_NH = (heads[places] for places in both)
    is_known = known.to_numpy(zero_copy_only=False)
    ends = np.concatenate([[0], np.cumsum(is_known) * heads.shape[1]]).astype(np.int32)
    lists = pa.ListArray.from_arrays(ends, (a_NH - b_NH).ravel(), mask=pa.array(~is_known))
    columns = {"shard": pa.array([index] * len(table), pa.int32()), "difference": lists}
    columns |= {name: table[name] for name in ("pair_id", "free")}
    return pa.table(columns).select(_ROWS.names).cast(_ROWS)
