"""What `cwpo plan` says before a worker starts: counts, costs, and every fault at once."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from small_run import small_config
from tiny import save_tiny

from cwpo_dist.config import ConfigError, ModelConfig
from cwpo_dist.config.load import parse_config
from cwpo_dist.graph import prepare_node
from cwpo_dist.lm.batches import total_steps
from cwpo_dist.placement import Machine
from cwpo_dist.planning.plan import plan
from cwpo_dist.planning.plan_table import print_plan
from cwpo_dist.runs import checks
from cwpo_dist.runs.checks import check
from cwpo_dist.runs.cluster import ClusterError
from cwpo_dist.runs.training_checks import setting_faults
from cwpo_dist.storage import MANIFEST, Store


def test_plan_says_what_each_stage_will_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse_config(small_config(tmp_path, arms=["weak", "cw"]))
    planned = plan(config, show=1)
    stages = [(stage.stage, stage.arms) for stage in planned.stages]
    assert ("fit", ("weak", "cw")) in stages
    assert ("align", ("weak",)) in stages
    assert ("align", ("cw",)) in stages
    assert not any(stage.done for stage in planned.stages)
    assert not Path(config.output_dir).exists(), "a plan writes nothing"

    print_plan(planned)
    shown = capsys.readouterr().out
    assert re.search(r"prepare +weak, cw +\d+ labelled", shown)
    flat = " ".join(shown.split())  # the terminal breaks long lines
    assert re.search(r"fit: [\d.]+ M parameters, .* a worker holds weights .* activations", flat)
    assert flat.count("align: under ZeRO 0 / 1 / 2 / 3 (num_workers 1): ") == 1, "both arms' alike"
    assert "labels are simulated" in shown


def test_plan_counts_what_prepare_will_find(tmp_path: Path) -> None:
    config = parse_config(small_config(tmp_path))
    (prepare,) = [stage for stage in plan(config).stages if stage.stage == "prepare"]
    counts = [
        int(number) for number in re.findall(r"(\d+) (?:labelled|unlabelled|test)", prepare.work)
    ]
    assert sum(counts) == 96


def test_plan_has_the_runs_own_counts_once_they_are_there(tmp_path: Path) -> None:
    config = parse_config(small_config(tmp_path))
    node = prepare_node(config)
    splits = {"labelled": 70, "unlabelled": 110, "validation": 0, "test": 50}
    counts = {"splits": splits, "labelled": splits, "merged_duplicates": 3, "ties": 1}
    counts |= {"rejects": {"empty answer": 2}, "not_read": {}, "rows_in": 235}
    counts["prompts"] = {"labelled": 7, "unlabelled": 11, "validation": 0, "test": 5}
    counts["answers"] = {"labelled": 30, "unlabelled": 44, "validation": 0, "test": 25}
    Store(config.output_dir).child(*node.path.split("/")).create_json(MANIFEST, {"counts": counts})
    planned = {stage.stage: stage for stage in plan(config).stages}
    assert planned["prepare"].done
    assert planned["prepare"].work.startswith("70 labelled, 50 test, 110 unlabelled, 0 validation")
    assert "; 3 copies merged; 2 set aside" in planned["prepare"].work
    assert planned["fit"].work.startswith("70 pairs, ")
    assert planned["tokens"].work == "99 answers to 23 prompts, tokenised once"
    assert planned["annotate"].work == "69 answers to 16 prompts"


def test_plan_refuses_what_prepare_would(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    source = Path(config["prepare"]["sources"][0]["path"])
    rows = source.read_text().splitlines()
    source.write_text("\n".join([*rows, *['{"prompt": "p", "chosen": ""}'] * len(rows)]))
    with pytest.raises(ConfigError, match=r"96 of 192 rows \(50\.0%\) were set aside") as refused:
        plan(parse_config(config))
    assert "96 × missing field: response_a: name the column" in str(refused.value)


def test_plan_says_how_rows_are_read_what_of_them_is_not_and_what_templates_leave_out(
    tmp_path: Path,
) -> None:
    config = small_config(tmp_path)
    source = Path(config["prepare"]["sources"][0]["path"])
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for k, row in enumerate(rows):
        row["question"] = row.pop("prompt")
        row["grade"] = k if k < 40 else None
        row["tools"] = [{"name": "look"}] if k % 2 else None
    rows[0]["label"] = "neither"
    rows[1]["label"] = "unsure"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = "\n".join(plan(parse_config(config)).notes)
    assert f"{source}: reads tools, prompt ← question, response_a, response_b, label; " in notes
    assert f"{source}: columns that nothing reads: grade (in 40 rows)" in notes
    assert "1 × bad label value ('unsure' in 1 rows): say what the values mean" in notes
    assert "1 pairs are ties" in notes
    assert "weak: its chat template does not read what sampled pairs hold: tools (in 47" in notes


def test_plan_names_the_files_that_are_left_out(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    source = Path(config["prepare"]["sources"][0]["path"])
    folder = tmp_path / "set"
    folder.mkdir()
    source.rename(folder / "pairs.jsonl")
    for name in ("notes.txt", "test.jsonl"):
        (folder / name).write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    config["prepare"]["sources"] = [{"path": str(folder)}]
    notes = [note for note in plan(parse_config(config)).notes if "leaves out" in note]
    assert len(notes) == 2
    assert any("leaves out notes.txt: unknown suffix" in note for note in notes)
    assert any("leaves out test.jsonl: of split 'test' by the name" in note for note in notes)


def test_an_output_dir_within_a_source_is_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path, output_dir=str(tmp_path / "set" / "run"))
    source = Path(config["prepare"]["sources"][0]["path"])
    (tmp_path / "set").mkdir()
    source.rename(tmp_path / "set" / "pairs.jsonl")
    config["prepare"]["sources"] = [{"path": str(tmp_path / "set")}]
    message = faults(config, "prepare")
    assert re.search(r"output_dir: .* lies in prepare\.sources\.0", message)


def test_plan_refuses_as_many_damaged_files_as_prepare_does(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    source = Path(config["prepare"]["sources"][0]["path"])
    (source.parent / "torn.jsonl.gz").write_bytes(gzip.compress(source.read_bytes())[:-900])
    config["prepare"]["sources"] = [{"path": str(source.parent / "*.jsonl*")}]
    message = r"1 of 2 files are damaged, more than prepare\.max_reject_fraction=0\.05"
    with pytest.raises(ConfigError, match=message):
        plan(parse_config(config))


def test_plan_asks_for_labels_where_there_are_none(tmp_path: Path) -> None:
    config = small_config(tmp_path, arms=["human", "weak"], prepare__labelled_fraction=1.0)
    source = Path(config["prepare"]["sources"][0]["path"])
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    source.write_text("".join(json.dumps(row | {"label": None}) + "\n" for row in rows))
    with pytest.raises(ConfigError) as caught:
        plan(parse_config(config))
    fit, human = str(caught.value).splitlines()
    for line in (fit, human):
        assert "no training pair has a label: name their column" in line
        assert "raise" not in line
        assert "share that does" not in line


def test_plan_counts_no_unlabelled_pair_for_an_arm_of_people(tmp_path: Path) -> None:
    config = small_config(tmp_path, arms=["human", "weak"], prepare__labelled_fraction=0.2)
    source = Path(config["prepare"]["sources"][0]["path"])
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for row in rows[::2]:
        row["label"] = None
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    planned = plan(parse_config(config))
    counts = {
        (stage.stage, arm): int(stage.work.split()[0])
        for stage in planned.stages
        for arm in stage.arms
        if stage.stage in {"weigh", "sft", "align"}
    }
    for stage in ("weigh", "sft", "align"):
        assert 0 < counts[stage, "human"] < 0.7 * counts[stage, "weak"], counts


def test_plan_names_gpus_that_would_stand_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "available", lambda: [Machine(8.0, 2.0), Machine(8.0, 2.0)])
    pool = {"num_actors": 3, "gpus_per_actor": 1}
    config = small_config(tmp_path, annotate=pool, reference={"pools": [pool, pool]})
    notes = [note for note in plan(parse_config(config)).notes if "GPU" in note]
    assert [note.split(";")[0] for note in notes] == [
        "annotate: its actors take 3 of 4 GPUs",
        "evaluate: its actors take 0 of 4 GPUs",
    ]


def test_shown_rows_are_read_off_the_real_mask(tmp_path: Path) -> None:
    planned = plan(parse_config(small_config(tmp_path)), show=2)
    assert [row.model for row in planned.rows] == ["weak", "policy"] * 2
    for row in planned.rows:
        prompt, *answers = ([int(n) for n in re.findall(r"\d+", line)] for line in row.mask)
        total = prompt[0] + sum(answer[0] for answer in answers)
        assert prompt[1:] == [0, prompt[0] - 1]
        for count, first, last, seen, of in answers:
            assert (first, last) == (prompt[0], prompt[0] + count - 1)
            assert seen == prompt[0] + count, "the prompt and its own answer, nothing else"
            assert of == total
        assert all(answer.endswith("</s>") for answer in row.answers)


def test_steps_are_whole_batches_times_epochs(tmp_path: Path) -> None:
    fit = parse_config(small_config(tmp_path)).fit  # batches of 8, one epoch
    assert total_steps(fit, 17) == 3
    assert total_steps(fit.model_copy(update={"num_train_epochs": 2.0}), 16) == 4
    assert total_steps(fit.model_copy(update={"max_steps": 7}), 1000) == 7


def faults(config: dict[str, Any], until: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check(parse_config(config), until)
    return str(caught.value)


def test_a_model_that_lacks_a_tensor_is_refused_before_any_worker(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    message = faults(config)
    assert "policy.model_name_or_path" in message
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert "weak." not in message, "its first layer is complete"


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        fit__num_workers=99,
        annotate__cpus_per_actor=1000.0,
        evaluate__gold_function="nowhere:score",
        policy__model_name_or_path=str(tmp_path / "nothing"),
        sft__max_steps=5,
        sft__warmup_steps=5,
    )
    config["prepare"]["sources"] = [{"path": str(tmp_path / "nothing.jsonl")}]
    lines = faults(config).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "prepare.sources.0.path",
        "evaluate.gold_function",
        "policy.model_name_or_path",
        "sft.warmup_steps",
        "fit.num_workers",
        "annotate.cpus_per_actor",
    ]


def test_a_deepspeed_section_that_a_worker_would_refuse_is_refused_here(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.json")
    optimizer = {"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}
    changes = {"fit__deepspeed": missing, "align__deepspeed": optimizer}
    with pytest.raises(ConfigError) as caught:
        check(parse_config(small_config(tmp_path, **changes)))
    assert re.search(r"^fit\.deepspeed: .*none\.json", str(caught.value), re.MULTILINE)
    assert re.search(r"^align\.deepspeed\.optimizer\.params\.lr: ", str(caught.value), re.MULTILINE)


def test_precision_is_that_of_the_workers(tmp_path: Path) -> None:
    """Which no section alone tells: `torch_dtype`, and whether there are GPUs, decide."""
    half = {"bf16": {"enabled": True}, "fp16": {"enabled": "auto", "loss_scale": 0}}
    config = small_config(tmp_path, sft__deepspeed=half)
    assert faults(config).startswith("sft.deepspeed.bf16.enabled: True, but the weights will be fl")
    config["policy"]["torch_dtype"] = "bfloat16"
    check(parse_config(config))
    section = parse_config(small_config(tmp_path, sft__deepspeed=half)).sft
    auto = ModelConfig(model_name_or_path="x")
    assert section is not None
    assert list(setting_faults("sft", section, auto, [Machine(8.0, 1.0)])) == []
    assert len(list(setting_faults("sft", section, auto, [Machine(8.0, 0.0)]))) == 1


def test_what_a_tracker_lacks_is_found_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = small_config(tmp_path, align__report_to=["mlflow"])
    assert faults(config).startswith("align.report_to: 'mlflow' needs MLFLOW_TRACKING_URI")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    check(parse_config(config))


def test_a_folder_that_ray_could_not_start_in_is_found_by_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(small_config(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + 60 * "x")
    with pytest.raises(ClusterError, match=r"^RAY_TMPDIR: '/tmp/xx"):
        plan(config)


def test_positions_that_a_model_does_not_have_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "opt", "opt")
    config = small_config(tmp_path, policy__model_name_or_path=str(tmp_path / "opt"))
    assert check(parse_config(config)).sizes["policy"].positions == 512
    config["policy"]["max_length"] = 600
    assert "policy.max_length: 600 tokens" in faults(config)
    config["policy"]["model_name_or_path"] = str(tmp_path / "model")  # rotary: no such end
    check(parse_config(config))


def test_only_what_a_stage_needs_is_checked_for_it(tmp_path: Path) -> None:
    config = small_config(tmp_path, policy__model_name_or_path=str(tmp_path / "nothing"))
    check(parse_config(config), "annotate")
    assert "policy.model_name_or_path" in faults(config, "reference")
    del config["policy"]
    check(parse_config(config), "weigh")
    assert faults(config, "sft").startswith("policy: arm ")
    assert faults(config | {"arms": ["ensemble"]}, "weigh").startswith("arms: 'ensemble'")
    del config["weak"]
    check(parse_config(config), "prepare")
    assert faults(config, "annotate").startswith("weak: an annotator is needed")
    assert faults(small_config(tmp_path, prepare__num_cpus=1e300)).startswith(
        "prepare.num_cpus: 1e+300, but the largest node of this machine ("
    )


def test_sizes_count_tied_weights_once(tmp_path: Path) -> None:
    config = parse_config(small_config(tmp_path, policy__model_name_or_path=str(tmp_path / "m")))
    save_tiny(tmp_path / "m", "llama", tie_word_embeddings=True)
    size = check(config).sizes["policy"]
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert size.parameters == sum(tensor.numel() for tensor in stored.values())
    layers = [t for name, t in stored.items() if t.ndim == 2 and ".layers." in name]
    assert size.matmul == sum(tensor.numel() for tensor in layers)
    assert size.head == stored["model.embed_tokens.weight"].numel()


def test_adapters_are_counted_from_the_layers_that_they_are_on(tmp_path: Path) -> None:
    config = parse_config(small_config(tmp_path, align__lora={"r": 3}))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    ends = sum(sum(tensor.shape) for name, tensor in stored.items() if "_proj." in name)
    assert check(config).sizes["policy"].of(config.align).parameters == 3 * ends


@pytest.mark.parametrize(
    ("arm", "last"), [("human", ["prepare", "weigh"]), ("ws_dpo", ["implicit (annotate)", "weigh"])]
)
def test_without_a_policy_arms_that_need_no_annotator_are_planned_up_to_weighing(
    tmp_path: Path, arm: str, last: list[str]
) -> None:
    config = small_config(tmp_path, arms=[arm])
    del config["policy"]
    planned = plan(parse_config(config))
    assert [stage.stage for stage in planned.stages][-2:] == last
    assert "no policy is given: planned up to `weigh`" in planned.notes


def test_without_any_model_no_arm_is_shown(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    del config["policy"], config["weak"]
    (only,) = plan(parse_config(config)).stages
    assert (only.stage, only.arms) == ("prepare", ())
