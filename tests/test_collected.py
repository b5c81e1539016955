"""Made-up outputs of three trials in; what a comparison says of each, and the right way round.

Every figure of every trial is another number, so that none can stand in another's place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tiny import save_tiny

from cwpo_dist.config import Config
from cwpo_dist.config.load import parse_config
from cwpo_dist.execution import comparison
from cwpo_dist.execution.side_by_side import Job
from cwpo_dist.graph import graph
from cwpo_dist.report.cells import Table
from cwpo_dist.report.comparison_page import FIGURES
from cwpo_dist.report.left_out_table import TITLE
from cwpo_dist.report.outcomes import verdicts
from cwpo_dist.report.trial_tables import tables
from cwpo_dist.runs.agreed import AGREED, AGREED_SCHEMA
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.judged_answers import JUDGED_SCHEMA
from cwpo_dist.runs.output_key import Node
from cwpo_dist.stages.evaluate import ANSWERS, ITEM_SCHEMA, ITEMS
from cwpo_dist.storage import MANIFEST, Store

BEST = {"human": 1e-3, "cw": 1e-4, "weak": 1e-4}  # of the rates, on validation
LONGER_BY = [5, -5, -5, 5, 5]  # of the five test pairs' preferred answers
MARGINS = {  # of the preferred answer: above 0 the policy is right
    "human": [1.0, -1.0, 1.0, -1.0, -1.0],
    "cw": [2.0, 1.0, 3.0, -1.0, 0.5],
    "weak": [1.0, 1.0, -2.0, -1.0, 0.5],
}
GOLD = {  # of four answers less the baseline's: above 0 it wins
    "human": {"own_sft": [1, 1, -1, -1], "common": [-1, 0, -1, -1]},
    "cw": {"own_sft": [1, 1, 1, -1], "common": [1, 0, 0, -1]},
    "weak": {"own_sft": [1, -1, -1, -1], "common": [1, 1, 0, 1]},
}
LENGTHS = {"own_sft": (100, 200), "common": (40, 900)}  # of the policy's answers, the baseline's
ANNOTATOR = {"human": 0.61, "cw": 0.65, "weak": 0.62}  # whose labels are right so often
COUNTS = {"human": 1.0, "cw": 0.25, "weak": 0.5}  # mean weights


def _annotator(right: float) -> dict[str, Any]:
    return {
        "agreement": {"accuracy": right},
        "by_quarter": [{"accuracy": right + k} for k in (-0.1, 0.0, 0.05, 0.2)],
        "expected_calibration_error": 0.11,
        "brier": {"value": 0.22},
        "nll": {"value": 0.66},
        "mean_confidence": 0.33,
        "margin_length": {"pearson": -0.44},
    }


def _metrics(arm: str, accuracy: float) -> dict[str, Any]:
    controlled = {"own_sft": 0.58, "common": 0.57}
    none, too_long = ({"prompts": n, "aligned": {"over_length": n}, "baseline": {}} for n in (0, 2))
    known = {"own_sft": {"n": 6, "left_out": none}, "common": {"n": 4, "left_out": too_long}}
    return {
        "gra": known if arm == "cw" else None,
        "annotator": _annotator(ANNOTATOR[arm]),
        "policy": {"agreement": {"n": 20, "correct": round(20 * accuracy), "ties": 0}},
        "answers": {against: {"length_controlled": v} for against, v in controlled.items()},
        "kl": {"mean": 3.5, "n": 4, **({"left_out": too_long} if arm == "cw" else {})},
    }


def lay(config: Config, node: Node, store: Store) -> None:
    """An output of a run: its manifest, and of `evaluate` its figures."""
    arm, rate = config.arms[0], config.align.learning_rate
    counts = {"mean_weight": COUNTS[arm], "rows": 11, "steps": 7, "last": {"loss": 0.3}}
    if node.stage == "sft":
        counts |= {"last": {"loss": 2.5}}
    manifest = {"counts": counts, "device": "cpu", "device_hours": 0.5}
    store.create_json(MANIFEST, manifest)
    if node.stage != "evaluate":
        return
    if config.evaluate.split == "validation":
        store.create_json("metrics.json", _metrics(arm, 0.9 if rate == BEST[arm] else 0.7))
        return
    right = rate == BEST[arm]  # with another rate than the best everything would be lost
    store.create_json("metrics.json", _metrics(arm, 0.5))
    ids = [f"pair {k}" for k in range(5)]
    margins = MARGINS[arm] if right else [-1.0] * 5
    columns = {"pair_id": ids, "prompt": ids, "margin": margins, "longer_by": LONGER_BY}
    store.create_table(ITEMS, pa.table(columns, schema=ITEM_SCHEMA))
    rows = [
        {
            "pair_id": ids[k],
            "prompt": ids[k],
            "against": against,
            "length": LENGTHS[against][0],
            "baseline_length": LENGTHS[against][1],
            "gold": float(more) if right else -9.0,
            "baseline_gold": 0.0,
        }
        for against, gold in GOLD[arm].items()
        for k, more in enumerate(gold)
    ]
    store.create_table(ANSWERS, pa.Table.from_pylist(rows, schema=JUDGED_SCHEMA))
    if arm == "cw":
        people, gold = [1.0, 0.0, None, None, None], [1.0, 1.0, 1.0, 0.0, 1.0]
        agreed = {"pair_id": ids, "of": ["policy"] * 5, "people": people, "gold": gold}
        store.create_table(AGREED, pa.table(agreed, schema=AGREED_SCHEMA))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `compare` writes, every stage but its own made up."""
    folder: Path = tmp_path_factory.mktemp("collected")
    save_tiny(folder / "model", "llama", 0)
    (folder / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    model = {"model_name_or_path": str(folder / "model")}
    grid = {"arms": ["human", "cw", "weak"], "labelled_fractions": [0.2], "flipped_labels": [0.1]}
    config: Config = parse_config(
        {
            "output_dir": str(folder / "run"),
            "prepare": {
                "sources": [{"path": str(folder / "pairs.jsonl")}],
                "validation_fraction": 0.2,
            },
            "weak": model,
            "policy": model,
            "evaluate": {"kl": True},
            "compare": {"seeds": [4], "learning_rates": [1e-3, 1e-4], "grids": [grid]},
        }
    )

    def made(run: Config, arm: str) -> list[Job]:
        context = Context(Store(run.output_dir))
        for node in graph(run, arm).values():
            if not context.done(node):
                lay(run, node, context.place(node))
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "_jobs", made)
        patch.setattr(comparison, "check_trials", lambda config, chosen: None)
        patch.setattr(comparison, "_single_runs", lambda config, runs: {})
        comparison.compare(config)
    written: dict[str, Any] = json.loads(Store(config.output_dir).read(FIGURES))
    return written


