"""A whole run: one arm by the data's own scores, one by an annotator that learned vote shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from prepared import whole
from small_run import small_config
from transformers import AutoModelForSequenceClassification

from cwpo_dist.config import Config
from cwpo_dist.config.load import parse_config
from cwpo_dist.execution.run import run
from cwpo_dist.graph import graph
from cwpo_dist.results.export import ExportError, export
from cwpo_dist.storage import MANIFEST, Store

ARMS = ["own", "cw"]


def rows_of() -> list[dict[str, Any]]:
    """Three people's votes, a fifth of them ties (one each, one for neither), and scores."""
    draw = np.random.default_rng(0)
    rows = []
    for i in range(90):
        votes = [(3, 0), (2, 1), (1, 2), (1, 1), (0, 3)][i % 5]
        label = "a" if votes[0] > votes[1] else "b" if votes[0] < votes[1] else None
        answers = {"response_a": f"It is {i}." + " Yes." * (i % 3), "response_b": f"It is not {i}."}
        better = draw.normal() + (votes[0] - votes[1])
        rows.append(
            {"prompt": f"What of {i}?", **answers, "label": label}
            | {"votes_a": votes[0], "votes_b": votes[1], "score_a": better, "score_b": 0.25}
        )
    return rows


pytestmark = pytest.mark.long  # a whole run; test_own has each of its stages


@pytest.fixture(scope="module")
def finished(ray_local: Any, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("own")
    given = small_config(folder, arms=ARMS, sft=None, fit__labels="votes", evaluate__num_prompts=0)
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of()))
    given["prepare"] |= {"sources": [{"path": str(folder / "own.jsonl")}], "ties": "labelled"}
    given["prepare"]["labelled_fraction"] = 0.5
    for section in ("fit", "align"):
        given[section] |= {"max_steps": 2}
    config = parse_config(given)
    run(config)
    return config


def read(config: Config, arm: str, role: str, name: str) -> list[dict[str, Any]]:
    store = Store(config.output_dir).child(*graph(config, arm)[role].path.split("/"))
    if name == "pairs":
        return whole(store).to_pylist()
    return [row for file in store.names(name) for row in store.read_table(file).to_pylist()]


def counts(config: Config, arm: str, role: str) -> dict[str, Any]:
    store = Store(config.output_dir).child(*graph(config, arm)[role].path.split("/"))
    return dict(store.read_json(MANIFEST)["counts"])


def test_the_own_arm_reads_no_annotator_and_trains_on_both_parts(finished: Config) -> None:
    assert not {"fit", "annotate"} & graph(finished, "own").keys()
    assert {"fit", "annotate"} < graph(finished, "cw").keys()
    pairs = {pair["pair_id"]: pair for pair in read(finished, "own", "prepare", "pairs")}
    trained = {p["pair_id"]: p for p in read(finished, "own", "weigh", "preferences")}
    splits = {pairs[i]["split"] for i in trained}
    assert splits == {"labelled", "unlabelled"}
    assert trained.keys() == {i for i, p in pairs.items() if p["split"] in splits}
    for i, preference in trained.items():
        better = "response_a" if pairs[i]["score_a"] > pairs[i]["score_b"] else "response_b"
        assert preference["chosen"][0]["content"] == pairs[i][better]
    assert counts(finished, "own", "align")["rows"] == len(trained)


def test_ties_are_trained_on_by_fit_and_by_nobody_else(finished: Config) -> None:
    pairs = read(finished, "cw", "prepare", "pairs")
    labelled = [pair for pair in pairs if pair["split"] == "labelled"]
    ties = [pair for pair in labelled if pair["label"] is None]
    assert len(ties) > 3
    assert counts(finished, "cw", "fit")["rows"] == len(labelled)
    weighed = {p["pair_id"] for p in read(finished, "cw", "weigh", "preferences")}
    assert not weighed & {pair["pair_id"] for pair in ties}


def test_own_scores_are_measured_like_an_annotator(finished: Config) -> None:
    metrics = json.loads((Path(finished.output_dir) / "metrics.json").read_text())
    test = [
        pair
        for pair in read(finished, "own", "prepare", "pairs")
        if pair["split"] == "test" and pair["label"] is not None
    ]
    right = sum((p["score_a"] > p["score_b"]) == (p["label"] == "a") for p in test)
    found = metrics["arms"]["own"]["annotator"]["agreement"]
    assert (found["n"], found["correct"]) == (len(test), right)
    assert len(metrics["confidences"]) == 2
    page = (Path(finished.output_dir) / "report.html").read_text()
    assert "own" in page


def test_an_annotator_is_exported_with_its_length_baseline(
    finished: Config, tmp_path: Path
) -> None:
    to = tmp_path / "annotator"
    export(finished.output_dir, "cw", str(to), annotator="fit")
    model = AutoModelForSequenceClassification.from_pretrained(to)
    assert model.config.num_labels == 1
    text = ModelCard.load(to / "README.md").text
    metrics = json.loads((Path(finished.output_dir) / "arms/cw/metrics.json").read_text())
    longer = metrics["annotator"]["length_baseline"]
    assert f"| the longer answer, pairs right | {longer['accuracy']:.1%} of {longer['n']}" in text
    assert "shares of votes" in text
    with pytest.raises(ExportError, match=r"no 'fit_1' made by `fit`; choose from fit"):
        export(finished.output_dir, "cw", str(tmp_path / "none"), annotator="fit_1")
    with pytest.raises(ExportError, match="it was given, or none was needed"):
        export(finished.output_dir, "own", str(tmp_path / "none"), annotator="fit")
    policy = tmp_path / "policy"
    export(finished.output_dir, "own", str(policy))
    assert "the data: their labels, or their own scores" in (policy / "README.md").read_text()
