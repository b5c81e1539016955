"""Weighing by the data's own numbers: whose answer is chosen, with which weight, and refusals."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import ids_of, row, whole, write
from tiny import save_tiny

from cwpo_dist.config import Config, ConfigError
from cwpo_dist.config.load import load_config, parse_config, to_yaml
from cwpo_dist.graph import graph, nodes_until
from cwpo_dist.pairs.records import SCORE_SCHEMA, Score, pair_id, prompt_id, table_of
from cwpo_dist.pairs.stored import read_whole
from cwpo_dist.planning.plan import plan
from cwpo_dist.results.show import show
from cwpo_dist.runs import annotations
from cwpo_dist.runs.arms import needs_annotator
from cwpo_dist.runs.checks import check
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.own_numbers import OwnNumbersError
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages import prepare, weigh
from cwpo_dist.stages.weigh import chooser_of
from cwpo_dist.storage import MANIFEST, Store

pytestmark = pytest.mark.usefixtures("in_process")
Preferences = dict[str, dict[str, Any]]


def given(path: str, arm: str = "own", weigh: dict[str, Any] | None = None, **more: Any) -> Config:
    sources = {"sources": [{"path": path, **more.pop("source", {})}]}
    return parse_config(
        {
            "output_dir": str(Path(path).parent / "run"),
            "arms": [arm],
            "prepare": sources | {"test_fraction": 0.2, "rows_per_shard": 64} | more,
            "weigh": weigh or {},
        }
    )


def prepared(config: Config) -> list[dict[str, Any]]:
    """The pairs, made here unless they are there."""
    context = Context(Store(config.output_dir))
    node = nodes_until(config, config.arms[0], "weigh")["prepare"]
    place = context.place(node)
    if not place.exists(MANIFEST):
        made = {"versions": {}, "device": "cpu", "counts": prepare.make(context, node)}
        place.create_json(MANIFEST, made)
    return whole(place).to_pylist()


def weighed(config: Config, *scores: dict[str, float]) -> tuple[Preferences, dict[str, Any]]:
    """The preferences by prompt, and the counts; `scores` are annotators' margins by prompt."""
    prepared(config)
    context = Context(Store(config.output_dir))
    nodes = nodes_until(config, config.arms[0], "weigh")
    place = context.place(nodes["prepare"])
    annotators = [node for node in nodes.values() if node.stage == "annotate"]
    for node, margins in zip(annotators, scores, strict=True):
        for name in place.names("pairs"):
            shard = read_whole(place, int(name[11:16]))
            pairs = [p for p in shard.to_pylist() if p["prompt"] in margins]
            rows = [
                Score(answer, "test", score)
                for p in pairs
                for answer, score in zip(ids_of(p), (margins[p["prompt"]], 0.0), strict=True)
            ]
            index = int(name[-13:-8])
            context.place(node).create_table(
                part("scores", index), table_of(sorted(rows), SCORE_SCHEMA)
            )
    counts = weigh.make(context, nodes["weigh"])
    store = context.place(nodes["weigh"])
    rows = [r for name in store.names("preferences") for r in store.read_table(name).to_pylist()]
    for each in rows:  # conversations of one message each
        each |= {name: each[name][0]["content"] for name in ("prompt", "chosen", "rejected")}
    return {each["prompt"]: each for each in rows}, counts


def test_weights_are_the_columns_to_the_bit(tmp_path: Path) -> None:
    """Doubles and floats of Parquet, and the same as text; those of the labelled part, too."""
    draw = np.random.default_rng(0)
    double = draw.lognormal(0, 2, 3000)
    double[:3] = 0.0, 5e-324, 3.3e38
    for name, values in (("double", double), ("float", double.clip(0, 1e30).astype(np.float32))):
        count = len(values)
        columns = {
            "prompt": [f"prompt {i}" for i in range(count)],
            "chosen": [f"yes {i}" for i in range(count)],
            "rejected": [f"no {i}" for i in range(count)],
            "weight": values,
        }
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        found, counts = weighed(given(str(tmp_path / f"{name}.parquet"), test_fraction=0.0))
        got = np.array([found[prompt]["weight"] for prompt in columns["prompt"]])
        assert np.array_equal(got.view(np.int64), values.astype(np.float64).view(np.int64))
        assert all(r["chosen"].startswith("yes") for r in found.values())
        assert (counts["pairs"], counts["without_numbers"]) == (count, 0)
        labels = [r["label"] for r in found.values()]
        assert set(labels) == {"a", "b"}, "both places, so that a swap would show"
    rows = [row(i, f"yes {i}", f"no {i}", weight=float(w)) for i, w in enumerate(double)]
    text, _ = weighed(given(write(tmp_path / "x.jsonl", rows), test_fraction=0.0))
    assert [text[f"prompt {i}"]["weight"] for i in range(len(double))] == double.tolist()


