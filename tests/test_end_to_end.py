"""A comparison and a run over its outputs, on tiny models and a real Ray: what every stage leaves.

The comparison makes all of it, on the demo's configuration: its pairs and its rule.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import prepared
import pyarrow as pa
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from reference_pages import COUNTS
from small_run import DEMO_PAIRS
from tiny import save_tiny
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from cwpo_dist.cli import app as cli
from cwpo_dist.config import Config
from cwpo_dist.config.load import load_config
from cwpo_dist.docstrings import described
from cwpo_dist.execution import run as stages
from cwpo_dist.execution import side_by_side
from cwpo_dist.execution.comparison import compare
from cwpo_dist.execution.run import run
from cwpo_dist.graph import graph
from cwpo_dist.manifest import Manifest
from cwpo_dist.pairs.records import Prompt
from cwpo_dist.report.comparison_page import FIGURES, PAGE, render_comparison
from cwpo_dist.results.export import export
from cwpo_dist.results.show import show
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.divergence import kl_divergence
from cwpo_dist.runs.output_key import Node
from cwpo_dist.runs.scored_by import Scorers
from cwpo_dist.scoring.answers_in import read_tokens
from cwpo_dist.stages.evaluate import ANSWERS, ITEMS
from cwpo_dist.storage import MANIFEST, Store
from cwpo_dist.training import metrics_log

DEMO = DEMO_PAIRS.with_name("demo.yaml")
# To the end; `weak` as far as its weights, by which alone it differs from `cw`.
ARMS = ["human", "cw"]


def whole(store: Store, folder: str) -> pa.Table:
    if folder == "pairs":
        return prepared.whole(store)
    names = store.names(folder)
    return pa.concat_tables([store.read_table(name) for name in names])


def must_not_run(*_: Any) -> dict[str, Any]:
    raise AssertionError("a finished stage ran again")


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "make", must_not_run)


def overrides(folder: Path) -> list[str]:
    """What makes the demo small: a tiny model, fewer pairs, steps and processes."""
    save_tiny(folder / "model", "llama", 0)
    changes = [
        f"output_dir={folder / 'run'}",
        f"prepare.sources.0.path={DEMO_PAIRS}",
        "prepare.sources.0.limit=96",
        "weak.num_hidden_layers=1",
        "evaluate.num_prompts=6",
        "evaluate.max_new_tokens=8",
        "evaluate.generation_batch_size=4",
        "annotate.num_actors=2",
        "reference.num_actors=1",
        "evaluate.num_actors=1",
        f"compare={{seeds: [0], grids: [{{arms: [{', '.join(ARMS)}]}}]}}",
    ]
    for model in ("weak", "policy"):
        changes += [f"{model}.model_name_or_path={folder / 'model'}", f"{model}.max_length=400"]
    for training in ("fit", "sft", "align"):
        changes += [f"{training}.max_steps=3", f"{training}.warmup_steps=1"]
        # Two of them do not fit on four CPUs at once: stages run in this process, which on two
        # cores is sooner done than starting others. Side by side they run in a long test.
        changes += [f"{training}.num_workers=1", f"{training}.cpus_per_worker=2.1"]
    for pool in ("annotate", "reference", "evaluate"):
        changes.append(f"{pool}.cpus_per_actor=0.5")
    return changes


@pytest.fixture(scope="module")
def compared(ray_local: Any, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The command has run to its end."""
    changes = overrides(tmp_path_factory.mktemp("whole"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", str(DEMO), *changes])
    assert ended.value.code == 0
    config = load_config(DEMO, changes)
    assert show([config.output_dir]) == f"{config.output_dir}/{PAGE}"
    return config


@pytest.fixture(scope="module")
def finished(compared: Config) -> Config:
    """A run of the same arms: all that it needs is there, and it has but to report."""
    config = compared.model_copy(update={"arms": ARMS})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "make", must_not_run)
        run(config)
    run(config.model_copy(update={"arms": ["weak"]}), until="weigh")
    return config


def place(config: Config, role: str, arm: str = "cw") -> Store:
    return Store(config.output_dir).child(*graph(config, arm)[role].path.split("/"))


def scores_by_pair(config: Config) -> dict[str, tuple[float, float]]:
    """The annotator's scores of both answers, by pair id."""
    scores = whole(place(config, "annotate"), "scores").to_pylist()
    return prepared.scores_of(whole(place(config, "prepare"), "pairs").to_pylist(), scores)


def test_the_embedded_default_is_compared(compared: Config) -> None:
    root = Path(compared.output_dir)
    found = json.loads((root / FIGURES).read_text())
    assert list(found["trials"]) == ARMS
    for name, trial in found["trials"].items():
        accuracy = trial["figures"]["accuracy"]
        assert 0 <= accuracy["mean"] <= 1
        assert accuracy["items"] > 5
        assert trial["figures"]["gra_common"]["items"] == 6
        assert trial["by_seed"]["device_hours"]["mean"] > 0
        assert ("calibration_error" in trial["by_seed"]) == (name != "human")
        (other,) = set(found["trials"]) - {name}
        assert trial["against"][other]["accuracy"]["items"] == accuracy["items"]
        assert 0 <= trial["figures"]["length_balanced"]["mean"] <= 1
    page = (root / PAGE).read_text()
    assert "SIMULATED LABELS" in page
    assert "<script" not in page
    assert page == render_comparison(found)
    (single,) = found["single_runs"]
    assert f'href="{single}"' in page
    assert "reliability" in (root / single).read_text().lower()


@pytest.mark.usefixtures("nothing_runs")
def test_a_second_comparison_makes_nothing_and_needs_no_cluster(
    compared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("connect", "alive_machines"):
        monkeypatch.setattr(side_by_side, name, must_not_run)
    page = Path(compared.output_dir, PAGE).read_bytes()
    compare(compared)
    assert Path(compared.output_dir, PAGE).read_bytes() == page


def test_the_reference_pages_know_all_that_it_counts_and_logs(finished: Config) -> None:
    """Its manifests' counts, and the metrics of its trainings."""
    root = Store(finished.output_dir)
    for name in (each for each in root.names() if each.endswith(f"/{MANIFEST}")):
        manifest = Manifest.read(root, name)
        known = [told for stages, told in COUNTS.items() if manifest.stage in stages.split(", ")]
        assert manifest.counts.keys() <= {n for told in known for n in described(told)}, name
    logged = set(described(metrics_log))
    for name in (each for each in root.names() if each.endswith("/metrics.jsonl")):
        for line in root.read(name).decode().splitlines():
            names = {n for n in json.loads(line) if not n.startswith("eval_")}
            assert names <= logged, name


def test_the_run_leaves_a_report_and_metrics_of_every_arm(finished: Config) -> None:
    root = Path(finished.output_dir)
    metrics = json.loads((root / "metrics.json").read_text())
    assert list(metrics["arms"]) == sorted(ARMS)
    page = (root / "report.html").read_text()
    assert "simulated" in page.lower()
    for arm in ARMS:
        figures = metrics["arms"][arm]
        assert figures["policy"]["agreement"]["n"] > 0
        assert set(figures["gra"]) == {"own_sft", "common"}
        assert figures["annotator"] is not None
        assert figures["curves"]["align"]
        for name in ("config.json", "stages.json", "metrics.json", "report.html"):
            assert (root / "arms" / arm / name).is_file()


def test_the_explorer_has_pairs_with_scores_labels_and_answers(finished: Config) -> None:
    root = Path(finished.output_dir)
    sample = json.loads((root / "explorer.json").read_text())
    assert sample["arms"] == ARMS
    answered = [pair for pair in sample["pairs"] if pair["answers"]]
    assert answered == sample["pairs"][: len(answered)]
    assert set(answered[0]["answers"]["cw"]) == {"before", "after"}
    scores = scores_by_pair(finished)
    assert scores.keys() & {pair["id"] for pair in sample["pairs"]}
    for pair in sample["pairs"]:
        if pair["id"] in scores:
            a, b = scores[pair["id"]]
            assert pair["margin"] == pytest.approx(a - b)
    before = (root / "report.html").read_text()
    assert sample["pairs"][0]["id"] in before
    assert show([str(root)]) == f"{root}/report.html"
    assert (root / "report.html").read_text() == before


def test_figures_are_kept_item_by_item(finished: Config) -> None:
    metrics = json.loads((Path(finished.output_dir) / "metrics.json").read_text())["arms"]["cw"]
    evaluated = place(finished, "evaluate")
    margins = evaluated.read_table(ITEMS)["margin"].to_pylist()
    assert sum(margin > 0 for margin in margins) == metrics["policy"]["agreement"]["correct"]
    pairs = {row["pair_id"]: row for row in whole(place(finished, "prepare"), "pairs").to_pylist()}
    for item in evaluated.read_table(ITEMS).to_pylist():
        pair = pairs[item["pair_id"]]
        a, b = len(pair["response_a"]), len(pair["response_b"])
        assert item["longer_by"] == (a - b if pair["label"] == "a" else b - a)
    rows = evaluated.read_table(ANSWERS).to_pylist()
    for against, figures in metrics["gra"].items():
        won = [row for row in rows if row["against"] == against]
        assert sum(row["gold"] > row["baseline_gold"] for row in won) == figures["wins"]
        lengths = [row["length"] for row in won]
        assert sum(lengths) / len(won) == metrics["answers"][against]["length"]
    assert sum(metrics["device_hours"].values()) > 0


def test_the_kl_divergence_is_that_of_the_stock_models(finished: Config) -> None:
    context, nodes = Context(Store(finished.output_dir)), graph(finished, "cw")
    pairs = whole(place(finished, "prepare"), "pairs").to_pylist()
    prompts = {pair["pair_id"]: Prompt(pair["prompt"]) for pair in pairs}
    by = Scorers(finished.reference, finished.align)
    given = finished.policy, by, finished.evaluate.max_new_tokens, finished.prepare.rows_per_shard
    found = kl_divergence(context, nodes["evaluate"], prompts, *given)
    tokens = read_tokens(place(finished, "evaluate").child("kl"), 0)
    assert found.n == len(tokens) > 0
    models = [
        AutoModelForCausalLM.from_pretrained(place(finished, role).child("model").root)
        for role in ("align", "sft")
    ]
    ratios = []
    for row in tokens.values():
        (answer,) = row.answers
        ids = torch.tensor([[*row.prompt, *answer]])
        start = len(row.prompt)
        with torch.no_grad():
            logps = [m(ids).logits.log_softmax(-1)[0, start - 1 : -1] for m in models]
        after, before = (lp.gather(1, ids[0, start:, None]).sum() for lp in logps)
        ratios.append(float(after - before))
    assert found.mean == pytest.approx(sum(ratios) / len(ratios), abs=1e-4)


def test_rows_add_up_from_stage_to_stage(finished: Config) -> None:
    def counts(role: str) -> dict[str, Any]:
        return dict(place(finished, role).read_json(MANIFEST)["counts"])

    prepared, scored, tokens = counts("prepare"), counts("annotate"), counts("tokens")
    rejected = sum(prepared["rejects"].values())
    assert prepared["rows_in"] == prepared["pairs"] + prepared["merged_duplicates"] + rejected
    assert scored["rows_in"] == scored["rows"] + scored["rejects"] + scored["over_length"]
    answers = prepared["answers"]  # no prompt of the demo is in two splits
    assert tokens["rows_in"] == sum(answers.values())
    assert scored["rows_in"] == sum(answers.values()) - answers["labelled"]


def test_preferences_follow_the_scores_and_the_paper(finished: Config) -> None:
    preferences = whole(place(finished, "weigh"), "preferences").to_pylist()
    scores = scores_by_pair(finished)
    pairs = {p["pair_id"]: p for p in whole(place(finished, "prepare"), "pairs").to_pylist()}
    assert preferences
    for row in preferences:
        (a, b), pair = scores[row["pair_id"]], pairs[row["pair_id"]]
        margin = abs(a - b)
        chosen = "response_a" if a >= b else "response_b"
        assert row["chosen"] == [{"role": "assistant", "content": pair[chosen]}] != row["rejected"]
        assert pair["split"] == "unlabelled"
        expected = 2 * (1 / (1 + math.exp(-margin)) - 0.5)  # eq. 8
        assert row["confidence"] == pytest.approx(expected, abs=1e-6)
        assert row["weight"] == pytest.approx(row["confidence"], rel=1e-7)  # in 64 bits and in 32
        assert row["probability"] == pytest.approx((1 + expected) / 2, abs=1e-6)
    weak = whole(place(finished, "weigh", "weak"), "preferences").to_pylist()
    assert {row["weight"] for row in weak} == {1.0}
    assert [row["chosen"] for row in weak] == [row["chosen"] for row in preferences]


def test_step_zero_of_dpo_is_ln2_times_the_mean_weight_of_its_batch(finished: Config) -> None:
    metrics = json.loads((Path(finished.output_dir) / "metrics.json").read_text())["arms"]
    for arm, figures in metrics.items():
        first = figures["curves"]["align"][0]
        weight = first["weight"] if arm == "cw" else 1.0
        assert first["loss"] == pytest.approx(math.log(2) * weight, rel=1e-4), arm


@pytest.mark.long
def test_soft_labels_and_a_loss_without_a_reference_run_to_the_end(finished: Config) -> None:
    """Beside the first run, whose stages it shares up to `weigh`."""
    align = finished.align.model_copy(update={"loss_type": "simpo"})
    measured = finished.evaluate.model_copy(update={"num_prompts": 0})
    changes = {"align": align, "arms": ["soft"], "evaluate": measured}
    config = finished.model_copy(update=changes)
    run(config, until="evaluate")
    nodes = graph(config, "soft")
    assert "reference" not in nodes
    assert place(config, "sft", "soft").root == place(finished, "sft").root
    policy = place(config, "evaluate", "soft").read_json("metrics.json")["policy"]
    assert policy["agreement"]["n"] > 0
    chosen, weak = (
        whole(place(finished if arm == "weak" else config, "weigh", arm), "preferences")
        for arm in ("soft", "weak")
    )
    assert chosen["probability"].to_pylist() == weak["probability"].to_pylist()
    first = json.loads(place(config, "align", "soft").read("metrics.jsonl").splitlines()[0])
    margin, epsilon = first["rewards/margins"], 1 - np.mean(chosen["probability"].to_pylist())
    rough = np.logaddexp(0, 0.5 - margin) * (1 - epsilon) + np.logaddexp(0, margin - 0.5) * epsilon
    assert first["loss"] == pytest.approx(rough, rel=0.2)


def test_models_load_with_the_stock_classes(finished: Config) -> None:
    annotator = AutoModelForSequenceClassification.from_pretrained(
        place(finished, "fit").child("model").root
    )
    assert (annotator.config.num_labels, annotator.config.num_hidden_layers) == (1, 1)
    aligned = AutoModelForCausalLM.from_pretrained(place(finished, "align").child("model").root)
    before = AutoModelForCausalLM.from_pretrained(place(finished, "sft").child("model").root)
    moved = [
        float((a - b).abs().max())
        for a, b in zip(aligned.parameters(), before.parameters(), strict=True)
    ]
    assert max(moved) > 0


def test_the_export_is_a_folder_for_the_hub(finished: Config, tmp_path: Path) -> None:
    """The card says what it was made from and where nothing lies; loaders find all they need."""
    to = tmp_path / "out"
    export(finished.output_dir, "cw", str(to))
    card = ModelCard.load(to / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None, "a folder is no hub id"
    keys = {role: node.key for role, node in graph(finished, "cw").items()}
    for role in ("prepare", "fit", "weigh", "align"):
        assert f"| {role} | `{keys[role]}` |" in card.text
    metrics = json.loads((Path(finished.output_dir) / "metrics.json").read_text())["arms"]["cw"]
    for figure in (metrics["policy"]["agreement"], metrics["annotator"]["agreement"]):
        assert f"{figure['accuracy']:.1%} of {figure['n']} (95 % interval" in card.text
    assert "`confidence` of the margin, normalised by none" in card.text
    assert "Simulated labels" in card.text
    assert "`sigmoid`, β 0.1" in card.text
    for file in to.rglob("*"):
        assert str(finished.output_dir).encode() not in file.read_bytes(), file
        assert str(Path(finished.output_dir).parent).encode() not in file.read_bytes(), file
    names = {path.name for path in to.iterdir()}
    assert {"generation_config.json", "tokenizer.json", "model.safetensors"} <= names
    assert AutoTokenizer.from_pretrained(to).chat_template
    assert GenerationConfig.from_pretrained(to).eos_token_id is not None


def test_the_annotators_folder_says_how_it_is_read(finished: Config) -> None:
    """By transformers alone, and by nothing but what lies in the folder, its scores come again."""
    nodes, root = graph(finished, "cw"), Store(finished.output_dir)
    folder = Path(finished.output_dir) / nodes["fit"].path / "model"
    stock = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = whole(root.child(*nodes["prepare"].path.split("/")), "pairs").to_pylist()
    scores = scores_by_pair(finished)
    for pair in [pair for pair in pairs if pair["pair_id"] in scores][::7]:
        for side, score in zip("ab", scores[pair["pair_id"]], strict=True):
            said = {"user": pair["prompt"], "assistant": pair[f"response_{side}"]}
            messages = [{"role": role, "content": text} for role, text in said.items()]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
            with torch.no_grad():
                expected = float(stock(ids).logits[0, 0])
            assert score == pytest.approx(expected, abs=1e-5)


def test_the_adapter_of_sft_and_alignment_stands_on_the_policy(
    finished: Config, tmp_path: Path
) -> None:
    """Both stages were LoRA: one adapter, on the policy as it was given, is the aligned model."""
    to = tmp_path / "out"
    export(finished.output_dir, "cw", str(to), adapter=True)
    assert finished.policy is not None
    base = AutoModelForCausalLM.from_pretrained(finished.policy.model_name_or_path)
    ids = torch.arange(3, 60)[None]
    aligned = AutoModelForCausalLM.from_pretrained(place(finished, "align").child("model").root)
    with torch.no_grad():
        before, wanted = (m.eval()(input_ids=ids).logits.log_softmax(-1) for m in (base, aligned))
        found = PeftModel.from_pretrained(base, to).eval()(input_ids=ids).logits.log_softmax(-1)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert (before - wanted).abs().max() > 1e-3
    internal = place(finished, "align").child("adapter").read_json("adapter_config.json")
    key = graph(finished, "cw")["sft"].key
    assert internal["base_model_name_or_path"] == f"./sft/{key}/model", "from the run directory"
    for file in to.rglob("*"):
        assert str(Path(finished.output_dir).parent).encode() not in file.read_bytes(), file


@pytest.mark.usefixtures("nothing_runs")
def test_a_second_run_does_nothing(finished: Config) -> None:
    run(finished)


def test_arms_share_what_they_have_in_common(finished: Config) -> None:
    made = {arm: graph(finished, arm) for arm in [*ARMS, "weak"]}

    def keys(role: str) -> set[str]:
        nodes: list[Node] = [nodes[role] for nodes in made.values()]
        return {node.key for node in nodes}

    assert len(keys("fit")) == len(keys("annotate")) == len(keys("tokens")) == 1
    assert len(keys("sft")) == len(keys("reference")) == 2  # human's labels, the annotator's
