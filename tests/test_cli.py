"""The command line: quick help that teaches, clean messages, plan, export, several runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from ray.exceptions import RayTaskError
from safetensors.torch import load_file, save_file
from small_run import small_config, write_config
from tiny import save_tiny

from cwpo_dist import __version__, cli
from cwpo_dist.cli_jobs import plan_options
from cwpo_dist.config import ConfigError
from cwpo_dist.config_file import load_config, parse_config
from cwpo_dist.stages import checks
from cwpo_dist.stages.checks import Machine, check, pool_faults, training_faults
from cwpo_dist.stages.costs import total_steps
from cwpo_dist.stages.export import ExportError, export
from cwpo_dist.stages.plan import plan
from cwpo_dist.stages.plan_table import print_plan
from cwpo_dist.stages.show import ShowError, show
from cwpo_dist.storage import Store

COMMANDS = [*cli.STAGES, "run", "plan", "compare", "config", "report", "export"]
COMMANDS += ["submit", "status", "logs", "stop"]


def cwpo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cwpo_dist.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture
def exit_code() -> Callable[..., int | str | None]:
    """Runs the command line in this process and gives its exit code."""

    def run(*arguments: str) -> int | str | None:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(arguments))
        return caught.value.code

    return run


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cwpo_dist import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"cwpo_dist {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_teaches_by_an_example(
    command: str, exit_code: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(command, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Example: cwpo {command} " in shown


def test_a_fault_of_the_user_is_one_message_without_a_traceback(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", {"output_dir": "x", "prepare": {"sources": []}})
    done = cwpo("run", str(config), "align.beta=-1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: prepare.sources: ")
    assert "align.beta: -1; give a number above 0" in done.stderr
    assert "Traceback" not in done.stderr


def test_options_of_a_plan_travel_with_it_and_with_nothing_else(
    tmp_path: Path,
    exit_code: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = plan_options(2, ["H100=4.5", "1"], ["30"], "runs/sample")
    sample = str(tmp_path / "runs" / "sample")
    assert given == [
        *("--price", "H100=4.5", "--price", "1", "--pairs-per-second", "30"),
        *("--trial", sample, "--show", "2"),
    ]
    assert plan_options(0, None, None, "s3://b/run") == ["--trial", "s3://b/run"]
    assert plan_options(0, None, None, None) == []
    assert exit_code("submit", "run.yaml", "--address", "http://h", "--price", "1") == 2
    assert "submit plan" in capsys.readouterr().err


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("not meant for users")

    monkeypatch.setattr(cli, "load_config", broken)
    with pytest.raises(ValueError, match="not meant for users"):
        cli.main(["run", "run.yaml"])


def test_an_error_that_ray_carried_from_a_worker_reads_the_same() -> None:
    cause = ConfigError("annotate: nothing to score")
    carried = RayTaskError("task", "Traceback: …", cause).as_instanceof_cause()
    assert cli.user_message(carried) == "annotate: nothing to score"
    assert cli.user_message(RayTaskError("task", "…", KeyError("x")).as_instanceof_cause()) is None


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


def test_plan_refuses_what_prepare_would(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    source = Path(config["prepare"]["sources"][0]["path"])
    rows = source.read_text().splitlines()
    source.write_text("\n".join([*rows, *['{"prompt": "p", "chosen": ""}'] * len(rows)]))
    with pytest.raises(ConfigError, match=r"max_reject_fraction: 96 of 192 rows are set aside"):
        plan(parse_config(config))


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
        "fit.num_workers",
        "sft.warmup_steps",
        "annotate.cpus_per_actor",
    ]


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


def test_workers_are_placed_on_nodes_not_on_a_sum_of_cpus(tmp_path: Path) -> None:
    config = parse_config(small_config(tmp_path, fit__cpus_per_worker=3.0, fit__num_workers=2))
    halves = [Machine(4.0, 0.0), Machine(4.0, 0.0)]
    assert list(training_faults("fit", config.fit, halves)) == []
    (fault,) = training_faults("fit", config.fit, [Machine(2.0, 0.0)] * 4)
    assert "2 workers of 3 CPU can never be placed on 4 nodes (8 CPUs, 0 GPUs)" in fault
    (fault,) = training_faults("fit", config.fit, [Machine(8.0, 1.0)])  # auto: GPUs are used
    assert "room for 1" in fault
    pool = config.annotate.model_copy(update={"gpus_per_actor": 1.0})
    assert list(pool_faults("annotate.", pool, [Machine(1.0, 1.0)])) == []
    assert len(list(pool_faults("annotate.", pool, halves))) == 1


def test_sizes_count_tied_weights_once(tmp_path: Path) -> None:
    config = parse_config(small_config(tmp_path, policy__model_name_or_path=str(tmp_path / "m")))
    save_tiny(tmp_path / "m", "llama", tie_word_embeddings=True)
    size = check(config).sizes["policy"]
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert size.parameters == sum(tensor.numel() for tensor in stored.values())
    layers = [t for name, t in stored.items() if t.ndim == 2 and ".layers." in name]
    assert size.matmul == sum(tensor.numel() for tensor in layers)
    assert size.head == stored["model.embed_tokens.weight"].numel()
    assert size.linear == tuple(
        sum(stored[f"{name}.weight"].shape) for name in linear_names(stored)
    )


def linear_names(stored: dict[str, torch.Tensor]) -> list[str]:
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    names = [name.removesuffix(".weight") for name in stored if "_proj" in name]
    return sorted(names, key=lambda name: (name.split(".")[2], order.index(name.split(".")[-1])))


def finished_run(root: Store, arms: list[str]) -> None:
    policy = {"model_name_or_path": "/private/place/model"}
    config = {"output_dir": "/private/run", "prepare": {"sources": [{"path": "/private/p.jsonl"}]}}
    for arm in arms:
        root.create_json(f"arms/{arm}/config.json", config | {"policy": policy, "arms": [arm]})
        root.create_json(f"arms/{arm}/metrics.json", {"pairs": 3})
        root.create_json(f"arms/{arm}/stages.json", {"align": {"key": f"key-{arm}"}})
        root.create(f"align/key-{arm}/model/config.json", f'"{arm}"'.encode())
        root.create(f"align/key-{arm}/model/shards/1.safetensors", b"weights")
        root.create(f"align/key-{arm}/checkpoints/step-1", b"not exported")
        root.create_json(f"align/key-{arm}/manifest.json", {})


def test_export_copies_the_aligned_model_and_nothing_else(tmp_path: Path) -> None:
    finished_run(Store(str(tmp_path / "run")), ["cw", "weak"])
    to = tmp_path / "out"
    assert export(str(tmp_path / "run"), "weak", str(to)) == str(to)
    files = sorted(path.relative_to(to).as_posix() for path in to.rglob("*") if path.is_file())
    assert files == ["README.md", "config.json", "shards/1.safetensors"]
    assert json.loads((to / "config.json").read_text()) == "weak"


def test_export_gives_the_adapter_alone_where_there_is_one(tmp_path: Path) -> None:
    run, to = str(tmp_path / "run"), tmp_path / "out"
    finished_run(Store(run), ["cw"])
    with pytest.raises(ExportError, match="trained in full and has no adapter"):
        export(run, "cw", str(to), adapter=True)
    Store(run).create("align/key-cw/adapter/adapter_config.json", b"{}")
    export(run, "cw", str(to), adapter=True)
    assert sorted(path.name for path in to.rglob("*")) == ["README.md", "adapter_config.json"]
    assert "library_name: peft" in (to / "README.md").read_text()


def test_export_reads_and_writes_s3(s3_store: Store) -> None:
    finished_run(s3_store, ["cw"])
    export(s3_store.uri, None, f"{s3_store.uri}-out")
    names = Store(f"{s3_store.uri}-out").names()
    assert names == ["README.md", "config.json", "shards/1.safetensors"]


def test_export_refuses_with_the_choice_there_is(tmp_path: Path) -> None:
    run, root = str(tmp_path / "run"), Store(str(tmp_path / "run"))
    with pytest.raises(ExportError, match="no finished arm"):
        export(run, None, str(tmp_path / "out"))
    finished_run(root, ["cw", "weak"])
    with pytest.raises(ExportError, match="choose from cw, weak"):
        export(run, None, str(tmp_path / "out"))
    with pytest.raises(ExportError, match=r"no 'human'.*choose from cw, weak"):
        export(run, "human", str(tmp_path / "out"))
    with pytest.raises(ExportError, match="not empty"):
        export(run, "cw", run)
    root.remove("align/key-cw/manifest.json")
    with pytest.raises(ExportError, match="not finished"):
        export(run, "cw", str(tmp_path / "out"))


def metrics(seed: int) -> dict[str, Any]:
    run = {
        "output_dir": "x",
        "seed": seed,
        "simulated_labels": False,
        "versions": {},
        "device": "c",
    }
    rejects = {"empty answer": 3 + seed} if seed else {}
    prepare = {"rows_in": 40, "pairs": 37, "splits": {"test": 37}, "rejects": rejects}
    return {"run": run, "prepare": prepare, "arms": {"human": {"pairs": 10 + seed}}, "config": {}}


def test_several_runs_share_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(tmp_path / f"seed{seed}") for seed in range(2)]
    for seed, run in enumerate(runs):
        Store(run).create_json("metrics.json", metrics(seed))
    page = show(runs, str(tmp_path / "seeds.html"))
    for text in (Path(page).read_text(), capsys.readouterr().out):
        assert "seed0/human" in text
        assert "seed1/human" in text
        assert "as given" in text, "an arm of people, also under the name of its run"
    told = Path(page).read_text()
    assert "pairs prepared" not in told
    assert "One run, one seed" not in told
    rejected = re.search(r"empty answer.*?</tr>", told, re.DOTALL)
    assert rejected is not None
    assert re.findall(r"<span>(\d+)</span>", rejected.group()) == ["0", "4"], "a column a run"
    with pytest.raises(ShowError, match="--to"):
        show(runs)
    with pytest.raises(ShowError, match="no run ended there"):
        show([str(tmp_path)])


def test_a_command_that_lacks_its_config_is_told_so(exit_code: Callable[..., Any]) -> None:
    assert exit_code("submit", "annotate", "--address", "http://127.0.0.1:1") == 2


def test_job_scripts_are_the_same_commands(tmp_path: Path) -> None:
    for name in ("run", "compare", *cli.STAGES):
        text = (ROOT / "jobs" / f"{name}.py").read_text()
        assert f'main(["{name}", *sys.argv[1:]])' in text


def test_the_demos_configuration_is_valid() -> None:
    load_config(ROOT / "cwpo_dist" / "demo" / "demo.yaml")
