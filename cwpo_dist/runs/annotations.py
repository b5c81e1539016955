"""pairs and their annotators' scores in; joined opinions, shard by shard, and held-out rows out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from cwpo_dist.evaluation.annotators import HeldOut
from cwpo_dist.evaluation.calibration import fit_scale, people_share
from cwpo_dist.evaluation.shares import Floats
from cwpo_dist.pairs.chosen import signs
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.labels import LabelSource, Opinion
from cwpo_dist.pairs.messages import plain_text
from cwpo_dist.pairs.numbers import Own
from cwpo_dist.pairs.records import content_hash, read_records, table_of
from cwpo_dist.pairs.stored import Judgement, Pair, pair_schema, read_judgements, read_pairs
from cwpo_dist.runs.arms import Chooser, Weighting
from cwpo_dist.runs.context import Context, annotator_name
from cwpo_dist.runs.joined import Margins, ScoresIn
from cwpo_dist.runs.output_key import Node, annotators, heads_of, members
from cwpo_dist.runs.own_numbers import chosen
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.storage import Store
from cwpo_dist.weighting import Scale, join, margin_of

TASK_CPUS = 0.5  # of a task that reads one shard: beside whatever else a node does
# So many shards the driver reads itself: for seconds of work, Ray's tasks take longer to start.
FEW_SHARDS = 64
OWN = "the data's own"  # among the names of annotators
_OWN = ("pair_id", "label", "confidence", "score_a", "score_b")


@dataclass(frozen=True)
class OwnIn:
    """What the data have of their own, read like an annotator's scores.

    Attributes:
        pairs: the output folder of `prepare`.
        kind: two scores; or a confidence, whose side is the label's.
    """

    pairs: Store
    kind: Literal["scores", "confidence"]

    def read(self, index: int) -> Margins:
        """Of the pairs of one shard that have any; of a confidence, its margin."""
        table = read_records(self.pairs, part("pairs", index), pair_schema(), _OWN)
        if self.kind == "scores":
            table = table.filter(pc.is_valid(table["score_a"]))
            margin = table["score_a"].to_numpy() - table["score_b"].to_numpy()
        else:
            table = table.filter(pc.and_(*map(pc.is_valid, (table["confidence"], table["label"]))))
            margin = signs(table["label"].to_pylist()) * margin_of(table["confidence"].to_numpy())
        return dict(zip(table["pair_id"].to_pylist(), margin.tolist(), strict=True))


@dataclass(frozen=True)
class Annotated:
    """Pairs with the scores of their annotators; cheap to send to a worker.

    Attributes:
        pairs: the output folder of `prepare`.
        shards: how many pair files it has.
        scores: what each annotator gave, and the data's own where they count as one; none in a
            run without annotator.
        scale: what their margins are divided by.
    """

    pairs: Store
    shards: int
    scores: tuple[ScoresIn | OwnIn, ...]
    scale: Scale

    def read(self, index: int) -> list[Pair]:
        """The pairs of one shard."""
        return read_pairs(self.pairs, index)

    def judgements(self, index: int) -> list[Judgement]:
        """What of them decides, without their texts."""
        return read_judgements(self.pairs, part("pairs", index))

    def margins(self, index: int) -> tuple[list[str], Floats]:
        """The pairs of a shard that any annotator scored, and margins a − b, NaN where none is."""
        found = [each.read(index) for each in self.scores]
        ids = list(dict.fromkeys(pair_id for each in found for pair_id in each))
        columns = [[each.get(pair_id, np.nan) for pair_id in ids] for each in found]
        return ids, np.array(columns, dtype=np.float64).T.reshape(len(ids), len(found))

    def opinions(self, index: int) -> tuple[dict[str, Opinion] | None, set[str]]:
        """What the annotators say of each pair of a shard, and the pairs that too few scored.

        In a run without annotator there are no opinions: None.
        """
        if not self.scores:
            return None, set()
        ids, margins_NK = self.margins(index)
        joined = join(margins_NK, self.scale)
        several = len(self.scores) > 1
        known = np.isfinite(joined.margin)
        opinions = {
            ids[i]: Opinion(
                margin=float(joined.margin[i]),
                disagreement=float(joined.disagreement[i]) if several else None,
                dissent=float(joined.dissent[i]),
                lead=int(joined.lead[i]),
                scored=int(joined.scored[i]),
            )
            for i in np.flatnonzero(known)
        }
        return opinions, {ids[i] for i in np.flatnonzero(~known)}


def raw(context: Context, node: Node, chooser: Chooser, *, judged: bool = False) -> Annotated:
    """What a node reads, with margins as they are.

    Args:
        context: the run.
        node: `weigh`, or one that reads it or what it reads.
        chooser: that of `weigh`.
        judged: leave out what takes its side from the labels that it would be judged by.
    """
    pairs = context.place(node.inputs["prepare"])
    scores: list[ScoresIn | OwnIn] = [*scores_in(context, node)]
    own = own_kind(context, node, chooser)
    if own == "scores" or (own == "confidence" and chooser.own == "beside" and not judged):
        scores.append(OwnIn(pairs, own))
    return Annotated(pairs, context.shards(node), tuple(scores), Scale.raw(len(scores)))


def scores_in(context: Context, node: Node) -> list[ScoresIn]:
    """What each annotator gave that a node reads; of one with several heads, what each of them."""
    pairs = context.place(node.inputs["prepare"])
    return [
        _of_one(context, outputs, pairs, head)
        for outputs in annotators(node)
        for head in heads_of(outputs[0])
    ]


def _of_one(context: Context, outputs: Sequence[Node], pairs: Store, head: int | None) -> ScoresIn:
    """What one annotator gave, in however many folds."""
    given = [ScoresIn(context.place(each), each.retries, pairs, head=head) for each in outputs]
    return replace(given[0], others=tuple(given[1:]))


def own_kind(context: Context, node: Node, chooser: Chooser) -> Own | None:
    """Which of the data's own numbers act in what a node reads; None: none of them.

    Raises:
        OwnNumbersError: where the data lack them, or have several and none is named.
    """
    if chooser.own is None:
        return None
    there: dict[Own, int] = context.counts(node.inputs["prepare"])["numbers"]
    return chosen(chooser.column, there)


def label_source(context: Context, node: Node, chooser: Chooser) -> LabelSource:
    """Who decides the pairs of a `weigh` or `sft` node; of two scores the higher one does."""
    own = own_kind(context, node, chooser)
    if chooser.labels != "own":
        return chooser.judged or ("mixed" if chooser.with_human else chooser.labels)
    assert own is not None, "who chooses by own numbers has some"
    return "annotator" if own == "scores" else own


def names(context: Context, node: Node, given: Annotated) -> list[str]:
    """Of the annotators that were read, in their order."""
    found = [
        annotator_name(context, member) + ("" if head is None else f", head {head}")
        for member in members(node)
        for head in heads_of(member)
    ]
    return found + [OWN] * (len(given.scores) - len(found))


def decided_pairs(chooser: Chooser, counted: Census) -> int:
    """The pairs of which an arm's labels say which answer is chosen, before any work is done."""
    if chooser.labels == "own":
        return counted.own_pairs(chosen(chooser.column, counted.own), *chooser.splits)
    if chooser.labels == "human":
        return counted.labelled_pairs(*chooser.splits)
    if chooser.with_human:
        others = [split for split in chooser.splits if split != "labelled"]
        return counted.labelled_pairs("labelled") + counted.pairs(*others)
    return counted.pairs(*chooser.splits)


