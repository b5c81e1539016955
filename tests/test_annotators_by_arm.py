"""Several annotators: each is shown once, and named by the arms that learn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
from small_run import small_config

from cwpo_dist.config_file import parse_config
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages import explorer, report
from cwpo_dist.stages.context import Context
from cwpo_dist.stages.graph import Node
from cwpo_dist.storage import MANIFEST, Store


def committed(context: Context, node: Node, counts: dict[str, Any]) -> Node:
    context.place(node).create_json(MANIFEST, {"counts": counts})
    return node


def weighed(
    context: Context, scores: dict[str, Node], confidences: list[float], **settings: Any
) -> Node:
    """An output of `weigh` with these confidences."""
    chosen = {"labels": "annotator", "temperature": None} | settings
    node = committed(context, Node("weigh", chosen, scores), {"selected": len(confidences)})
    table = pa.table({"confidence": confidences})
    context.place(node).create_table(part("preferences", 0), table)
    return node


def test_each_annotator_is_shown_once_by_the_arms_that_learn_from_it(tmp_path: Path) -> None:
    context = Context(parse_config(small_config(tmp_path)), Store(str(tmp_path / "run")))
    prepare = committed(context, Node("prepare", {}), {"shards": 1})
    fit = Node("fit", {"seed": 5}, {"prepare": prepare})
    fitted = Node("annotate", {}, {"prepare": prepare, "fit": fit})
    implicit = Node("implicit", {}, {"prepare": prepare})
    ours, theirs = {"prepare": prepare, "a": fitted}, {"prepare": prepare, "a": implicit}
    weighs = {
        "human": weighed(context, ours, [1.0], labels="human"),
        "ws_dpo": weighed(context, theirs, [0.9]),
        "top30": weighed(context, ours, [0.8], top_fraction=0.3),
        "cw": weighed(context, ours, [0.2, 0.8], weight_function="confidence"),
        "cw_calibrated": weighed(context, ours, [0.1, 0.4], temperature="fitted"),
    }
    graphs = {arm: {"prepare": prepare, "weigh": weigh} for arm, weigh in weighs.items()}
    assert report._confidences(context, graphs) == [
        {"arms": ["ws_dpo"], "values": [0.9]},
        {"arms": ["top30", "cw"], "values": [0.2, 0.8]},
        {"arms": ["cw_calibrated"], "values": [0.1, 0.4]},
    ]
    nodes = {node.path: node for node in (fitted, implicit)}
    assert explorer._names(context, graphs, nodes) == [
        "annotator of top30, cw, cw_calibrated",
        "annotator of ws_dpo",
    ]
    other = Node("annotate", {}, {"prepare": prepare, "fit": Node("fit", {"seed": 6})})
    both = {"prepare": prepare, "a": fitted, "b": other}
    graphs = {"ensemble": {"prepare": prepare, "weigh": weighed(context, both, [0.3])}}
    nodes = {node.path: node for node in (fitted, other)}
    assert explorer._names(context, graphs, nodes) == ["seed 5", "seed 6"], "its members"
