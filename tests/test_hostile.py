"""What a user, or a stranger, hands in: it is read, or one message names it and says what to do.

Each entry of the tables says what is handed in and what the message must name. The command line
runs in this process, so that whatever is no message of ours fails its test as it is.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_comparison_page import sample_comparison
from tiny import save_tiny, tiny_tokenizer

from cwpo_dist import cli
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.templates import Fault, TokenError
from cwpo_dist.lm.tokens import Asked, Encoder
from cwpo_dist.stages import model_checks

LIMIT_S = 120  # far beyond what any entry takes: what has not ended then hangs
PAIRS = [{"prompt": f"p{i}", "chosen": "aa", "rejected": "b"} for i in range(50)]
GOOD = "".join(json.dumps(pair) + "\n" for pair in PAIRS)
OK = "output_dir: o\nprepare: {sources: [{path: x}]}\n"
DEEP = "[" * 5000
MESSAGES = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    code: Any
    said: str


Run = Callable[..., Ended]


@pytest.fixture
def cwpo(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command in this process; one that hangs fails the test."""

    def hangs(*_: object) -> None:
        pytest.fail(f"it did not end within {LIMIT_S} s")

    def run(*arguments: object) -> Ended:
        try:
            cli.main(list(map(str, arguments)))
        except SystemExit as ended:
            return Ended(ended.code, "".join(capsys.readouterr()))
        raise AssertionError("a command ends by an exit")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(LIMIT_S)
    yield run
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(ended: Ended, *names: str) -> None:
    """Exit code 2, no traceback, and every culprit named."""
    assert ended.code == cli.USER_ERROR, ended.said
    assert "Traceback" not in ended.said
    said = " ".join(ended.said.split())
    assert [name for name in names if name not in said] == [], said


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
    section = cwpo("config", good, f"fit.deepspeed={pipe}")
    assert section.code == 0 or str(pipe) in section.said


OVERRIDES = {
    "=1": "'=1'",
    "..=1": "'..=1'",
    "seed": "'seed'",
    "a=*x": "a: '*x'",
    "seed=&a [*a]": "seed: '&a [*a]'",
    f"seed={DEEP}": "seed: ",
    f"{'a.' * 5000}b=1": "override 'a.a.",
    "seed=!!int x": "seed: '!!int x'",
    "seed=\0": "seed: ",
    "output_dir=\udcff": "output_dir: ",
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


def planned(cwpo: Run, folder: Path, path: object, **settings: Any) -> Ended:
    """`cwpo plan` of a run that labels nothing and trains nothing but the model of `settings`."""
    model = {"model_name_or_path": str(folder / "model"), "max_length": 100} | settings
    config = {
        "output_dir": str(folder / "out"),
        "arms": ["human"],
        "prepare": {"sources": [{"path": str(path)}], "max_reject_fraction": 1.0},
        "policy": model,
        "sft": None,
    }
    file = folder / "run.yaml"
    file.write_text(json.dumps(config))
    return cwpo("plan", file)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "model", "llama")


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """With a model and pairs that can be used."""
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text(GOOD)
    return tmp_path


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
    "a pipe as metadata": (fifo("dataset_dict.json"), "dataset_dict.json is no regular file"),
    "a device": (device, "x.jsonl: no regular file"),
    "empty dataset_dict": (saved(dataset_dict=""), "dataset_dict.json is no JSON"),
    "dataset_dict {}": (saved(dataset_dict="{}"), "dataset_dict.json: splits"),
    "dataset_dict []": (saved(dataset_dict="[]"), "dataset_dict.json holds no JSON object"),
    "dataset_dict deep": (saved(dataset_dict="[" * 10**5), "dataset_dict.json is no JSON"),
    "splits no list": (saved(dataset_dict='{"splits": 3}'), "dataset_dict.json: splits: 3"),
    "splits no names": (saved(dataset_dict='{"splits": [[]]}'), "dataset_dict.json: splits"),
    "no such split": (saved(dataset_dict='{"splits": ["train"]}'), "prepare.sources.0.path"),
    "empty state": (saved(state=""), "state.json is no JSON"),
    "state []": (saved(state="[]"), "state.json holds no JSON object"),
    "state {}": (saved(state="{}"), "prepare.sources.0.path"),
    "state and info": (saved(state='{"_data_files": 3}', dataset_info="[]"), "prepare.sources.0"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_refused_by_name(cwpo: Run, folder: Path, name: str) -> None:
    make, culprit = FILES[name]
    refused(planned(cwpo, folder, make(folder)), "prepare.sources.0", culprit)


@pytest.mark.parametrize(
    "name", ["a::b.jsonl", "a[0-9]b.jsonl", "[x].jsonl", "a*?.jsonl", "{b}.jsonl"]
)
@pytest.mark.parametrize("given", ["itself", "its folder"])
def test_names_that_mean_something_elsewhere_are_read(
    cwpo: Run, folder: Path, name: str, given: str
) -> None:
    (folder / "d::e[f]").mkdir()
    (folder / "d::e[f]" / name).write_text(GOOD)
    path = folder / "d::e[f]" / (name if given == "itself" else "")
    ended = planned(cwpo, folder, path)
    assert ended.code == 0, ended.said
    assert name in ended.said or "50" in ended.said


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


# -- models

Change = Callable[[Path], object]


def js(file: str, **changes: Any) -> Change:
    """Changes in a JSON file of a model."""

    def change(model: Path) -> None:
        path = model / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def put(file: str, data: bytes) -> Change:
    return lambda model: (model / file).write_bytes(data)


def header(change: Callable[[dict[str, Any], str], dict[str, Any]]) -> Change:
    """Another header for the weights, made of its own and the name of a tensor."""

    def rewrite(model: Path) -> None:
        path = model / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        head = json.loads(data[8 : 8 + length])
        first = next(name for name in head if name != "__metadata__")
        new = json.dumps(change(head, first)).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])

    return rewrite