def test_the_higher_score_is_chosen_and_its_margin_weighs(tmp_path: Path) -> None:
    """Whichever place it has, and whatever the label says; a tie weighs nothing."""
    rows = []
    for i in range(120):
        high, low = 0.5 + i / 40, 0.5
        answers = (f"better {i}", f"worse {i}")
        first, second = answers if i % 2 else answers[::-1]
        scores = (high, low) if i % 2 else (low, high)
        rows.append(
            {"prompt": f"prompt {i}", "response_a": first, "response_b": second}
            | dict(zip(("score_a", "score_b"), scores, strict=True))
            | {"label": "a" if i % 3 == 0 else None}
        )
    found, counts = weighed(given(write(tmp_path / "x.jsonl", rows)))
    assert 80 < len(found) < 120, "the test part is held out"
    for i in range(1, 120):
        if (r := found.get(f"prompt {i}")) is not None:
            assert (r["chosen"], r["rejected"]) == (f"better {i}", f"worse {i}")
            margin = (0.5 + i / 40) - 0.5
            assert r["margin"] == pytest.approx(margin)
            assert r["weight"] == pytest.approx(math.tanh(margin / 2))
            assert r["confidence"] == pytest.approx(r["weight"])
            assert r["probability"] == pytest.approx(1 / (1 + math.exp(-margin)))
    wrong = [i for i in range(1, 120) if i % 3 == 0 and i % 2 == 0 and f"prompt {i}" in found]
    assert counts["against_labels"] == len(wrong) > 10
    assert "prompt 0" not in found or found["prompt 0"]["weight"] == 0


