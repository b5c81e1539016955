"""Credentials: refused in whatever a run is told, hidden in what it says."""

from __future__ import annotations

import http.server
import json
import logging
import signal
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import ValidationError

from cwpo_dist.cli import app as cli
from cwpo_dist.cli import terminal_log
from cwpo_dist.config import Config, ConfigError, ModelConfig, Section, Source
from cwpo_dist.config.deepspeed import read_section
from cwpo_dist.config.load import load_config, parse_config
from cwpo_dist.pairs.locate import find
from cwpo_dist.pairs.readers import SourceError, read
from cwpo_dist.redaction import first_credential, has_credential, is_secret_name, redacted
from cwpo_dist.storage import StorageError, Store

# "5ECRET" stands for the secret in each.
CREDENTIALS = r"""
http://user:5ECRET@127.0.0.1:80/x.jsonl
simplecache::http://user:5ECRET@127.0.0.1:80/x.jsonl
zip://x.jsonl::http://user:5ECRET@127.0.0.1:9/x.zip
filecache::s3://K:5ECRET@b/x
http://127.0.0.1:80/x.jsonl?token=5ECRET
http://127.0.0.1:80/y.jsonl?f=x.jsonl&Signature=5ECRET
http://127.0.0.1:80/token=5ECRET/x.jsonl
https://h/x.jsonl?X-Amz-Credential=5ECRET
https://h/x?sv=2024&sig=5ECRET
https://h/x?a=1&key=5ECRET
https://h/x?AWSAccessKeyId=5ECRET
https://h/x#access_token=5ECRET
user:5ECRET@host/x.jsonl
https:\\user:5ECRET@h
https:user:5ECRET@h/x
s3://AKIA:5E/5ECRET@bucket/x
https://5ECRET@host/x
https://user@example.org:5ECRET@host/x
https://user:5ECRET%40host/x
https://h/x?url=https%3A%2F%2Fuser%3A5ECRET%40host
models/hf_5ECRETabcdefghijklmnopqrstuv
Bearer 5ECRETabcdefghij
https://user%253A5ECRET%2540host/x%2520
{'anon': False, 'secret': '5ECRET'}
{"aws_secret_access_key": "5ECRET"}
S3FileSystem(key='AKI', token='5ECRET')
--token=5ECRET
Cookie=5ECRET
sk-ant-api03-5ECRETab_cd-efghijklmnop
nvapi-5ECRETabcdefghijklmnop
""".strip().splitlines()
HARMLESS = r"""
s3://bucket/a:b/c
hf://datasets/owner/name@main/x.jsonl
abfss://container@account.dfs.core.windows.net/x
github://organisation:repository@main/data/x.jsonl
sftp://me@host/x
https://h:8080/x@y.jsonl
https://[::1]:80/x@y
https://h/x?version=3&tokens=4&keyword=b&download=true
zip://x.jsonl::https://h/a@b.zip
simplecache::data@v1/file.jsonl
s3://asiapacificbucket0123/x
data/key=3/part.parquet
C:\Users\a@b
Qwen/Qwen2.5-7B
sk-learn-classifier-model-version-2
cw, 30 % labelled
https://***@h/x
""".strip().splitlines()
LEAST: dict[str, Any] = {"output_dir": "o", "prepare": {"sources": [{"path": "x"}]}}


@pytest.mark.parametrize("text", CREDENTIALS)
def test_a_credential_is_seen_and_hidden(text: str) -> None:
    assert has_credential(text)
    assert "5ECRET" not in redacted(text)
    assert not has_credential(redacted(text))


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_one_stays(text: str) -> None:
    assert not has_credential(text)
    assert redacted(text) == text


