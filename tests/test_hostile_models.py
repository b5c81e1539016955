"""Model folders from strangers: each is read, or refused in one message that names the culprit."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import Run, planned, refused
from tiny import tiny_tokenizer

from cwpo_dist.cli import app as cli
from cwpo_dist.lm.encoder import Asked, Encoder
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.templates import Fault, TokenError
from cwpo_dist.runs import model_checks

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


def index(data: bytes) -> Change:
    """An index in place of the weights."""
    return lambda m: [(m / "model.safetensors").unlink(), (m / INDEX).write_bytes(data)]


def _index_of(file: str) -> bytes:
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": file}}).encode()


INDEX = "model.safetensors.index.json"
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors: ", "config.json: ", "the tokenizer of "
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
    "index no JSON": (index(b"["), "model.safetensors.index.json"),
    "index of nothing": (index(_index_of("b.safetensors")), "b.safetensors"),
    "index deep": (index(b"[" * 10**5), "model.safetensors.index.json is not an index"),
    "index without metadata": (index(b'{"weight_map": {}}'), "not an index of weights"),
    "index a pipe": (
        lambda m: [index(b"")(m), os.remove(m / INDEX), os.mkfifo(m / INDEX)],
        "model.safetensors.index.json is not a regular file",
    ),
    "index outside": (index(_index_of("../model/b.safetensors")), "outside its folder"),
    "index absolute": (index(_index_of("/b.safetensors")), "outside its folder"),
    "config a list": (put("config.json", b"[]"), CONFIG),
    "config empty": (put("config.json", b""), CONFIG),
    "config deep": (put("config.json", b'{"a":' * 10**5), CONFIG),
    "config bytes": (put("config.json", bytes(range(256))), CONFIG),
    "layers 1e9": (js("config.json", num_hidden_layers=10**9), "num_hidden_layers: 1000000000"),
    "layers negative": (js("config.json", num_hidden_layers=-1), "num_hidden_layers"),
    "layers text": (js("config.json", num_hidden_layers="many"), "num_hidden_layers"),
    "layers null": (js("config.json", num_hidden_layers=None), "num_hidden_layers"),
    "labels 1e5": (js("config.json", id2label=dict.fromkeys(range(10**5), "x")), "id2label"),
    "number of labels 1e12": (js("config.json", num_labels=10**12), "num_labels"),
    "head width 1e9": (js("config.json", head_dim=10**9), "head_dim: 1000000000"),
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
    "a pipe": (pipe, "tokenizer.json is not a regular file"),
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
    asked = [Asked("good", ["a"]), Asked("bad", ["\ud800", "c"]), Asked("x", ["b"])]
    rows = [row for of in encoder.encode_all(asked) for row in of]
    assert [type(row) for row in rows] == [Row, TokenError, Row, Row]
    assert rows[0] == encoder.encode("good", ["a"])
    assert isinstance(rows[1], TokenError)
    assert rows[1].fault is Fault.UNREAD


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