def test_each_trial_has_its_own_figures(found: dict[str, Any]) -> None:
    means = {
        name: {figure: record["mean"] for figure, record in trial["figures"].items()}
        for name, trial in found["trials"].items()
    }
    # Right where the preferred answer is longer (three pairs) and where it is shorter (two).
    balanced = {"human": (1 / 3 + 1 / 2) / 2, "cw": (2 / 3 + 1) / 2, "weak": (2 / 3 + 1 / 2) / 2}
    shares = {
        "human": (0.4, 0.5, 0.0, 0.0, 0.25),
        "cw": (0.8, 0.75, 0.0, 0.25, 0.5),
        "weak": (0.6, 0.25, 0.0, 0.75, 0.25),
    }
    names = ("accuracy", "gra_own_sft", "ties_own_sft", "gra_common", "ties_common")
    for name, expected in shares.items():
        told = dict(zip(names, expected, strict=True)) | {"length": 40.0}
        assert means[name] == pytest.approx(told | {"length_balanced": balanced[name]}), name


def test_differences_are_a_trials_less_the_others(found: dict[str, Any]) -> None:
    by = {"human": 0.4, "cw": 0.8, "weak": 0.6}
    gra = {"human": 0.0, "cw": 0.25, "weak": 0.75}
    for name, trial in found["trials"].items():
        assert trial["against"].keys() == by.keys() - {name}
        for other, record in trial["against"].items():
            assert record["accuracy"]["mean"] == pytest.approx(by[name] - by[other])
            assert record["gra_common"]["mean"] == pytest.approx(gra[name] - gra[other])


def test_facts_and_figures_of_a_seed_stand_under_their_names(found: dict[str, Any]) -> None:
    for name, trial in found["trials"].items():
        assert trial["learning_rate"] == BEST[name], "the rate that validation chose"
        facts = ("arm", "loss", "labelled_fraction", "flipped_labels")
        assert [trial[fact] for fact in facts] == [name, "sigmoid", 0.2, 0.1]
        numbers = {k: record["mean"] for k, record in trial["by_seed"].items()}
        assert numbers.pop("device_hours") > 0
        right = ANNOTATOR[name]
        of_annotator = {
            "labels_right": right,
            "least_confident": right - 0.1,
            "most_confident": right + 0.2,
            "calibration_error": 0.11,
            "brier": 0.22,
            "nll": 0.66,
            "mean_confidence": 0.33,
            "margin_length": -0.44,
        }
        assert numbers == pytest.approx(
            {
                "mean_weight": COUNTS[name],
                "pairs": 11,
                "steps": 7,
                "sft_loss": 2.5,
                "kl": 3.5,
                "length_controlled_own_sft": 0.58,
                "length_controlled_common": 0.57,
            }
            | ({} if name == "human" else of_annotator)
        )
    assert found["tried"]["cw"] == {"0.001": 0.7, "0.0001": 0.9}


