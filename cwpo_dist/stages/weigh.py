"""pairs, scores → preferences: who won, by what margin, how confidently, with what weight.

Each shard is a Ray task that decides alone. What a pair's weight needs to know of all others is
two numbers, found in passes of their own where they are asked for: the fitted temperature, and the
last pair of the top share.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from cwpo_dist.pairs.labels import Decision, LabelSource, Opinion, decide
from cwpo_dist.pairs.records import TEXTS, kind_of, preference_schema, read_pairs
from cwpo_dist.pairs.stored import pair_rows, preference_table
from cwpo_dist.scoring.pipeline import counted, part, read_counts
from cwpo_dist.stages.annotations import TASK_CPUS, Annotated, annotated, are_few, gather
from cwpo_dist.stages.context import Context
from cwpo_dist.stages.graph import Node
from cwpo_dist.storage import StorageError, Store
from cwpo_dist.weighting import Selection, confidence, last_of_top, sigmoid, weights

CONFIDENCES = pa.schema([("pair_id", pa.string()), ("confidence", pa.float64())])


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `preferences/part-*.parquet` (TRL's names) and returns the counts."""
    read = annotated(context, node)
    shards = Shards(
        annotated=read,
        output=context.place(node),
        labels=node.settings["labels"],
        splits=tuple(node.settings["splits"]),
        weight_function=node.settings["weight_function"],
        message_keys=tuple(context.counts(node.inputs["prepare"])["message_keys"]),
    )
    selection = Selection(_last(shards, node), node.settings["min_confidence"])
    return _summary(_write(shards, selection), read)


@dataclass(frozen=True)
class Shards:
    """What a task needs to weigh one shard.

    Attributes:
        annotated: the pairs and what the annotators say of them.
        output: the folder of this stage.
        labels: whose choice counts.
        splits: the splits to train on.
        weight_function: its name.
        message_keys: what the run's messages have beside role and content, and `tools`.
    """

    annotated: Annotated
    output: Store
    labels: LabelSource
    splits: tuple[str, ...]
    weight_function: str
    message_keys: tuple[str, ...] = ()

    def confidences(self, index: int) -> pa.Table:
        """Ids and confidences of one shard's pairs."""
        pairs = self.annotated.rows(index, ["pair_id", "label", "split"])
        opinions, _ = self.annotated.opinions(index)
        decisions = decide(pairs, opinions, self.labels, self.splits)
        found = {"pair_id": list(decisions), "confidence": _confidences(decisions)}
        return pa.table(found, schema=CONFIDENCES)

    def write(self, selection: Selection, row: dict[str, Any]) -> dict[str, Any]:
        """Writes one shard's preferences; its counts, and what storage had against it.

        A shard that was committed before is not weighed again: its file carries its counts.
        """
        index = int(row["shard"])
        name, refused = part("preferences", index), ""
        if self.output.exists(name):
            return {"shard": index, "refused": "", **read_counts(self.output, name)}
        table, counts = self._weighed(index, selection)
        try:
            self.output.create_table(name, counted(table, counts))
        except StorageError as error:  # handed on as a value: Ray would wrap it in its own
            refused = str(error)
        return {"shard": index, "refused": refused, **counts}

    def _weighed(self, index: int, selection: Selection) -> tuple[pa.Table, dict[str, float]]:
        """The preferences of one shard, and numbers that add up over all of them."""
        columns = ["pair_id", *TEXTS, "tools", "label", "split"]
        pairs = read_pairs(self.annotated.pairs, part("pairs", index), columns)
        rows, (opinions, alone) = pair_rows(pairs), self.annotated.opinions(index)
        decisions = decide(rows, opinions, self.labels, self.splits)
        kept = list(self._preferences(rows, decisions, selection))
        wanted = {pair["pair_id"] for pair in rows if pair["split"] in self.splits}
        counts = self._counts(decisions, opinions or {}, kept)
        more = set(self.message_keys)
        schema = preference_schema(
            kind_of(pairs), keys=bool(more - {"tools"}), tools="tools" in more
        )
        table = preference_table(kept, schema)
        return table, counts | {"alone": len(wanted & alone)}

    def _preferences(
        self, pairs: list[dict[str, Any]], decisions: dict[str, Decision], selection: Selection
    ) -> Iterator[dict[str, Any]]:
        """The pairs that selection keeps, in the order of the shard."""
        sure = dict(zip(decisions, _confidences(decisions), strict=True))
        weight = dict(zip(decisions, self._weights(decisions), strict=True))
        for pair in pairs:
            pair_id = pair["pair_id"]
            if pair_id not in decisions or not selection.keeps(sure[pair_id], pair_id):
                continue
            decision = decisions[pair_id]
            a, b = pair["response_a"], pair["response_b"]
            chosen, rejected = (a, b) if decision.label == "a" else (b, a)
            yield {
                "pair_id": pair_id,
                "prompt": pair["prompt"],
                "chosen": chosen,
                "rejected": rejected,
                "tools": pair["tools"],
                "label": decision.label,
                "margin": decision.margin,
                "disagreement": decision.disagreement,
                "probability": _probability(decision),
                "confidence": None if decision.margin is None else sure[pair_id],
                "weight": weight[pair_id],
            }

    def _weights(self, decisions: dict[str, Decision]) -> list[float]:
        """One a decision; a human's choice counts as certain."""
        if self.labels == "human":
            return [1.0] * len(decisions)
        margin = np.array([d.margin for d in decisions.values()], dtype=np.float64)
        disagreement = np.array([d.disagreement or 0.0 for d in decisions.values()])
        found: list[float] = weights(self.weight_function, margin, disagreement).tolist()
        return found

    def _counts(
        self,
        decisions: dict[str, Decision],
        opinions: dict[str, Opinion],
        kept: list[dict[str, Any]],
    ) -> dict[str, float]:
        scored = {i: d for i, d in decisions.items() if d.margin is not None}
        annotators = len(self.annotated.scores)
        return {
            "pairs": len(decisions),
            "selected": len(kept),
            "scored": len(scored),
            "ties": sum(d.margin == 0.0 for d in scored.values()),
            "partial": sum(opinions[i].scored < annotators for i in scored),
            "contested": sum(opinions[i].dissent > 0 for i in scored),
            "confidence": sum(_confidences(scored)),
            "disagreement": sum(d.disagreement or 0.0 for d in scored.values()),
            "weight": sum(row["weight"] for row in kept),
        }


