"""All stage outputs of a run in; metrics.json, the terminal's table and report.html out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from cwpo_dist.canonical import to_json
from cwpo_dist.config import Config
from cwpo_dist.manifest import Manifest
from cwpo_dist.report.explorer import EXPLORER
from cwpo_dist.report.page import render
from cwpo_dist.report.table import print_short
from cwpo_dist.results.items import differences, with_gold
from cwpo_dist.results.sample import sample
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node, Nodes, members, retry_manifest
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages.weigh import chooser_of

MOST_CONFIDENCES = 5000  # of the histogram: a sample, so that the page stays small


def run(context: Context, config: Config, graphs: Mapping[str, Nodes]) -> str:
    """Writes each arm's folder and the run's report, shows the table, returns the report's URI."""
    metrics, pairs = collect(context, config, graphs), sample(context, graphs)
    for arm, nodes in graphs.items():
        place = context.root.child("arms", arm)
        alone = config.model_copy(update={"arms": [arm]})
        place.write("config.json", to_json(alone.model_dump(mode="json")))
        place.write("stages.json", to_json({role: _pointer(n) for role, n in nodes.items()}))
        own = metrics | {"arms": {arm: metrics["arms"][arm]}, "differences": None}
        place.write("metrics.json", to_json(own["arms"][arm]))
        place.write("report.html", render(own).encode())
    context.root.write("metrics.json", to_json(metrics))
    context.root.write(EXPLORER, json.dumps(pairs).encode())
    context.root.write("report.html", render(metrics, pairs).encode())
    print_short(metrics, config.output_dir)
    return context.root.child("report.html").uri


def collect(context: Context, config: Config, graphs: Mapping[str, Nodes]) -> dict[str, Any]:
    """Everything that the table and the page show; what has not run is null."""
    prepare = next(iter(graphs.values()))["prepare"]
    manifest = Manifest.read(context.place(prepare))
    return {
        "run": {
            "output_dir": config.output_dir,
            "seed": config.seed,
            "simulated_labels": config.simulated_labels,
            "versions": manifest.versions,
            "device": manifest.device,
        },
        "prepare": manifest.counts,
        "arms": {arm: _arm(context, nodes) for arm, nodes in graphs.items()},
        "differences": differences(
            {arm: context.place(nodes["evaluate"]) for arm, nodes in graphs.items()}
        ),
        "confidences": _confidences(context, graphs),
        "config": config.model_dump(mode="json"),
    }


def _arm(context: Context, nodes: Mapping[str, Node]) -> dict[str, object]:
    weigh = context.counts(nodes["weigh"])
    manifests = {role: committed(context, node) for role, node in nodes.items()}
    evaluated = context.place(nodes["evaluate"])
    evaluation: dict[str, object] = evaluated.read_json("metrics.json")
    if powered := with_gold([evaluated]):
        evaluation["with_gold"] = powered
    return evaluation | {
        "pairs": manifests["align"].counts["rows"],  # of those selected, what fits the policy
        "mean_weight": weigh["mean_weight"],
        "weigh": weigh,
        "keys": {role: node.key for role, node in nodes.items()},
        "curves": {
            role: _curve(context, node) for role, node in nodes.items() if node.settings.trains
        },
        "weights": _weights(context, nodes["weigh"]),
        "seconds": {role: manifest.seconds for role, manifest in manifests.items()},
        "device_hours": device_hours(nodes, manifests),
        "tokens": {
            role: manifest.counts["tokens"]
            for role, manifest in manifests.items()
            if "tokens" in manifest.counts
        },
    }


def committed(context: Context, node: Node) -> Manifest:
    """The manifest of an output; its device-hours with those of retries of its rejects."""
    place = context.place(node)
    first = Manifest.read(place)
    if node.retries == 0:
        return first
    hours = Manifest.read(place, retry_manifest(node.retries)).device_hours
    return first if hours is None else first.model_copy(update={"device_hours": hours})


def device_hours(nodes: Mapping[str, Node], manifests: Mapping[str, Manifest]) -> dict[str, float]:
    """Device-hours by role, an output in two roles once; what was made without models has none."""
    hours = {
        nodes[role].path: (role, manifest.device_hours)
        for role, manifest in manifests.items()
        if manifest.device_hours
    }
    return dict(hours.values())


def _weights(context: Context, node: Node) -> dict[str, float | None]:
    """(Σw)² / (n·Σw²) of the first pairs, a sample of prompts as ids are hashes."""
    values = np.array(_column(context, node, "weight"))
    total = float(np.sum(values**2))
    return {"effective": float(values.sum() ** 2 / (len(values) * total)) if total else None}


def _pointer(node: Node) -> dict[str, str]:
    return {"stage": node.stage, "key": node.key, "path": node.path}


def _confidences(
    context: Context, graphs: Mapping[str, Mapping[str, Node]]
) -> list[dict[str, object]]:
    """Of each annotator, its arms and its confidences.

    A temperature divides margins, so one annotator with and without it counts as two. An arm that
    keeps only the most confident pairs shows those of an arm that keeps more, if there is one.
    """
    by_annotator: dict[tuple[object, ...], dict[str, Node]] = {}
    for arm, nodes in graphs.items():
        weigh = nodes["weigh"]
        if context.counts(weigh)["mean_confidence"] is not None:
            chooser = chooser_of(weigh)
            own = chooser.own, chooser.temperature
            scored = (*(node.path for node in members(weigh)), *own)
            by_annotator.setdefault(scored, {})[arm] = weigh
    return [
        {"arms": list(arms), "values": _column(context, _widest(context, arms), "confidence")}
        for arms in by_annotator.values()
    ]


def _widest(context: Context, arms: Mapping[str, Node]) -> Node:
    """The output of `weigh` that selects most."""
    return max(arms.values(), key=lambda node: int(context.counts(node)["selected"]))


def _column(context: Context, weigh: Node, name: str) -> list[float]:
    """A column of the first preferences; ids are hashes, so these are of a sample of prompts."""
    store, values = context.place(weigh), []
    for index in range(context.shards(weigh)):
        values += store.read_table(part("preferences", index), [name])[name].to_pylist()
        if len(values) >= MOST_CONFIDENCES:
            break
    return values[:MOST_CONFIDENCES]


def _curve(context: Context, node: Node) -> list[dict[str, object]]:
    """The log records of a training stage, one a step."""
    lines = context.place(node).read("metrics.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines]