def rows_of(table: Table) -> dict[str, dict[str, str]]:
    """First column → column → text."""
    return {
        row[0].text: {c: cell.text for c, cell in zip(table.columns[1:], row[1:], strict=True)}
        for row in table.rows
    }


def test_tables_show_each_number_in_its_row_and_column(found: dict[str, Any]) -> None:
    shown = {table.title: rows_of(table) for table in tables(found)}
    assert shown["Trials"]["cw"] == {
        "labels right": "65.0 %",
        "accuracy": "80.0 %",
        "length-balanced": "83.3 %",
        "GRA, own SFT": "75.0 %",
        "GRA, common": "25.0 %",
        "at equal length": "57.0 %",
        "answer length": "40",
        "KL, nats": "3.50",
    }
    assert shown["Trials"]["human"]["labels right"] == "as given"
    small = [row[5].details for row in tables(found)[0].rows]
    ties = [text for details in small for text in details if text.endswith("ties")]
    assert ties == ["25.0 % ties", "50.0 % ties", "25.0 % ties"], "of the common reference"
    paired = shown["Against human, paired"]
    assert paired.keys() == {"cw", "weak"}
    deltas = {k: v.removeprefix("* ") for k, v in paired["cw"].items() if k.startswith("Δ")}
    assert deltas == {
        "Δ accuracy": "+40.0",
        "Δ length-balanced": "+41.7",
        "Δ GRA, own SFT": "+25.0",
        "Δ GRA, common": "+25.0",
    }
    assert shown["Accuracy by people and gold"].keys() == {"policy: cw"}
    by = shown["Accuracy by people and gold"]["policy: cw"]
    assert (by["judged"], by["people"], by["gold"]) == ("2 of 5", "50.0 %", "80.0 %")
    matrix = shown["Accuracy, each trial less each other"]
    told = {(a, b): text.removeprefix("* ") for a, row in matrix.items() for b, text in row.items()}
    assert told["cw", "human"] == "+40.0"
    assert told["human", "cw"] == "−40.0"
    assert told["weak", "cw"] == "−20.0"
    assert shown["Annotators"]["cw"] == {
        "labels right": "65.0 %",
        "least confident": "55.0 %",
        "most confident": "85.0 %",
        "ECE": "0.110",
        "Brier": "0.220",
        "NLL": "0.660",
        "mean C": "0.33",
        "length, r": "−0.44",
    }
    trained = shown["How they were trained"]["cw"]
    assert (trained["labelled"], trained["rate"]) == ("20 %", "1e-4")
    assert (trained["pairs"], trained["mean weight"]) == ("11", "0.250")
    assert (trained["steps"], trained["SFT loss"]) == ("7", "2.50")
    rates = shown["Learning rates on validation"]["cw"]
    assert (rates["1e-4"], rates["1e-3"], rates["taken"]) == ("90.0 %", "70.0 %", "1e-4")


def test_prompts_that_a_trial_leaves_out_stand_at_its_figures_and_below(
    found: dict[str, Any],
) -> None:
    left_out = {name: trial["left_out"] for name, trial in found["trials"].items()}
    told = {"prompts": 2, "of": 6, "aligned": {"over_length": 2}, "baseline": {}}
    assert left_out["cw"]["gra_common"] == left_out["cw"]["kl"] == told
    assert left_out["human"] == left_out["weak"] == {}, "as of runs that did not count them"
    trials, below, *_ = tables(found)
    assert below.title == TITLE
    assert [[cell.text for cell in row] for row in below.rows] == [
        ["cw", "GRA, common", "2 of 6", "2 × over_length", "–"],
        ["cw", "KL", "2 of 6", "2 × over_length", "–"],
    ]
    small = [cell.details[-1:] for row in trials.rows for cell in row[4:]]
    assert small.count(("2 left out",)) == 2, "at both figures of cw, at no other"


def test_verdicts_say_whose_figure_is_the_higher(found: dict[str, Any]) -> None:
    unweighted = "Weighted, against weak (the same labels unweighted)"
    expected = {
        "Against human, on held-out labels": {"cw": "+40.0", "weak": "+20.0"},
        f"{unweighted}, on held-out labels": {"cw": "+20.0"},
        "Against human, on held-out labels, length-balanced": {"cw": "+41.7", "weak": "+16.7"},
        f"{unweighted}, on held-out labels, length-balanced": {"cw": "+25.0"},
        "Against human, by the gold reward (GRA, common)": {"cw": "+25.0", "weak": "+75.0"},
        f"{unweighted}, by the gold reward (GRA, common)": {"cw": "−50.0"},
    }
    told = verdicts(found)
    assert [verdict.title for verdict in told] == list(expected)
    for verdict in told:
        for line, dot in zip(verdict.lines, verdict.dots, strict=True):
            points = expected[verdict.title][dot.name]
            assert line.startswith(f"{dot.name}: not told apart, {points} "), (
                "four items say little"
            )
            assert f"{100 * dot.value:.1f}" == points.lstrip("+").replace("−", "-")