def _probability(decision: Decision) -> float | None:
    """The annotator's probability that the chosen answer is better, σ(m); None for a human's."""
    return None if decision.margin is None else sigmoid(np.array([decision.margin])).item()


def _confidences(decisions: dict[str, Decision]) -> list[float]:
    """One a decision; a human's choice counts as certain."""
    margins = [math.inf if d.margin is None else d.margin for d in decisions.values()]
    found: list[float] = confidence(np.array(margins, dtype=np.float64)).tolist()
    return found


def _last(shards: Shards, node: Node) -> tuple[float, str] | None:
    """The last pair of the top share.

    The driver holds 8 bytes of confidence and 36 of id a pair, and the confidences twice more
    while it looks for the last: 60 MB a million pairs. Measured at 1,000,448 pairs of two
    annotators, temperatures fitted: it grew by 98 MiB, Ray's own buffers among them.
    """
    if node.settings["top_fraction"] is None:
        return None
    found = gather(shards.confidences, shards.annotated.shards, CONFIDENCES)
    confidences = found["confidence"].to_numpy()
    return last_of_top(confidences, found["pair_id"], node.settings["top_fraction"])


def _write(shards: Shards, selection: Selection) -> Counter[str]:
    """Writes every shard's preferences and returns the sums of their counts.

    Raises:
        StorageError: when storage refuses a write.
    """
    count, write = shards.annotated.shards, partial(shards.write, selection)
    numbers = [{"shard": index} for index in range(count)]
    if are_few(count):
        done = [write(number) for number in numbers]
    else:
        tasks = ray.data.from_items(numbers, override_num_blocks=count)
        done = tasks.map(write, num_cpus=TASK_CPUS).take_all()
    totals: Counter[str] = Counter()
    for row in sorted(done, key=lambda row: int(row["shard"])):  # so that sums repeat to the bit
        if row["refused"]:
            raise StorageError(row["refused"])
        totals.update({name: row[name] for name in row if name not in {"shard", "refused"}})
    return totals


def _summary(totals: Counter[str], read: Annotated) -> dict[str, Any]:
    """The counts of the manifest; what only an ensemble has is there for an ensemble alone."""
    scored, selected = totals["scored"], totals["selected"]
    counts: dict[str, Any] = {
        "pairs": totals["pairs"],
        "selected": selected,
        "ties": totals["ties"],
        "mean_confidence": totals["confidence"] / scored if scored else None,
        "mean_weight": totals["weight"] / selected if selected else None,
    }
    if not scored:
        return counts
    counts["temperatures"] = [temperature * read.scale.joint for temperature in read.scale.members]
    if len(read.scores) > 1:
        counts["ensemble"] = {
            "annotators": len(read.scores),
            "partial": totals["partial"],
            "alone": totals["alone"],
            "contested": totals["contested"],
            "mean_disagreement": totals["disagreement"] / scored,
        }
    return counts
