"""pairs, scores → preferences: who won, by what margin, how confidently, with what weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from cwpo_dist.pairs.labels import Decision, decide
from cwpo_dist.pairs.records import kind_of, preference_schema
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages.context import Context, scores_by_pair
from cwpo_dist.stages.graph import Node
from cwpo_dist.weighting import WEIGHT_FUNCTIONS, confidence, select


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `preferences/part-*.parquet` (TRL's names) and returns the counts."""
    shards = [_decisions(context, node, index) for index in range(context.shards(node))]
    weights = _weights(node, {i: d for shard in shards for i, d in shard.items()})
    pairs = context.place(node.inputs["prepare"])
    for index, decisions in enumerate(shards):
        table = pairs.read_table(part("pairs", index))
        rows = list(_preferences(table.to_pylist(), decisions, weights))
        schema = preference_schema(kind_of(table))
        output = pa.Table.from_pylist(rows, schema=schema)
        context.place(node).create_table(part("preferences", index), output)
    confidences = [_confidence(d) for shard in shards for d in shard.values()]
    return {
        "pairs": len(confidences),
        "selected": len(weights),
        "ties": sum(value == 0.0 for value in confidences),
        "mean_confidence": _mean([value for value in confidences if value is not None]),
        "mean_weight": _mean(list(weights.values())),
    }


def _decisions(context: Context, node: Node, index: int) -> dict[str, Decision]:
    columns = ["pair_id", "label", "split"]
    pairs = context.place(node.inputs["prepare"]).read_table(part("pairs", index), columns)
    scores = scores_by_pair(context, node, index)
    return decide(pairs.to_pylist(), scores, node.settings["labels"], node.settings["splits"])


def _weights(node: Node, decisions: dict[str, Decision]) -> dict[str, float]:
    """The weight of each pair that selection keeps; a human's choice counts as certain."""
    weigh = WEIGHT_FUNCTIONS[node.settings["weight_function"]]
    kept = select(
        [1.0 if d.margin is None else confidence(d.margin) for d in decisions.values()],
        list(decisions),
        node.settings["top_fraction"],
        node.settings["min_confidence"],
    )
    return {
        pair_id: 1.0 if d.margin is None else weigh(d.margin)
        for (pair_id, d), keep in zip(decisions.items(), kept, strict=True)
        if keep
    }


def _preferences(
    pairs: list[dict[str, Any]], decisions: dict[str, Decision], weights: dict[str, float]
) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        if pair["pair_id"] not in weights:
            continue
        decision = decisions[pair["pair_id"]]
        a, b = pair["response_a"], pair["response_b"]
        chosen, rejected = (a, b) if decision.label == "a" else (b, a)
        yield {
            "pair_id": pair["pair_id"],
            "prompt": pair["prompt"],
            "chosen": chosen,
            "rejected": rejected,
            "label": decision.label,
            "margin": decision.margin,
            "confidence": _confidence(decision),
            "weight": weights[pair["pair_id"]],
        }


def _confidence(decision: Decision) -> float | None:
    return None if decision.margin is None else confidence(decision.margin)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