@pytest.mark.parametrize("piece", ["a.", "x-", ",a:b", "a://a:", "://a:b/", "eyJaaaaaaaa-", "25"])
def test_a_long_text_takes_no_time_to_speak_of(piece: str) -> None:
    """A name in a stranger's file may have any length, and messages name it."""

    def hangs(*_: object) -> None:
        pytest.fail("it did not end within 60 s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    try:
        redacted(f"%{piece * (200_000 // len(piece))}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _texts(kind: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The places of all texts that a section, and those in it, can be given."""
    if isinstance(kind, type) and issubclass(kind, Section):
        for name, field in kind.model_fields.items():
            yield from _texts(field.annotation, (*place, field.alias or name))
    elif kind is str or kind is object:
        yield place
    elif get_origin(kind) is dict:
        yield from _texts(get_args(kind)[1], (*place, "name"))
    elif get_origin(kind) in (list, tuple):
        yield from _texts(get_args(kind)[0], (*place, 0))
    elif isinstance(kind, types.UnionType) or get_args(kind):
        for inner in get_args(kind):
            yield from _texts(inner, place)


def _with(place: tuple[str | int, ...], value: str) -> dict[str, Any]:
    """The least configuration with a value at a place."""
    nested: Any = value
    for part in reversed(place):
        nested = {part: nested} if isinstance(part, str) else [nested]
    over: dict[str, Any] = nested
    if place[0] == "prepare":
        over = {"prepare": LEAST["prepare"] | over["prepare"]}
    return LEAST | over


PLACES = sorted(set(_texts(Config)), key=str)


def test_the_walk_finds_nested_texts() -> None:
    found = {".".join(map(str, place)) for place in PLACES}
    assert {"output_dir", "policy.revision", "policy.chat_template", "arms.0"} <= found
    assert {"fit.deepspeed", "fit.deepspeed.name", "prepare.sources.0.path"} <= found
    assert {"annotate.models.0.model_name_or_path", "compare.grids.0.arms.0"} <= found
    assert len(found) > 50


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_no_text_of_a_configuration_may_hold_one(place: tuple[str | int, ...]) -> None:
    for text in (CREDENTIALS[1], CREDENTIALS[4]):
        with pytest.raises(ConfigError, match="a credential stands there") as caught:
            parse_config(_with(place, text))
        said = str(caught.value)
        assert said.startswith(".".join(map(str, place)))
        assert "5ECRET" not in said
        assert "HF_TOKEN" in said
        with pytest.raises(ValidationError) as raw:  # where no file is read
            Config.model_validate(_with(place, text))
        assert "5ECRET" not in str(raw.value)


@pytest.mark.parametrize(
    "over",
    [
        {"fit": {"deepspeed": {"wandb": {"enabled": True, "key": "5ECRET"}}}},
        {"fit": {"deepspeed": {"comet": {"apiKey": ["5ECRET"]}}}},
        {"fit": {"deepspeed": {"monitor": {"password": 5}}}},
        {"policy": {"model_name_or_path": "a/b", "hf_token": "5ECRET"}},
        {"https://user:5ECRET@h/x": 1},
    ],
)
def test_names_of_secrets_and_keys_count_too(over: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a credential stands there") as caught:
        parse_config(LEAST | over)
    assert "5ECRET" not in str(caught.value)


def test_our_own_fields_have_no_name_of_a_secret() -> None:
    parts = {part for place in PLACES for part in place if isinstance(part, str)}
    assert not [name for name in parts if is_secret_name(name)]
    assert first_credential({"wandb": {"key": None, "token": "", "auth": "auto"}}) is None


def test_sections_that_hold_themselves_end() -> None:
    endless: dict[str, Any] = {"a": []}
    endless["a"].append(endless)
    assert first_credential(endless) is None
    endless["a"].append(CREDENTIALS[0])
    assert first_credential(endless) == "a.1"


@pytest.mark.parametrize(
    "override",
    [
        f"policy.model_name_or_path={CREDENTIALS[0]}",
        "fit.deepspeed.wandb.key=5ECRET",
        "output_dir.wandb.key=5ECRET",  # no such place
        "fit.deepspeed.wandb.key=[5ECRET",  # no YAML
        CREDENTIALS[12],
    ],
)
def test_overrides_are_refused_without_it(tmp_path: Path, override: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(LEAST))
    with pytest.raises(ConfigError) as caught:
        load_config(config, [override])
    assert "5ECRET" not in str(caught.value)


def test_files_that_cannot_be_read_are_told_by_line(tmp_path: Path) -> None:
    broken = tmp_path / "c.yaml"
    broken.write_text("output_dir: o\npolicy: {token: 5ECRET: [\n")
    with pytest.raises(ConfigError, match=r"is not valid YAML: .* in line 2") as caught:
        load_config(broken)
    assert "5ECRET" not in str(caught.value)


def test_a_deepspeed_file_may_hold_none(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"wandb": {"key": "5ECRET"}}))
    with pytest.raises(ConfigError, match=r"wandb\.key: a credential") as caught:
        read_section(str(file))
    assert "5ECRET" not in str(caught.value)


def test_no_place_of_output_may_hold_one() -> None:
    with pytest.raises(StorageError, match="a credential stands in it") as caught:
        Store(CREDENTIALS[3]).names()
    assert "5ECRET" not in str(caught.value)


class _Signing(http.server.BaseHTTPRequestHandler):
    """Leads on to a signed URL, as hubs do, and refuses that; `/open` wants a header."""

    def do_GET(self) -> None:
        if "Signature" in self.path:
            self.send_error(403)
        elif self.path.startswith("/open"):
            known = self.headers.get("Authorization") == "Basic 5ECRET"
            body = b'{"prompt":"p","chosen":"a","rejected":"b"}\n' if known else b""
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
        else:
            self.send_response(302)
            self.send_header("Location", "/x.jsonl?X-Amz-Signature=5ECRET")
            self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Signing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def _rows(path: str) -> list[Any]:
    found = find("prepare.sources.0", Source(path=path))
    return [row.value for part in found.parts for row in read(part)]


def test_a_signed_url_that_a_server_leads_to_is_not_repeated(server: str) -> None:
    with pytest.raises((ConfigError, SourceError), match="403") as caught:
        _rows(f"{server}/pairs.jsonl")
    assert "5ECRET" not in str(caught.value)


def test_a_header_comes_from_the_environment(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SECURITY.md shows it; fsspec reads its variables when it is imported."""
    from fsspec.config import conf, set_conf_env

    kept = dict(conf)
    with pytest.raises((ConfigError, SourceError), match="401"):
        _rows(f"{server}/open.jsonl")
    monkeypatch.setenv("FSSPEC_HTTP", '{"headers": {"Authorization": "Basic 5ECRET"}}')
    try:
        set_conf_env(conf)
        assert _rows(f"{server}/open.jsonl") == [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    finally:
        conf.clear()
        conf.update(kept)


def test_what_the_terminal_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message, a log line and a traceback of a library's error."""
    assert "5ECRET" not in str(cli.user_message(ConfigError(CREDENTIALS[0])))
    record = logging.LogRecord("x", logging.INFO, "x", 1, "went to %s", (CREDENTIALS[4],), None)
    terminal_log._Stderr().emit(record)
    error = RuntimeError(f"cannot open {CREDENTIALS[0]}")
    terminal_log.told_without_credentials(RuntimeError, error, None)
    said = capsys.readouterr().err
    assert said.count("***") == 2
    assert "5ECRET" not in said


def test_a_section_alone_refuses_it_too() -> None:
    with pytest.raises(ValidationError, match="a credential stands there") as caught:
        ModelConfig(model_name_or_path=CREDENTIALS[2])
    assert "5ECRET" not in str(caught.value)