def tensor(**changes: Any) -> Change:
    return header(lambda head, first: head | {first: head[first] | changes})


def cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pipe(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")


def split_on(pattern: str) -> Change:
    of = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return js("tokenizer.json", pre_tokenizer=of)


def template(text: str) -> Change:
    return put("chat_template.jinja", text.encode())


WEIGHTS, CONFIG, TOKENIZER = "model.safetensors: ", "config.json: ", "no tokenizer in "
MODELS: dict[str, tuple[Change, str]] = {
    "weights empty": (put("model.safetensors", b""), WEIGHTS),
    "weights cut": (cut, WEIGHTS),
    "header too long": (put("model.safetensors", struct.pack("<Q", 2**63) + b"{}"), WEIGHTS),
    "header no JSON": (put("model.safetensors", struct.pack("<Q", 4) + b"{{{{"), WEIGHTS),
    "header deep": (
        put("model.safetensors", struct.pack("<Q", 50_000) + b'{"a":' * 10_000),
        WEIGHTS,
    ),
    "offsets": (tensor(data_offsets=[0, 2**60]), WEIGHTS),
    "shape": (tensor(shape=[2**40, 2**40]), WEIGHTS),
    "dtype": (tensor(dtype="EVIL"), WEIGHTS),
    "overlap": (header(lambda head, first: head | {"x": head[first]}), WEIGHTS),
    "another framework": (header(lambda h, _: h | {"__metadata__": {"format": "tf"}}), WEIGHTS),
    "index no JSON": (
        lambda m: [
            (m / "model.safetensors").unlink(),
            put("model.safetensors.index.json", b"[")(m),
        ],
        "model.safetensors.index.json",
    ),
    "index of nothing": (
        lambda m: [
            (m / "model.safetensors").unlink(),
            put("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}')(m),
        ],
        "b.safetensors",
    ),
    "config a list": (put("config.json", b"[]"), CONFIG),
    "config empty": (put("config.json", b""), CONFIG),
    "config deep": (put("config.json", b'{"a":' * 10**5), CONFIG),
    "config bytes": (put("config.json", bytes(range(256))), CONFIG),
    "layers 1e9": (js("config.json", num_hidden_layers=10**9), "num_hidden_layers: 1000000000"),
    "layers negative": (js("config.json", num_hidden_layers=-1), "num_hidden_layers"),
    "layers text": (js("config.json", num_hidden_layers="many"), "num_hidden_layers"),
    "layers null": (js("config.json", num_hidden_layers=None), "num_hidden_layers"),
    "heads 0": (js("config.json", num_attention_heads=0), "num_attention_heads"),
    "width a fraction": (js("config.json", hidden_size=32.5), "hidden_size"),
    "words 1e12": (js("config.json", vocab_size=10**12), "vocab_size: 1000000000000"),
    "positions text": (js("config.json", max_position_embeddings="x"), "max_position_embeddings"),
    "rope unknown": (js("config.json", rope_parameters={"rope_type": "evil"}), "model"),
    "activation": (js("config.json", hidden_act="os.system"), "os.system"),
    "type unknown": (js("config.json", model_type="nosuch"), "nosuch"),
    "type a list": (js("config.json", model_type=["llama"]), "model_name_or_path"),
    "dtype unknown": (js("config.json", dtype="float7"), "float7"),
    "EOS text": (js("config.json", eos_token_id="x"), "eos_token_id"),
    "quantised": (
        js(
            "config.json",
            quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        ),
        "bitsandbytes",
    ),
    "adapter": (put("adapter_config.json", b"[]"), "adapter_config.json"),
    "tokenizer {}": (put("tokenizer.json", b"{}"), TOKENIZER),
    "tokenizer []": (put("tokenizer.json", b"[]"), "tokenizer.json: "),
    "tokenizer deep": (put("tokenizer.json", b"[" * 10**5), "tokenizer.json: "),
    "tokenizer unknown": (put("tokenizer.json", b'{"model": {"type": "Evil"}}'), TOKENIZER),
    "a pipe": (pipe, "tokenizer.json is no regular file"),
    "no expression": (split_on("("), TOKENIZER),
    "EOS a number": (js("tokenizer_config.json", eos_token=5), TOKENIZER),
    "class a number": (js("tokenizer_config.json", tokenizer_class=3), TOKENIZER),
    "backtracking": (split_on("(a+)+$|(.*a){25}"), "model_name_or_path"),
    "no template": (template("{% for %}"), "chat_template"),
    "a template of templates": (template("{% include '/etc/passwd' %}"), "chat_template"),
}
# These need the child's limit to end.
ENDLESS = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
}
READ = {
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "memory": "{{ 'a' * 10**13 }}",
    "division": "{{ 1/0 }}",
    "attributes": "{{ ''.__class__.__mro__ }}",
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_refused_by_name(cwpo: Run, folder: Path, name: str) -> None:
    change, culprit = MODELS[name]
    change(folder / "model")
    ended = planned(cwpo, folder, folder / "pairs.jsonl")
    refused(ended, "policy.", culprit)
    assert len(ended.said) < 3000


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_an_end_is_refused(
    cwpo: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(model_checks, "_TOKENS_S", 2)
    template(ENDLESS[name])(folder / "model")
    refused(planned(cwpo, folder, folder / "pairs.jsonl"), "policy.", "too much time")


@pytest.mark.parametrize("name", READ)
def test_a_template_that_refuses_rows_says_so(cwpo: Run, folder: Path, name: str) -> None:
    """Some demand more than a plain conversation: that is of rows, which are set aside."""
    template(READ[name])(folder / "model")
    ended = planned(cwpo, folder, folder / "pairs.jsonl")
    assert ended.code in (0, cli.USER_ERROR)
    assert "the chat template" in ended.said


def test_a_text_on_which_a_tokenizer_fails_is_one_row_of_many() -> None:
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, "plain")
    rows = encoder.encode_all([Asked("good", ["a"]), Asked("bad", ["\ud800"]), Asked("x", ["b"])])
    assert [type(row) for row in rows] == [Row, TokenError, Row]
    assert rows[0] == encoder.encode("good", ["a"])
    assert isinstance(rows[1], TokenError)
    assert rows[1].fault is Fault.UNREAD


# -- reports


@pytest.mark.parametrize("lacks", ["ties", "values", "low", "mean"])
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
    if lacks != "ties":
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


# -- at random


def shaken(data: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut out, doubled, or a piece of JSON put among them."""
    out = bytearray(data)
    for _ in range(draw.randrange(1, 8)):
        at = draw.randrange(len(out) or 1)
        match draw.randrange(4):
            case 0:
                out[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del out[at : at + draw.randrange(1, 200)]
            case 2:
                out[at:at] = out[at : at + draw.randrange(1, 50)]
            case _:
                out[at:at] = draw.choice(
                    [b"null", b"[", b"-1", b"1e999", b"{}", b'"', b"*a", b"&a "]
                )
    return bytes(out)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(200))
def test_shaken_inputs_are_read_or_refused(cwpo: Run, folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    names = [path for path in (folder / "model").iterdir() if path.is_file()]
    path = draw.choice([*names, folder / "pairs.jsonl"])
    path.write_bytes(shaken(path.read_bytes(), draw))
    ended = planned(cwpo, folder, folder / "pairs.jsonl")
    assert ended.code in (0, cli.USER_ERROR)
    assert "Traceback" not in ended.said
    config = folder / "run.yaml"
    config.write_bytes(shaken(config.read_bytes(), draw))
    assert cwpo("config", config).code in (0, cli.USER_ERROR)
