"""What a user, or a stranger, hands in: it is read, or one message names it and says what to do.

Each entry of the tables says what is handed in and what the message must name. The command line
runs in this process, so that whatever is no message of ours fails its test as it is. Models have a
room of their own (`test_hostile_models.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import GOOD, PAIRS, Run, planned, refused
from test_comparison_page import sample_comparison

from cwpo_dist.cli.app import USER_ERROR

OK = "output_dir: o\nprepare: {sources: [{path: x}]}\n"
DEEP = "[" * 5000

# -- configurations, overrides, arguments


def bomb(depth: int) -> str:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join(lines) + "\n"


CONFIGS: dict[str, tuple[str, str]] = {
    "alias bomb": (bomb(10) + OK, "more than 100,000 values"),
    "alias bomb in a field": (bomb(10) + OK + "arms: *a9\n", "more than 100,000 values"),
    "merge bomb": (
        "a0: &a {x: 1}\n" + OK + f"fit: {{<<: [{','.join(['*a'] * 60_000)}]}}\n",
        "more than 100,000 values",
    ),
    "recursive list": (OK + "arms: &x [*x]\n", "no end"),
    "recursive map": ("output_dir: o\nprepare: &p {sources: [{path: x}], a: [*p]}\n", "no end"),
    "list as a key": (OK + "? [a, b]\n: c\n", "as a key"),
    "map as a key": (OK + "? {a: b}\n: c\n", "as a key"),
    "number as a key": (OK + "1: 2\n", "1: unknown key"),
    "date as a key": (OK + "seed: {2020-01-01: 2}\n", "seed: "),
    "deep": (OK + f"seed: {DEEP}\n", "32 levels"),
    "deep and closed": (OK + f"seed: {DEEP}{']' * 5000}\n", "32 levels"),
    "deep blocks": (OK + "".join(f"{' ' * i}a:\n" for i in range(99)), "32 levels"),
    "a wrong tag": (OK + "seed: !!bool x\n", "is not valid YAML"),
    "no such day": (OK + "seed: 2020-13-41\n", "is not valid YAML"),
    "code": (OK + "seed: !!python/object/apply:os.system [ls]\n", "python/object"),
    "5000 digits": (OK + f"seed: {'9' * 5000}\n", "is not valid YAML"),
    "400 digits": (OK + f"seed: 1{'0' * 400}\n", "seed: "),
    "400 digits in quotes": (OK + f"fit: {{save_steps: '1{'0' * 400}'}}\n", "fit.save_steps"),
    "rate .inf": (OK + "fit: {learning_rate: .inf}\n", "fit.learning_rate: inf"),
    "rate inf": (OK + "fit: {learning_rate: inf}\n", "fit.learning_rate: "),
    "rate 1e999": (OK + "fit: {learning_rate: '1e999'}\n", "a finite number"),
    "beta .inf": (OK + "align: {beta: .inf}\n", "align.beta: inf"),
    "decay .nan": (OK + "align: {weight_decay: .nan}\n", "align.weight_decay: nan"),
    "DeepSpeed .nan": (OK + "fit: {deepspeed: {a: .nan}}\n", "fit.deepspeed.a: nan"),
    "resources inf": (OK + "fit: {resources_per_worker: {a: inf}}\n", "resources_per_worker"),
    "beta a truth": (OK + "align: {beta: yes}\n", "align.beta: give a number (got true)"),
    "seed a truth": (OK + "seed: true\n", "seed: give a number (got true)"),
    "epochs 1e308": (OK + "fit: {num_train_epochs: 1.0e+308}\n", "fit.num_train_epochs: "),
    "resources negative": (
        OK + "fit: {resources_per_worker: {CPU: -1}}\n",
        "fit.resources_per_worker.CPU: -1",
    ),
    "no output": (OK.replace("output_dir: o", "output_dir: ''"), 'output_dir: ""; give a name'),
    "no path": (OK.replace("path: x", "path: ''"), 'prepare.sources.0.path: ""; give a name'),
    "no model": (OK + "policy: {model_name_or_path: ''}\n", "policy.model_name_or_path: "),
    "5000 unknown keys": (OK + "".join(f"k{i}: 1\n" for i in range(5000)), "4970 more"),
    "batch a list": (OK + "fit: {per_device_train_batch_size: [1]}\n", "train_batch_size: [1]"),
    "batch a map": (OK + "fit: {per_device_train_batch_size: {a: 1}}\n", "train_batch_size: "),
    "batch .inf": (OK + "fit: {per_device_train_batch_size: .inf}\n", "train_batch_size: inf"),
    "batch text": (OK + "fit: {per_device_train_batch_size: x}\n", 'train_batch_size: "x"'),
    "accumulation text": (
        OK + "fit: {per_device_train_batch_size: 1, gradient_accumulation_steps: x}\n",
        "fit.gradient_accumulation_steps",
    ),
    "workers null": (
        OK + "fit: {num_workers: null, per_device_train_batch_size: 2}\n",
        "fit.num_workers: null",
    ),
    "NUL in a path": (OK.replace("output_dir: o", 'output_dir: "a\\0b"'), "output_dir: 'a\\x00b'"),
    "surrogate in a path": (OK.replace("path: x", 'path: "\\ud800"'), "prepare.sources.0.path: "),
    "surrogate in a key": (OK + '"\\ud800": 1\n', "key '\\ud800'"),
    "no URI": (OK.replace("output_dir: o", "output_dir: 'http://[::1'"), "output_dir: "),
    "no mapping": ("- 1\n", "must hold a mapping"),
    "two documents": (OK + "---\nx: 1\n", "single document"),
    "too large": (OK + "#" * 2**20, "more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_refused_by_name(cwpo: Run, tmp_path: Path, name: str) -> None:
    text, culprit = CONFIGS[name]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    refused(cwpo("config", path), culprit)


@pytest.mark.parametrize("data", [b"\xff\xfea\x00", bytes(range(256)), b"a: \x07"])
def test_bytes_that_are_no_yaml(cwpo: Run, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    refused(cwpo("config", path), str(path))


def test_aliases_that_end_are_read(cwpo: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(OK + "fit: &f {max_steps: 3}\nsft: {<<: *f, warmup_steps: 7}\n")
    ended = cwpo("config", path)
    assert ended.code == 0
    assert ended.said.count("max_steps: 3") == 2


def test_a_named_pipe_or_device_is_no_configuration(cwpo: Run, tmp_path: Path) -> None:
    pipe = tmp_path / "run.yaml"
    os.mkfifo(pipe)
    refused(cwpo("config", pipe), str(pipe), "named pipe")
    refused(cwpo("config", "/dev/zero"), "/dev/zero", "bytes")
    refused(cwpo("config", tmp_path), str(tmp_path))
    good = tmp_path / "good.yaml"
    good.write_text(OK)
    deepspeed = [f"prepare.sources.0.path={pipe}", "arms=[cw]", f"fit.deepspeed={pipe}"]
    refused(cwpo("plan", good, *deepspeed), str(pipe))


OVERRIDES = {
    "=1": "'=1'",
    "..=1": "'..=1'",
    "seed": "'seed'",
    "a=*x": "'a=*x'",
    "seed=&a [*a]": "'seed=&a [*a]'",
    f"seed={DEEP}": "'seed=[",
    f"{'a.' * 5000}b=1": "override 'a.a.",
    "seed=!!int x": "'seed=!!int x'",
    "seed=\0": "'seed=",
    "output_dir=\udcff": "'output_dir=",
    'output_dir="\\0"': "output_dir: ",
    "\udcff=1": "key ",
    "output_dir.x=1": "output_dir.x",
    f"prepare.sources.{'9' * 5000}.path=1": "prepare.sources.9",
    "fit.learning_rate=.nan": "fit.learning_rate: nan",
    "nosuch.yaml": "nosuch.yaml",
    "\udcff.yaml": "\\udcff.yaml",
}


@pytest.mark.parametrize("override", OVERRIDES, ids=ascii)
def test_an_override_is_refused_by_name(cwpo: Run, tmp_path: Path, override: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(OK)
    refused(cwpo("config", path, override), OVERRIDES[override])


PLACES = {
    "output_dir=zip://a::/nosuch.zip": "output_dir: zip://a::/nosuch.zip",
    f"output_dir=/tmp/{'a' * 300}": "output_dir: ",
    "prepare.sources.0.path=jupyter://x": "prepare.sources.0.path: nothing to read at 'jupyter://x'",
    "prepare.sources.0.path=generic://x": "prepare.sources.0.path: nothing to read at 'generic://x'",
    "prepare.sources.0.path=hdfs://127.0.0.1:1/x": "prepare.sources.0.path: ",
    "policy.model_name_or_path=file:///nosuch": "no folder 'file:///nosuch'",
    f"policy.model_name_or_path={'a' * 5000}": "policy.model_name_or_path: no folder",
    "policy.model_name_or_path=.": "policy.model_name_or_path: the tokenizer of '.'",
}


@pytest.mark.parametrize("override", PLACES, ids=lambda each: each[:50])
def test_a_place_is_refused_by_name(cwpo: Run, folder: Path, override: str) -> None:
    """Filesystems differ in what they raise, and in when."""
    assert planned(cwpo, folder, folder / "nosuch").code == USER_ERROR  # which writes run.yaml
    given = [f"prepare.sources.0.path={folder / 'pairs.jsonl'}", override]
    ended = cwpo("plan", folder / "run.yaml", *given)
    refused(ended, PLACES[override])
    assert len(ended.said) < 6000


LONG = "x" * 300  # no disk has such a name
ARGUMENTS = [
    (["nosuch"], "nosuch"),
    (["plan"], "CONFIG"),
    (["plan", "nosuch.yaml"], "nosuch.yaml"),
    (["plan", "--show", "x", "run.yaml"], "--show"),
    (["plan", "--price", "nan", "run.yaml"], "--price"),
    (["plan", "--price", "=", "run.yaml"], "--price"),
    (["plan", "--pairs-per-second", "H100=-1", "run.yaml"], "--pairs-per-second"),
    (["check", "--nodes", "some"], "--nodes"),
    (["report"], "RUN"),
    (["report", "nosuch"], "nosuch"),
    (["report", "a", "b"], "--to"),
    (["export", "nosuch", "--to", "x"], "nosuch"),
    (["config", "run.yaml", "--nosuch"], "--nosuch"),
    (["init", LONG, "--data", "x"], "too long"),
    (["export", "nosuch", "--to", LONG], "too long"),
    (["export", "nosuch", "--to", "x", "--sign", LONG], "too long"),
    (["status", "job", "--address", "http://[::1"], "http://HEAD:8265"),
    (["stop", "job", "--address", "head"], "http://HEAD:8265"),
]


@pytest.mark.parametrize(("arguments", "culprit"), ARGUMENTS, ids=lambda each: "".join(each)[:30])
def test_arguments_are_refused_by_name(
    cwpo: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    culprit: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(OK)
    refused(cwpo(*arguments), culprit)


# -- files


def saved(**files: str) -> Callable[[Path], Path]:
    """A folder as `save_to_disk` leaves one, with these files."""

    def make(folder: Path) -> Path:
        (folder / "saved").mkdir()
        for name, text in files.items():
            (folder / "saved" / f"{name}.json").write_text(text)
        return folder / "saved"

    return make


def fifo(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "in").mkdir()
        os.mkfifo(folder / "in" / name)
        return folder / "in" / (name if name.endswith("l") else "")

    return make


def device(folder: Path) -> Path:
    (folder / "x.jsonl").symlink_to("/dev/zero")
    return folder / "x.jsonl"


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a named pipe": (fifo("x.jsonl"), "x.jsonl: no regular file"),
    "a pipe in a folder": (fifo("x.csv"), "x.csv: no regular file"),
    "a pipe as metadata": (fifo("dataset_dict.json"), "dataset_dict.json is not a regular file"),
    "a device": (device, "x.jsonl: no regular file"),
    "empty dataset_dict": (saved(dataset_dict=""), "dataset_dict.json is not JSON"),
    "dataset_dict {}": (saved(dataset_dict="{}"), "dataset_dict.json: splits"),
    "dataset_dict []": (saved(dataset_dict="[]"), "dataset_dict.json does not hold a JSON object"),
    "dataset_dict deep": (saved(dataset_dict="[" * 10**5), "dataset_dict.json is not JSON"),
    "splits no list": (saved(dataset_dict='{"splits": 3}'), "dataset_dict.json: splits: 3"),
    "splits no names": (saved(dataset_dict='{"splits": [[]]}'), "dataset_dict.json: splits"),
    "no such split": (saved(dataset_dict='{"splits": ["train"]}'), "prepare.sources.0.path"),
    "empty state": (saved(state=""), "state.json is not JSON"),
    "state []": (saved(state="[]"), "state.json does not hold a JSON object"),
    "state {}": (saved(state="{}"), "prepare.sources.0.path"),
    "state and info": (saved(state='{"_data_files": 3}', dataset_info="[]"), "prepare.sources.0"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_refused_by_name(cwpo: Run, folder: Path, name: str) -> None:
    make, culprit = FILES[name]
    refused(planned(cwpo, folder, make(folder)), "prepare.sources.0", culprit)


def test_names_that_mean_something_elsewhere_are_read(cwpo: Run, folder: Path) -> None:
    """`::` is a URI inside another to fsspec, and brackets are a glob."""
    within = folder / "d::e[f]"
    within.mkdir()
    files = [within / f"{name}.jsonl" for name in ("a::b", "a[0-9]b", "[x]", "a*?", "{b}")]
    for number, file in enumerate(files):
        file.write_text(GOOD.replace(': "p', f': "{number} p'))
    for given in ([within], files):
        ended = planned(cwpo, folder, *given)
        assert ended.code == 0, ended.said
        assert "500 answers to 250 prompts, tokenised" in " ".join(ended.said.split())


def test_a_bad_file_at_the_head_of_a_glob_stops_nothing(cwpo: Run, folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "in" / "0.jsonl").write_bytes(b"\x00\xff no row\n" * 2000)
    (folder / "in" / "1.parquet").write_bytes(b"PAR1")
    (folder / "in" / "2.jsonl").write_text(GOOD)
    assert planned(cwpo, folder, folder / "in" / "*").code == 0
    (folder / "in" / "2.jsonl").unlink()
    refused(
        planned(cwpo, folder, folder / "in" / "*"), "0.jsonl: invalid Unicode", "1.parquet: dam"
    )


def test_what_others_wrote_does_not_steer_a_terminal(cwpo: Run, folder: Path) -> None:
    """With ESC and CR a row, or a name, could wipe out a line and write another in its place."""
    wipe, spelled = "\x1b[2K\r\x9b1A", "\\x1b[2K\\x0d\\x9b1A"
    rows = [pair | {"prompt": f"{pair['prompt']}{wipe}", f"n{wipe}": 1} for pair in PAIRS]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert planned(cwpo, folder, folder / "in.jsonl").code == 0
    shown = cwpo("plan", folder / "run.yaml", "--show", 1)
    assert shown.code == 0, shown.said
    (folder / "in.jsonl").write_text("".join(f"{json.dumps({f'n{wipe}': 1})}\n" for _ in PAIRS))
    ended = planned(cwpo, folder, folder / "in.jsonl")
    refused(ended, "has no columns for two answers")
    for said, count in ((shown.said, 2), (ended.said, 1)):
        assert said.count(spelled) >= count, said
        assert "\x1b[2K" not in said
        assert "\x9b" not in said
        assert "\r" not in said


# -- reports


@pytest.mark.parametrize("lacks", ["values", "low", "mean"])
def test_figures_that_lack_something_are_refused_by_name(
    cwpo: Run, tmp_path: Path, lacks: str
) -> None:
    found = sample_comparison()
    gra = found["trials"]["cw"]["against"]["human"]["accuracy"]
    found["trials"]["cw"]["figures"] = {"gra_human": {**gra, "ties": 0.1}, "accuracy": {**gra}}
    gra.pop(lacks, None)
    found["trials"]["cw"]["figures"]["accuracy"].pop(lacks, None)
    (tmp_path / "comparison.json").write_text(json.dumps(found))
    ended = cwpo("report", tmp_path)
    refused(ended, "comparison.json", lacks)


@pytest.mark.parametrize(
    "name", ["ties", "values", "low", "items", "{0}", "{{ x }}", "\ud800", "[/]"]
)
def test_names_that_mean_something_to_pages_are_shown(cwpo: Run, tmp_path: Path, name: str) -> None:
    found = sample_comparison(name)
    (tmp_path / "comparison.json").write_text(json.dumps(found))
    ended = cwpo("report", tmp_path)
    assert ended.code == 0, ended.said
    assert (tmp_path / "comparison.html").exists()


@pytest.mark.parametrize("text", ["[]", "{}", '{"arms": 3}', '{"run": {}}', "[" * 10**5, "null"])
@pytest.mark.parametrize("file", ["metrics.json", "comparison.json"])
def test_figures_that_are_none_are_refused_by_name(
    cwpo: Run, tmp_path: Path, file: str, text: str
) -> None:
    (tmp_path / file).write_text(text)
    refused(cwpo("report", tmp_path), file)