def test_a_confidence_is_about_the_label_and_is_the_weight_to_the_bit(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    sure = draw.random(200)
    sure[:2] = 0.0, 1.0
    rows = [row(i, f"yes {i}", f"no {i}", confidence=float(c)) for i, c in enumerate(sure)]
    path = write(tmp_path / "x.jsonl", rows)
    found, counts = weighed(given(path, test_fraction=0.0))
    assert [found[f"prompt {i}"]["weight"] for i in range(200)] == sure.tolist()
    assert all(r["chosen"].startswith("yes") for r in found.values())
    assert counts["mean_confidence"] == pytest.approx(sure.mean())
    assert np.isfinite([r["margin"] for r in found.values()]).all()
    functions = {"sigmoid": lambda c: (1 + c) / 2, "clipped": lambda c: min(1, 2 * math.atanh(c))}
    for name, expected in functions.items():
        other, _ = weighed(given(path, weigh={"weight_function": name}, test_fraction=0.0))
        got = [other[f"prompt {i}"]["weight"] for i in range(2, 200)]
        assert got == pytest.approx([expected(c) for c in sure[2:]])
        assert other["prompt 1"]["weight"] == pytest.approx(1)
    top, _ = weighed(given(path, weigh={"top_fraction": 0.1}, test_fraction=0.0))
    best = np.argsort(-sure)[:20]
    assert top.keys() == {f"prompt {i}" for i in best}


def numbered(count: int, **numbers: Any) -> list[dict[str, Any]]:
    return [row(i, f"yes {i}", f"no {i}", **numbers) for i in range(count)]


def test_pairs_without_a_number_are_left_out_counted_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = numbered(100, weight=0.5)
    rows[10]["weight"], rows[11]["weight"] = None, -1.0
    rows += [{"prompt": "q", "response_a": "x", "response_b": "y", "weight": 1.0}]
    config = given(write(tmp_path / "x.jsonl", rows), test_fraction=0.0)
    with caplog.at_level(logging.WARNING):
        found, counts = weighed(config)
    assert len(found) == 98
    assert counts["without_numbers"] == 2, "the last row has other columns and is a reject"
    assert "2 of 100 training pairs have no number of their own" in caplog.text
    assert "weight: below 0, of 1 rows (first: row 12 of" in caplog.text
    (note,) = [note for note in plan(config).notes if "left out" in note]
    assert "2 of 100" in note
    assert "1 × weight: below 0" in note


def test_a_run_that_ended_at_weigh_is_planned_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = numbered(40, weight=0.25)
    rows += [rows[0] | {"weight": 0.75}]  # a copy that disagrees: the pair has no number
    config = given(write(tmp_path / "x.jsonl", rows), test_fraction=0.0)
    (note,) = [note for note in plan(config).notes if "left out" in note]
    assert "1 of 40" in note
    assert "1 × copies of a pair with different numbers" in note
    prepared(config)
    context = Context(Store(config.output_dir))
    node = nodes_until(config, "own", "weigh")["weigh"]
    made = {"versions": {}, "device": "cpu", "counts": weigh.make(context, node)}
    context.place(node).create_json(MANIFEST, made)
    page = Path(show([config.output_dir]))
    for text in (page.read_text(), capsys.readouterr().out):
        assert node.path in text, "where the preferences are"
        assert re.search(r"Weights by arm.*\b39\b.*0\.250", text, re.DOTALL)


def test_arms_that_read_an_annotator_read_the_columns_instead(tmp_path: Path) -> None:
    rows = [row(i, f"yes {i}", f"no {i}", weight=0.5 + i) for i in range(100)]
    path = write(tmp_path / "x.jsonl", rows)
    own, _ = weighed(given(path))
    columns = {"from": "columns"}
    assert weighed(given(path, "cw", columns))[0] == own
    weak, _ = weighed(given(path, "weak", columns))
    assert weak == {prompt: r | {"weight": 1.0} for prompt, r in own.items()}
    assert weighed(given(path, "human100"))[0] == weak


def test_weights_that_are_normalised_by_their_mean_are_those_that_act(tmp_path: Path) -> None:
    """The mean of all preferences, over several shards; C stays beside the weight."""
    draw = np.random.default_rng(2)
    rows = [row(i, confidence=float(c)) for i, c in enumerate(draw.random(200) ** 2)]
    path = write(tmp_path / "x.jsonl", rows)
    plain, before = weighed(given(path, "cw", {"from": "columns"}))
    divided, counts = weighed(given(path, "cw_mean", {"from": "columns"}))
    assert divided.keys() == plain.keys()
    mean = math.fsum(r["weight"] for r in plain.values()) / len(plain)
    assert counts["weights_divided_by"] == pytest.approx(mean, rel=1e-12)
    assert counts["mean_weight"] == before["mean_weight"], "before it is divided out"
    for prompt, r in divided.items():
        assert r["weight"] == pytest.approx(plain[prompt]["weight"] / mean, rel=1e-12)
        assert r["confidence"] == pytest.approx(plain[prompt]["weight"], rel=1e-6)
    assert np.mean([r["weight"] for r in divided.values()]) == pytest.approx(1, rel=1e-12)
    top, counts = weighed(given(path, "cw_mean", {"from": "columns", "top_fraction": 0.25}))
    kept = math.fsum(plain[prompt]["weight"] for prompt in top) / len(top)
    assert counts["weights_divided_by"] == pytest.approx(kept, rel=1e-12)
    assert kept > mean


MODEL = {"model_name_or_path": "none"}


@pytest.mark.parametrize("kind", ["scores", "confidence"])
def test_beside_an_annotator_own_numbers_are_one_more_of_an_ensemble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """m̄ = (m₁ + m₂)/2 and s = |m₁ − m₂|/2, by hand; for a confidence m = ±2·atanh C."""
    monkeypatch.setattr("cwpo_dist.runs.given_model.model_fingerprint", lambda model: "none")
    draw = np.random.default_rng(3)
    rows, own = [], {}
    for i in range(200):
        sign, sure = (1 if draw.random() < 0.5 else -1), float(draw.random() * 0.9)
        pair = {"prompt": f"prompt {i}", "response_a": f"yes {i}", "response_b": f"no {i}"}
        own[f"prompt {i}"] = sign * 2 * math.atanh(sure)
        if kind == "scores":
            pair |= {"score_a": own[f"prompt {i}"], "score_b": 0.0}
        else:
            pair |= {"label": "a" if sign > 0 else "b", "confidence": sure}
        rows.append(pair)
    path = write(tmp_path / "x.jsonl", rows)
    config = given(path, "ensemble", {"from": "both"})
    config = parse_config(config.model_dump(mode="json") | {"annotate": {"model": MODEL}})
    given_scores = {prompt: float(draw.normal()) for prompt in own if prompt != "prompt 5"}
    # the annotator scores the pair as `prepare` has it, whose places are drawn
    turned = {p["prompt"] for p in prepared(config) if p["response_a"].startswith("no")}
    found, counts = weighed(config, given_scores)
    assert "prompt 5" not in found, "of one opinion alone no disagreement is known"
    checked = 0
    for prompt, r in found.items():
        mine = -own[prompt] if prompt in turned else own[prompt]
        mean, spread = (mine + given_scores[prompt]) / 2, abs(mine - given_scores[prompt]) / 2
        assert r["label"] == ("a" if mean >= 0 else "b")
        assert r["margin"] == pytest.approx(abs(mean), rel=1e-4, abs=1e-5)
        assert r["disagreement"] == pytest.approx(spread, rel=1e-4, abs=1e-5)
        lower = math.tanh(max(0.0, abs(mean) - spread) / 2)
        assert r["weight"] == pytest.approx(lower, rel=1e-4, abs=1e-5)
        checked += 1
    assert checked > 80
    assert counts["ensemble"]["annotators"] == 2


def test_only_own_scores_are_judged_by_labels_that_they_do_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cwpo_dist.runs.given_model.model_fingerprint", lambda model: "none")
    rows = numbered(60, confidence=0.5)
    config = given(write(tmp_path / "x.jsonl", rows), "cw", {"from": "both"})
    config = parse_config(config.model_dump(mode="json") | {"annotate": {"model": MODEL}})
    weighed(config, {f"prompt {i}": 1.0 for i in range(60)})
    context = Context(Store(config.output_dir))
    node = nodes_until(config, "cw", "weigh")["weigh"]
    chooser = chooser_of(node)
    assert len(annotations.raw(context, node, chooser).scores) == 2
    assert len(annotations.raw(context, node, chooser, judged=True).scores) == 1


@pytest.mark.parametrize(
    ("numbers", "labels", "members"),
    [
        ({"weight": 1.0}, "weight", 0),
        ({"confidence": 0.5}, "confidence", 0),
        ({"score_chosen": 1.0, "score_rejected": 2.0}, "annotator", 1),
    ],
)
def test_sft_and_evaluation_read_the_same_numbers_as_the_weights(
    tmp_path: Path, numbers: dict[str, float], labels: str, members: int
) -> None:
    save_tiny(tmp_path / "model", "llama", 0)
    policy = {"policy": {"model_name_or_path": str(tmp_path / "model")}}
    config = given(write(tmp_path / "x.jsonl", numbered(40, **numbers)))
    config = parse_config(config.model_dump(mode="json") | policy)
    prepared(config)
    context, nodes = Context(Store(config.output_dir)), graph(config, "own")
    choosers = {name: nodes[name].settings.chooser for name in ("sft", "evaluate")}
    choosers["weigh"] = chooser_of(nodes["weigh"])
    assert len(set(choosers.values())) == 1
    for stage, chooser in choosers.items():
        assert annotations.label_source(context, nodes[stage], chooser) == labels
        assert len(annotations.raw(context, nodes[stage], chooser).scores) == members


SIX_LINES = """\
output_dir: {folder}/run
arms: [own]
prepare:
  sources:
    - path: {folder}/x.jsonl
weigh: {{column: weight}}
"""


def test_six_lines_of_yaml_need_no_model(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", numbered(50, weight=0.5))
    (tmp_path / "run.yaml").write_text(SIX_LINES.format(folder=tmp_path))
    config = load_config(tmp_path / "run.yaml")
    assert not needs_annotator(config)
    made = plan(config)
    assert [stage.stage for stage in made.stages] == ["prepare", "weigh"]
    assert "weight of its own: 50 pairs" in made.stages[0].work
    assert load_config(tmp_path / "run.yaml") == parse_config(json.loads(config.model_dump_json()))
    assert "from: annotator" in to_yaml(config)
    found, _ = weighed(config)
    assert {r["weight"] for r in found.values()} == {0.5}


TEN = {"confidence": 0.5, "weight": 1.0}


@pytest.mark.parametrize(
    ("numbers", "arm", "weigh", "message"),
    [
        ({}, "own", {}, "'own' weighs by the data's own numbers, but .* have prompt, chosen, rej"),
        ({"score_a": 1.0}, "own", {}, "they have prompt, chosen, rejected, score_a"),
        ({}, "cw", {"from": "columns"}, "'cw' weighs by the data's own numbers"),
        (TEN, "own", {}, "weight and confidence; say which acts: weight or confidence"),
        (TEN, "own", {"column": "scores"}, "weigh.column: 'scores', but the data have weight and"),
        (TEN, "human", {"from": "columns"}, "weigh.from: 'columns' applies to arms that read an"),
        (TEN, "human", {"column": "weight"}, "weigh.column: no arm reads 'weight'"),
        ({"weight": 1.0}, "own", {"weight_function": "sigmoid"}, "'own' has weigh.weight_function"),
        ({"weight": 1.0}, "own", {"top_fraction": 0.5}, "'own' has weigh.top_fraction"),
        ({"weight": 1.0}, "own", {"temperature": 2.0}, "'own' has weigh.temperature"),
        ({"weight": 1.0}, "top30", {"from": "columns"}, "'top30' has weigh.top_fraction"),
        ({"weight": 1.0}, "soft", {"from": "columns"}, "'soft' has soft labels"),
        ({"confidence": 1.0}, "own", {"temperature": "fitted"}, "weigh.temperature: fitted"),
        ({"confidence": 0.5}, "ensemble", {"from": "columns"}, "several annotators differ by"),
    ],
)
def test_what_the_columns_cannot_give_is_refused_before_anything_starts(
    tmp_path: Path, numbers: dict[str, Any], arm: str, weigh: dict[str, Any], message: str
) -> None:
    config = given(write(tmp_path / "x.jsonl", numbered(20, **numbers)), arm, weigh)
    for refuses in (lambda: check(config, "weigh"), lambda: plan(config)):
        with pytest.raises(ConfigError, match=message):
            refuses()


@pytest.mark.parametrize(
    ("numbers", "weigh"),
    [
        ({"weight": 3.0}, {}),
        ({"confidence": 0.5}, {"weight_function": "sigmoid", "min_confidence": 0.1}),
        ({"score_chosen": 2.0, "score_rejected": 1.0}, {"temperature": 2.0}),
        (TEN, {"column": "confidence"}),
    ],
)
def test_what_the_columns_can_give_is_accepted(
    tmp_path: Path, numbers: dict[str, Any], weigh: dict[str, Any]
) -> None:
    config = given(write(tmp_path / "x.jsonl", numbered(20, **numbers)), "own", weigh)
    check(config, "weigh")
    assert len(plan(config).stages) == 2


def unlabelled(count: int, **numbers: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"prompt {i}", "response_a": f"x {i}", "response_b": f"y {i}", **numbers}
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (unlabelled(30, weight=1.0), "weight.* with a label that it is about"),
        (unlabelled(30, score_a=None, score_b=None), "no.* training pair.* has scores"),
        (numbered(30, weight=-1.0), r"weight: below 0 \(30\); more than prepare.max_reject_frac"),
        (numbered(30, confidence=3), r"confidence: above 1 \(30\)"),
    ],
)
def test_plan_and_run_refuse_alike_what_only_the_values_tell(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    config = given(write(tmp_path / "x.jsonl", rows))
    check(config, "weigh")  # the columns are there
    with pytest.raises(ConfigError, match=message):
        plan(config)
    with pytest.raises(OwnNumbersError, match=message.replace("no.* training", "none.* training")):
        weighed(config)


def test_flat_weights_as_probabilities_must_be_some(tmp_path: Path) -> None:
    config = given(
        write(tmp_path / "x.jsonl", numbered(20, weight=1.5)), "proportional", {"from": "columns"}
    )
    with pytest.raises(ConfigError, match=r"'proportional' draws pairs with a weight as pr.* 1\.5"):
        plan(config)


def test_ids_and_places_do_not_depend_on_numbers(tmp_path: Path) -> None:
    with_numbers, _ = weighed(given(write(tmp_path / "x.jsonl", numbered(30, weight=1.0))))
    (tmp_path / "y").mkdir()
    human, _ = weighed(given(write(tmp_path / "y" / "x.jsonl", numbered(30)), "human100"))
    assert {p: r["label"] for p, r in human.items()} == {
        p: r["label"] for p, r in with_numbers.items()
    }
    for r in human.values():
        assert r["pair_id"] == pair_id(prompt_id(r["prompt"]), r["chosen"], r["rejected"])
