"""log-probs of a weak policy after and before DPO → scores: its implicit rewards β·log π/π_SFT."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from cwpo_dist.pairs.records import SCORE_SCHEMA
from cwpo_dist.runs.context import Context, read_log_probs
from cwpo_dist.runs.graph import Node
from cwpo_dist.scoring.pipeline import part


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `scores/part-*.parquet` and returns the counts."""
    before, after = (context.place(node.inputs[name]) for name in ("before", "after"))
    beta, annotator, rows = node.settings["beta"], f"implicit/{node.key}", 0
    for index in range(context.shards(node)):
        old, new = read_log_probs(before, index), read_log_probs(after, index)
        ids = [pair_id for pair_id in new if pair_id in old]
        columns = {
            "pair_id": ids,
            "annotator": [annotator] * len(ids),
            "score_a": [beta * (new[i][0] - old[i][0]) for i in ids],
            "score_b": [beta * (new[i][1] - old[i][1]) for i in ids],
        }
        table = pa.table(columns, schema=SCORE_SCHEMA)
        context.place(node).create_table(part("scores", index), table)
        rows += len(ids)
    return {"rows": rows, "annotator": annotator}
