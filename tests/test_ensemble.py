"""Several annotators: their keys, what is refused, and one run that joins and calibrates them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepared import scores_of, whole
from tiny import save_tiny, tiny_classifier, tiny_tokenizer

from cwpo_dist.cli.app import user_message
from cwpo_dist.config import Config, ConfigError
from cwpo_dist.config.load import parse_config
from cwpo_dist.evaluation.calibration import fit_scale, fit_temperature
from cwpo_dist.execution.run import run
from cwpo_dist.graph import graph, nodes_until
from cwpo_dist.runs import annotations
from cwpo_dist.runs.weighed_shards import Weighing
from cwpo_dist.runs.weighing_checks import weighing_faults
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.storage import MANIFEST, StorageError, Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ensemble")
    save_tiny(path / "model", "llama", 0)
    for k in range(3):
        tiny_classifier("llama", seed=k).save_pretrained(path / f"reward{k}")
        tiny_tokenizer().save_pretrained(path / f"reward{k}")
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows()))
    return path


def _rows() -> list[dict[str, str]]:
    """Pairs whose labels follow the first two annotators' scores, as a Bradley–Terry crowd's do.

    Each of the two counts by its own spread, so that people agree with both better than a coin.
    """
    rng, tokenizer = np.random.default_rng(0), tiny_tokenizer()
    models = [tiny_classifier("llama", seed=k) for k in range(2)]

    def scores(prompt: str, answer: str) -> Any:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            return np.array([float(model(ids).logits[0, 0]) for model in models])

    rows: list[dict[str, str]] = []
    for i in range(160):
        first, second = ("".join(rng.choice(list("abcdefgh "), int(n))) for n in (12, 25 + i % 20))
        answers = {"response_a": f"x{first}", "response_b": f"y{second}"}
        rows.append({"prompt": f"Question {i}?", **answers})
    asked = [(row["prompt"], row["response_a"], row["response_b"]) for row in rows]
    margins_NK = np.array([scores(p, a) - scores(p, b) for p, a, b in asked])
    margins = (margins_NK / margins_NK.std(axis=0)).sum(axis=1)
    better = rng.random(len(rows)) < 1 / (1 + np.exp(-margins / 0.4))
    labels = ["a" if first else "b" for first in better]
    return [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]


def config_of(folder: Path, members: list[int], **changes: Any) -> Config:
    """Ready reward models; `section__field=value` changes the rest."""
    models = [
        # the second is shorter of sight: some pairs have only the others' scores
        {"model_name_or_path": str(folder / f"reward{k}"), "max_length": 80 if k == 1 else 400}
        for k in members
    ]
    config: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "arms": ["ensemble"] if len(members) > 1 else ["cw"],
        "prepare": {
            "sources": [{"path": str(folder / "pairs.jsonl")}],
            "labelled_fraction": 0.0,
            "validation_fraction": 0.4,
            "test_fraction": 0.3,
            "rows_per_shard": 48,
            "num_cpus": 0.5,
        },
        "policy": {"model_name_or_path": str(folder / "model"), "max_length": 400},
        "annotate": {"models": models, "cpus_per_actor": 0.5},
        "sft": None,
        "reference": {"cpus_per_actor": 0.5},
        "align": {"max_steps": 1, "warmup_steps": 0, "cpus_per_worker": 0.5, "lora": None},
        "evaluate": {"num_prompts": 0, "cpus_per_actor": 0.5},
    }
    for dotted, value in changes.items():
        section, _, name = dotted.partition("__")
        if name:
            config[section] = {**config.get(section, {}), name: value}
        else:
            config[section] = value
    return parse_config(config)


def keys(config: Config, stage: str) -> set[str]:
    return {node.key for node in graph(config, config.arms[0]).values() if node.stage == stage}


def test_members_share_nothing_and_another_one_scores_nothing_anew(folder: Path) -> None:
    one, two, three = (config_of(folder, list(range(k))) for k in (1, 2, 3))
    assert keys(one, "annotate") < keys(two, "annotate") < keys(three, "annotate")
    assert len(keys(three, "annotate")) == 3
    references = [graph(config, "ensemble")["reference"].key for config in (two, three)]
    assert references[0] == references[1]
    assert keys(two, "weigh") != keys(three, "weigh")
    # one in a list is one alone, and their order decides nothing
    alone = config_of(folder, [], annotate__model=one.annotate.models[0].model_dump())
    assert keys(alone, "weigh") == keys(one, "weigh")
    assert keys(config_of(folder, [1, 0]), "weigh") == keys(two, "weigh")


def test_seeds_make_annotators_that_differ_by_nothing_else(folder: Path) -> None:
    weak = {"model_name_or_path": str(folder / "model")}
    plain = config_of(folder, [], weak=weak)
    seeds = config_of(folder, [], weak=weak, fit__seeds=[0, 7], arms=["ensemble"])
    assert keys(plain, "fit") < keys(seeds, "fit")
    assert keys(plain, "annotate") < keys(seeds, "annotate")
    roles = list(nodes_until(seeds, "ensemble", "annotate"))
    assert roles == ["prepare", "fit_0", "fit_1", "annotate_0", "annotate_1"]
    assert list(nodes_until(seeds, "ensemble", "fit")) == ["prepare", "fit_0", "fit_1"]


def test_a_fitted_temperature_is_in_the_keys_that_it_decides(folder: Path) -> None:
    raw, fitted = (config_of(folder, [0, 1], weigh__temperature=t) for t in (None, "fitted"))
    assert keys(raw, "annotate") == keys(fitted, "annotate")
    assert keys(raw, "weigh") != keys(fitted, "weigh")
    sft = {"max_steps": 1, "warmup_steps": 0}
    by_sft = [
        keys(config_of(folder, members, sft=sft, weigh__temperature=t), "sft")
        for members in ([0], [0, 1])
        for t in (None, 2.0, "fitted")
    ]
    one, several = by_sft[:3], by_sft[3:]
    assert one[0] == one[1] == one[2], "one annotator's choice does not depend on its scale"
    assert several[0] == several[1] != several[2], "a mean's sign does"
    arms = {"arms": ["cw", "cw_calibrated"]}
    both = config_of(folder, [0], **arms)
    settings = {arm: graph(both, arm)["weigh"].settings.identity() for arm in both.arms}
    assert settings["cw"]["temperature"] is None
    assert settings["cw_calibrated"]["temperature"] == "fitted"
    assert "calibration_split" not in settings["cw"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["ensemble"]}, "'ensemble' .* fit.seeds, annotate.models, or weigh.from: both"),
        (
            {"arms": ["cw_calibrated"], "prepare__validation_fraction": 0.0},
            r"prepare\.validation_fraction: 0, but weigh\.temperature: fitted .*cw_calibrated",
        ),
        (
            {"weigh__temperature": "fitted", "annotate__splits": ["unlabelled", "test"]},
            r"annotate\.splits: lacks 'validation'",
        ),
    ],
)
def test_weights_that_cannot_be_are_refused_before_anything_starts(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    models = {"model": {"model_name_or_path": str(folder / "reward0")}}
    annotate = models | {"splits": changes.pop("annotate__splits", None)}
    config = config_of(folder, [0], annotate=annotate, **changes)
    assert list(weighing_faults(config_of(folder, [0]))) == []
    with pytest.raises(AssertionError, match=message):
        raise AssertionError("\n".join(weighing_faults(config)))


def test_what_the_annotator_learned_calibrates_nothing(folder: Path) -> None:
    weak = {"model_name_or_path": str(folder / "model")}
    split = {"temperature": "fitted", "calibration_split": "labelled"}
    (fault, _) = weighing_faults(config_of(folder, [], weak=weak, weigh=split))
    assert fault.startswith("weigh.calibration_split: 'labelled' holds what the annotator is")
    assert list(weighing_faults(config_of(folder, [0], weigh=split))) == []
    beside = config_of(folder, [0], weak=weak, weigh=split, arms=["cw", "ws_dpo"])
    (fault,) = weighing_faults(beside)  # a ready model may; the teacher has learned these labels
    assert fault.startswith("weigh.calibration_split: 'labelled' holds what the annotator is")
    scored = {arm: graph(beside, arm) for arm in beside.arms}
    assert "labelled" in scored["cw"]["annotate"].settings.identity()["splits"]
    for role in ("teacher_before", "teacher_after"):
        assert "labelled" not in scored["ws_dpo"][role].settings.identity()["splits"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotate": {"models": [{"model_name_or_path": "m"}] * 2}}, "models: one appears twice"),
        (
            {"annotate": {"model": {"model_name_or_path": "m"}, "models": [
                {"model_name_or_path": "n"}]}},
            "model and models are both given",
        ),
        ({"fit__seeds": [1, 1]}, "fit.seeds: a seed appears twice"),
        ({"weigh__temperature": 0}, "weigh.temperature"),
    ],
)  # fmt: skip
def test_configurations_that_say_nothing_clear_are_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(folder, [0], **changes)


@pytest.fixture(scope="module")
def finished(ray_local: Any, folder: Path) -> Config:
    """With every shard a Ray task; test_end_to_end has the few that the driver does itself."""
    config = config_of(folder, [0, 1], weigh__temperature="fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotations, "FEW_SHARDS", 0)
        run(config)
    return config


def rows_of(config: Config, role: str, name: str) -> list[dict[str, Any]]:
    store = Store(config.output_dir).child(*graph(config, "ensemble")[role].path.split("/"))
    if name == "pairs":
        return whole(store).to_pylist()
    return [row for file in store.names(name) for row in store.read_table(file).to_pylist()]


def margins_of(config: Config, role: str) -> dict[str, float]:
    found = scores_of(rows_of(config, "prepare", "pairs"), rows_of(config, role, "scores"))
    return {name: a - b for name, (a, b) in found.items()}


def counts_of(config: Config, role: str) -> dict[str, Any]:
    store = Store(config.output_dir).child(*graph(config, "ensemble")[role].path.split("/"))
    return dict(store.read_json(MANIFEST)["counts"])


@pytest.mark.long
def test_preferences_join_the_members_by_hand(finished: Config) -> None:
    pairs = {row["pair_id"]: row for row in rows_of(finished, "prepare", "pairs")}
    members = [margins_of(finished, f"annotate_{k}") for k in range(2)]
    held = [i for i, p in pairs.items() if p["split"] == "validation"]
    margins_NK = np.array([[m.get(i, math.nan) for m in members] for i in held])
    people = np.array([float(pairs[i]["label"] == "a") for i in held])
    scale = fit_scale(margins_NK, people, [pairs[i]["prompt"] for i in held], ["0", "1"]).scale
    preferences = {row["pair_id"]: row for row in rows_of(finished, "weigh", "preferences")}
    counts = counts_of(finished, "weigh")
    by_key = sorted(range(2), key=lambda k: graph(finished, "ensemble")[f"annotate_{k}"].key)
    assert counts["temperatures"] == pytest.approx([scale.members[k] * scale.joint for k in by_key])

    unlabelled = [i for i, p in pairs.items() if p["split"] == "unlabelled"]
    both = [i for i in unlabelled if all(i in m for m in members)]
    assert preferences.keys() == set(both) < set(unlabelled)
    contested = 0
    for i in both:
        x, y = (m[i] / t / scale.joint for m, t in zip(members, scale.members, strict=True))
        mean, spread = (x + y) / 2, abs(x - y) / 2
        row = preferences[i]
        assert row["label"] == ("a" if mean >= 0 else "b")
        assert row["margin"] == pytest.approx(abs(mean), rel=1e-5)
        assert row["disagreement"] == pytest.approx(spread, rel=1e-5)
        assert row["confidence"] == pytest.approx(math.tanh(abs(mean) / 2), rel=1e-5)
        lower = math.tanh(max(0.0, abs(mean) - spread) / 2)
        assert row["weight"] == pytest.approx(lower, rel=1e-4, abs=1e-6)
        contested += x * y < 0
    assert counts["ensemble"]["alone"] == len(unlabelled) - len(both) > 0
    assert counts["ensemble"]["contested"] == contested > 0
    weights = [row["weight"] for row in preferences.values()]
    assert counts["mean_weight"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)


@pytest.mark.long
def test_evaluation_stands_the_members_beside_their_ensemble(finished: Config) -> None:
    metrics = json.loads((Path(finished.output_dir) / "metrics.json").read_text())
    record = metrics["arms"]["ensemble"]["annotator"]
    every = rows_of(finished, "prepare", "pairs")
    pairs, validation = (
        [row for row in every if row["split"] == split] for split in ("test", "validation")
    )
    for k, member in enumerate(record["members"]):
        margins = margins_of(finished, f"annotate_{k}")
        scored = [(margins[p["pair_id"]], p["label"]) for p in pairs if p["pair_id"] in margins]
        right = sum((margin > 0) == (label == "a") for margin, label in scored)
        assert (member["agreement"]["n"], member["agreement"]["correct"]) == (len(scored), right)
        assert member["name"] == f"reward{k}"
        known = [p for p in validation if p["pair_id"] in margins]
        expected = fit_temperature(
            [margins[p["pair_id"]] for p in known], [float(p["label"] == "a") for p in known]
        )
        assert member["temperature"]["n"] == len(known)
        assert member["temperature"]["value"] == pytest.approx(expected.value)
    assert record["temperature_split"] == "validation"
    assert record["calibrated"]["expected_calibration_error"] is not None
    assert record["ensemble"]["alone"] > 0
    page = (Path(finished.output_dir) / "report.html").read_text()
    for words in ("reward0", "reward1", "temperature fitted", "right where contested"):
        assert words in page


@pytest.mark.long
def test_top_share_is_that_of_all_shards_together(finished: Config) -> None:
    config = config_of(Path(finished.output_dir).parent, [0, 1], weigh__top_fraction=0.3)
    run(config, until="weigh")
    kept = {row["pair_id"] for row in rows_of(config, "weigh", "preferences")}
    every = config_of(Path(finished.output_dir).parent, [0, 1])
    run(every, until="weigh")
    rows = rows_of(every, "weigh", "preferences")
    order = sorted(rows, key=lambda row: (-row["confidence"], row["pair_id"]))
    assert kept == {row["pair_id"] for row in order[: math.ceil(0.3 * len(rows))]}
    assert 0 < len(kept) == counts_of(config, "weigh")["selected"] < len(rows)


@pytest.mark.long
def test_a_shard_that_was_weighed_before_is_not_weighed_again(
    finished: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(finished.output_dir).child(*graph(finished, "ensemble")["weigh"].path.split("/"))
    files = {name: store.read(name) for name in store.names("preferences")}
    counts = counts_of(finished, "weigh")
    store.remove(MANIFEST)
    store.remove(part("preferences", 1))
    weighed: list[int] = []
    given = Weighing._weighed

    def watched(weighing: Weighing, index: int, *rest: Any) -> Any:
        weighed.append(index)
        return given(weighing, index, *rest)

    monkeypatch.setattr(Weighing, "_weighed", watched)
    run(finished, until="weigh")
    assert weighed == [1]
    assert {name: store.read(name) for name in store.names("preferences")} == files
    assert counts_of(finished, "weigh") == counts


@pytest.mark.long
def test_storage_that_refuses_a_task_of_weigh_is_told_as_it_is(
    finished: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(Path(finished.output_dir).parent, [0, 1], weigh__min_confidence=0.01)
    store = Store(config.output_dir).child(*graph(config, "ensemble")["weigh"].path.split("/"))
    store.create("preferences", b"a file where the folder should be")
    monkeypatch.setattr(annotations, "FEW_SHARDS", 0)  # tasks of Ray
    with pytest.raises(StorageError) as raised:
        run(config, until="weigh")
    said = user_message(raised.value) or ""
    assert re.match(r"storage refused to write '.*part-0000\d\.parquet': .*File exists", said)
    assert not store.exists(MANIFEST)
    store.remove("preferences")
    monkeypatch.undo()
    run(config, until="weigh")
    assert counts_of(config, "weigh")["selected"] == len(rows_of(config, "weigh", "preferences"))