def kept_pairs(how: Weighting, counted: Census) -> int:
    """Those of them that `weigh` keeps at the most, before it drops what is too unsure."""
    decided = decided_pairs(how.chooser, counted)
    if how.pairing == "given":
        return decided
    return min(decided, counted.prompts_of(*how.chooser.splits))


def annotated(context: Context, node: Node, chooser: Chooser, *, judged: bool = False) -> Annotated:
    """What a node reads, as `raw`, its margins divided by what is told of their temperature.

    Raises:
        CalibrationError: for fitted temperatures, where the labels allow none.
    """
    found, temperature = raw(context, node, chooser, judged=judged), chooser.temperature
    if temperature is None or not found.scores:
        return found
    if temperature != "fitted":
        return replace(found, scale=Scale.raw(len(found.scores), temperature))
    assert chooser.calibration_split is not None, "said with temperature: fitted"
    held = held_out(found, chooser.calibration_split)
    of = [member.path for member in members(node) for _ in heads_of(member)]
    of += [OWN] * (len(found.scores) - len(of))
    fitted = fit_scale(held.margins_NK, held.people, held.prompts, of)
    return replace(found, scale=fitted.scale)


def held_out(given: Annotated, split: str) -> HeldOut:
    """The labelled and scored pairs of a split, in the order of their ids."""
    names = [f"margin_{k}" for k in range(len(given.scores))]
    schema = pa.schema(
        [
            *(("pair_id", pa.string()), ("label", pa.string()), ("prompt", pa.string())),
            *((name, pa.float64()) for name in ("people", "length_a", "length_b", *names)),
        ]
    )
    table = gather(partial(_held_out, given, split, schema), given.shards, schema)
    table = table.sort_by("pair_id")
    numbers = {field.name: table[field.name].to_numpy() for field in schema}
    return HeldOut(
        margins_NK=np.stack([numbers[name] for name in names], axis=1),
        labels=table["label"].to_pylist(),
        people=numbers["people"],
        length_a=numbers["length_a"],
        length_b=numbers["length_b"],
        prompts=table["prompt"].to_pylist(),
    )


def _held_out(given: Annotated, split: str, schema: pa.Schema, index: int) -> pa.Table:
    ids, margins_NK = given.margins(index)
    place = {pair_id: i for i, pair_id in enumerate(ids)}
    rows = [
        (
            pair.pair_id,
            pair.label,
            content_hash(pair.prompt),
            people_share(pair.told),
            *(len(plain_text(answer)) for answer in pair.answers),
            *margins_NK[place[pair.pair_id]].tolist(),
        )
        for pair in given.read(index)
        if pair.split == split and pair.label is not None and pair.pair_id in place
    ]
    return table_of(rows, schema)


def gather(task: Callable[[int], pa.Table], shards: int, schema: pa.Schema) -> pa.Table:
    """The tables that task(0) … task(shards - 1) return, as one, in any order of their rows.

    Each is a Ray task of its own, unless they are few.
    """
    if shards <= FEW_SHARDS:
        return pa.concat_tables([schema.empty_table(), *map(task, range(shards))])
    numbers = ray.data.from_items([{"shard": i} for i in range(shards)], override_num_blocks=shards)
    tables = numbers.map_batches(
        partial(_of_shard, task), batch_size=1, batch_format="pyarrow", num_cpus=TASK_CPUS
    )
    found: Iterable[pa.Table] = tables.iter_batches(batch_size=None, batch_format="pyarrow")
    return pa.concat_tables([schema.empty_table(), *(t.cast(schema) for t in found if t.num_rows)])


def _of_shard(task: Callable[[int], pa.Table], batch: pa.Table) -> pa.Table:
    return task(batch["shard"][0].as_py())
