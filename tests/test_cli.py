"""The command line: quick help that teaches, clean messages, export, several runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from prepared import row, write
from ray.exceptions import RayTaskError
from small_run import write_config

from cwpo_dist import __version__
from cwpo_dist.cli import app as cli
from cwpo_dist.cli.jobs import plan_options
from cwpo_dist.config import ConfigError, PrepareConfig
from cwpo_dist.config.load import load_config
from cwpo_dist.graph import prepare_node
from cwpo_dist.pairs.rejects import RejectsError
from cwpo_dist.results.export import ExportError, export
from cwpo_dist.results.show import ShowError, show
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.stop_signals import Preempted
from cwpo_dist.storage import MANIFEST, Store

COMMANDS = [*cli.STAGES, "run", "plan", "compare", "config", "report", "export"]
COMMANDS += ["submit", "status", "logs", "stop"]


def cwpo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cwpo_dist.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("content", [b"", b'{"counts": {'], ids=["empty", "torn"])
def test_each_command_names_a_file_that_a_power_cut_left(
    tmp_path: Path,
    exit_code: Callable[..., int | str | None],
    capsys: pytest.CaptureFixture[str],
    content: bytes,
) -> None:
    """In one sentence, with what to do; none takes a stage for done."""
    pairs = write(tmp_path / "x.jsonl", [row(i) for i in range(40)])
    given = {"output_dir": str(tmp_path / "run"), "prepare": {"sources": [{"path": pairs}]}}
    config, run = tmp_path / "run.yaml", Store(str(tmp_path / "run"))
    config.write_text(json.dumps(given))
    loaded = load_config(str(config))
    place = run.child(prepare_node(loaded).path)
    prepare(place, loaded.prepare, loaded.seed)
    place.create(MANIFEST, content)
    run.create("arms/cw/stages.json", content)
    run.create("arms/cw/config.json", content)
    export_it = ("export", run.uri, "--to", str(tmp_path / "model"))
    for command in (
        ("plan", str(config)),
        ("prepare", str(config)),
        ("report", run.uri),
        export_it,
    ):
        assert exit_code(*command) == cli.USER_ERROR, command
        said = capsys.readouterr().err
        assert re.search(r"json' is (empty|torn), .* remove it, then run the same command", said)
        assert "Traceback" not in said


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cwpo_dist.cli import app as cli\n"
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


@pytest.mark.parametrize("wrapped", [False, True])  # as `cwpo compare` gets it from a task
def test_a_run_that_was_told_to_stop_has_an_exit_code_of_its_own(
    tmp_path: Path,
    exit_code: Callable[..., int | str | None],
    monkeypatch: pytest.MonkeyPatch,
    wrapped: bool,
) -> None:
    stopped: Exception = Preempted("told to stop")
    if wrapped:
        stopped = RayTaskError("make", "traceback", stopped).as_instanceof_cause()

    def end(*_: object) -> None:
        raise stopped

    monkeypatch.setattr("cwpo_dist.results.show.show", end)
    assert exit_code("report", str(tmp_path)) == 75


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
    noted = ConfigError(f"{cause}\nFailed to apply UDF transform after 1/1 attempts.")
    assert cli.user_message(noted) == "annotate: nothing to score"  # Ray Data writes into ours
    assert cli.user_message(RayTaskError("task", "…", KeyError("x")).as_instanceof_cause()) is None


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
    assert files == ["README.md", "config.json", "digests.json", "shards/1.safetensors"]
    assert json.loads((to / "config.json").read_text()) == "weak"


def test_export_gives_the_adapter_alone_where_there_is_one(tmp_path: Path) -> None:
    run, to = str(tmp_path / "run"), tmp_path / "out"
    finished_run(Store(run), ["cw"])
    with pytest.raises(ExportError, match="trained in full and has no adapter"):
        export(run, "cw", str(to), adapter=True)
    Store(run).create("align/key-cw/adapter/adapter_config.json", b"{}")
    export(run, "cw", str(to), adapter=True)
    names = ["README.md", "adapter_config.json", "digests.json"]
    assert sorted(path.name for path in to.rglob("*")) == names
    assert "library_name: peft" in (to / "README.md").read_text()


def test_export_reads_and_writes_s3(s3_store: Store) -> None:
    finished_run(s3_store, ["cw"])
    export(s3_store.uri, None, f"{s3_store.uri}-out")
    names = Store(f"{s3_store.uri}-out").names()
    assert names == ["README.md", "config.json", "digests.json", "shards/1.safetensors"]


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
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"file' is a file; name a new folder"):
        export(run, "cw", str(tmp_path / "file"))
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
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "comparison.json").write_text("{}")
    with pytest.raises(ShowError, match="it holds a comparison, whose page is its own"):
        show([str(tmp_path / "compared"), *runs], str(tmp_path / "all.html"))


@pytest.mark.usefixtures("in_process")
def test_a_run_that_ended_at_prepare_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What became of each row, what nothing read, and which files were left out."""
    source, run = tmp_path / "data", Store(str(tmp_path / "run"))
    source.mkdir()
    rows = [{"prompt": f"p{i % 8}", "chosen": "yes", "rejected": "no"} for i in range(9)]
    rows += [{"prompt": "p", "chosen": "", "rejected": "no", "rater": "Ann"}]
    (source / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source / "picture.png").write_bytes(b"\x89PNG")
    given = {"sources": [{"path": str(source)}], "max_reject_fraction": 0.5}
    manifest: dict[str, Any] = {"versions": {}, "device": "cpu"}
    for key, seed in (("one", 0), ("two", 1)):
        place = run.child("prepare", key)
        manifest["counts"] = prepare(place, PrepareConfig.model_validate(given), seed)
        place.create_json(MANIFEST, manifest)
        page = Path(show([run.uri]))
        assert page == tmp_path / "run" / "report.html"
        for text in (page.read_text(), capsys.readouterr().out):
            for word in ("empty answer", "rater", "picture.png", "duplicates merged into them"):
                assert word in text
            assert ("two" in text) == (key == "two"), "settings that changed have a column each"
    refused = Store(str(tmp_path / "refused"))
    strict = PrepareConfig.model_validate(given | {"max_reject_fraction": 0.0})
    with pytest.raises(RejectsError):
        prepare(refused.child("prepare", "key"), strict, 0)
    with pytest.raises(
        ShowError, match=r"set too many rows aside, .*refused/prepare/key/rejects has"
    ):
        show([refused.uri])


def test_a_command_that_lacks_its_config_is_told_so(exit_code: Callable[..., Any]) -> None:
    assert exit_code("submit", "annotate", "--address", "http://127.0.0.1:1") == 2


def test_job_scripts_are_the_same_commands(tmp_path: Path) -> None:
    for name in ("run", "compare", *cli.STAGES):
        text = (ROOT / "jobs" / f"{name}.py").read_text()
        assert f'main(["{name}", *sys.argv[1:]])' in text


def test_the_demos_configuration_is_valid() -> None:
    load_config(ROOT / "cwpo_dist" / "demo" / "demo.yaml")
