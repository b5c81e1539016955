"""log-probs of a weak policy after and before DPO → scores: its implicit rewards β·log π/π_SFT."""

from __future__ import annotations

from typing import Any

from cwpo_dist.pairs.records import SCORE_SCHEMA, Score, table_of
from cwpo_dist.runs.context import Context, read_log_probs
from cwpo_dist.runs.graph import Node
from cwpo_dist.scoring.pipeline import part


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `scores/part-*.parquet` and returns the counts."""
    before, after = (context.place(node.inputs[name]) for name in ("before", "after"))
    beta, annotator, rows = node.settings["beta"], f"implicit/{node.key}", 0
    for index in range(context.shards(node)):
        old, new = read_log_probs(before, index), read_log_probs(after, index)
        scores = [
            Score(
                pair_id,
                annotator,
                beta * (log_probs.logp_a - old[pair_id].logp_a),
                beta * (log_probs.logp_b - old[pair_id].logp_b),
            )
            for pair_id, log_probs in new.items()
            if pair_id in old
        ]
        table = table_of(scores, SCORE_SCHEMA)
        context.place(node).create_table(part("scores", index), table)
        rows += len(scores)
    return {"rows": rows, "annotator": annotator}
