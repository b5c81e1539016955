"""Several annotators: each is shown once, and named by the arms that learn from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
from test_report import _annotator, _curve, sample_metrics

from cwpo_dist.config import Arm, Config
from cwpo_dist.evaluation.annotators import HeldOut, annotator_figures
from cwpo_dist.report.outputs import keys_table
from cwpo_dist.report.page import render
from cwpo_dist.report.summary import annotator_table, ensemble_table
from cwpo_dist.results import collect, sample
from cwpo_dist.runs.arms import weighting
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node, Settings
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages.weigh import WeighSettings
from cwpo_dist.storage import MANIFEST, Store

CONFIG = Config.model_validate({"output_dir": "run", "prepare": {"sources": [{"path": "x"}]}})


@dataclass(frozen=True)
class Prepared(Settings):
    stage = "prepare"


@dataclass(frozen=True)
class Fitted(Settings):
    stage = "fit"
    seed: int


@dataclass(frozen=True)
class Annotated(Settings):
    stage = "annotate"
    scores = True


@dataclass(frozen=True)
class Implicit(Annotated):
    stage = "implicit"


def committed(context: Context, node: Node, counts: dict[str, Any]) -> Node:
    context.place(node).create_json(MANIFEST, {"counts": counts})
    return node


def weighed(
    context: Context, scores: dict[str, Node], confidences: list[float], **settings: Any
) -> Node:
    """An output of `weigh` with these confidences."""
    arm = Arm.model_validate({"labels": "annotator"} | settings)
    told: dict[str, Any] = {"selected": len(confidences)}
    told["mean_confidence"] = None if arm.labels == "human" else fmean(confidences)
    node = committed(context, Node(WeighSettings(weighting(CONFIG, arm), False, 0.0), scores), told)
    table = pa.table({"confidence": confidences})
    context.place(node).create_table(part("preferences", 0), table)
    return node


def test_each_annotator_is_shown_once_by_the_arms_that_learn_from_it(tmp_path: Path) -> None:
    context = Context(Store(str(tmp_path / "run")))
    prepare = committed(context, Node(Prepared()), {"shards": 1})
    fit = Node(Fitted(5), {"prepare": prepare})
    fitted = Node(Annotated(), {"prepare": prepare, "fit": fit})
    implicit = Node(Implicit(), {"prepare": prepare})
    ours, theirs = {"prepare": prepare, "a": fitted}, {"prepare": prepare, "a": implicit}
    weighs = {
        "human": weighed(context, ours, [1.0], labels="human"),
        "ws_dpo": weighed(context, theirs, [0.9]),
        "top30": weighed(context, ours, [0.8], top_fraction=0.3),
        "cw": weighed(context, ours, [0.2, 0.8], weight_function="confidence"),
        "cw_calibrated": weighed(context, ours, [0.1, 0.4], temperature="fitted"),
    }
    graphs = {arm: {"prepare": prepare, "weigh": weigh} for arm, weigh in weighs.items()}
    assert collect._confidences(context, graphs) == [
        {"arms": ["ws_dpo"], "values": [0.9]},
        {"arms": ["top30", "cw"], "values": [0.2, 0.8]},
        {"arms": ["cw_calibrated"], "values": [0.1, 0.4]},
    ]
    nodes = {node.path: node for node in (fitted, implicit)}
    assert sample._names(context, graphs, nodes) == [
        "annotator of top30, cw, cw_calibrated",
        "annotator of ws_dpo",
    ]
    other = Node(Annotated(), {"prepare": prepare, "fit": Node(Fitted(6))})
    both = {"prepare": prepare, "a": fitted, "b": other}
    graphs = {"ensemble": {"prepare": prepare, "weigh": weighed(context, both, [0.3])}}
    nodes = {node.path: node for node in (fitted, other)}
    assert sample._names(context, graphs, nodes) == ["seed 5", "seed 6"], "its members"


def test_ensemble_stands_beside_its_members() -> None:
    rng = np.random.default_rng(2)
    truth, noise = rng.normal(0, 1, 400), rng.normal(0, 1, (400, 2))
    labels = np.where(rng.random(400) < 1 / (1 + np.exp(-truth)), "a", "b").tolist()
    people = np.array([float(label == "a") for label in labels])
    lengths, prompts = rng.integers(1, 90, (2, 400)).astype(float), [str(k) for k in range(400)]
    held = HeldOut(3 * truth[:, None] + noise, labels, people, *lengths, prompts)
    figures = annotator_figures(held, held, ["seed 0", "seed 1"], by_member=True)
    weigh = {"annotators": 2, "partial": 0, "alone": 7, "contested": 91, "mean_disagreement": 0.52}
    metrics = sample_metrics()
    metrics["arms"] = {"ensemble": metrics["arms"]["cw"] | {"annotator": figures}}
    assert annotator_table(metrics).columns == ("", "ensemble", "seed 0", "seed 1")
    assert ensemble_table(metrics) is None, "an older run recorded nothing of it"
    arm = metrics["arms"]["ensemble"]
    arm["weigh"] = {"ensemble": weigh}
    arm["keys"] = {"fit_0": "k0", "fit_1": "k1"}
    arm["curves"] = {f"fit_{k}": _curve(k, 0.7, 0.5, 40) for k in range(2)}
    table = ensemble_table(metrics)
    assert table is not None
    assert [cell.text for cell in table.rows[0][:6]] == ["ensemble", "2", "0", "7", "91", "0.520"]
    page = render(metrics)
    assert "right where contested" in page
    assert "fit_1" in " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", page))
    assert [row[0].text for row in keys_table(metrics).rows] == ["fit_0", "fit_1"]


def test_each_annotator_has_its_histogram_and_is_named_by_its_arms() -> None:
    metrics = sample_metrics()
    arms = metrics["arms"]
    other = arms["weak"] | {"annotator": _annotator(seed=4)}
    metrics["arms"] = {"human": arms["human"] | {"annotator": _annotator()}, "ws_dpo": other} | {
        name: arms[name] for name in ("weak", "cw")
    }
    assert annotator_table(metrics).columns == ("", "ws_dpo", "weak, cw"), "human has none"
    (fitted,) = metrics["confidences"]
    assert render(metrics).count("annotated pairs.</figcaption>") == 1
    metrics["confidences"] = [
        {"arms": ["ws_dpo"], "values": [0.1, 0.2]},
        {"arms": ["weak", "cw"], "values": fitted["values"]},
    ]
    page = render(metrics)
    assert "<h3>Confidence (ws_dpo)</h3>" in page
    assert "<h3>Confidence (weak, cw)</h3>" in page
    assert "of 2 annotated pairs" in page
    assert "of 5,000 annotated pairs" in page
