"""Exported folders: each file that is not as it was written is named; whose signature it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from exported_runs import finish, tiny_policy

from cwpo_dist.cli import app as cli
from cwpo_dist.results.export import export
from cwpo_dist.signing import DIGESTS, SIGNATURE, SigningError, compare, sign, write_digests
from cwpo_dist.storage import Store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "aligned"
    (folder / "base").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "config.json").write_text("{}")
    (folder / "base" / "model.safetensors").write_bytes(b"base")
    write_digests(Store(str(folder)))
    return folder


def verify(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", *map(str, arguments)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_what_was_exported_is_as_it_was(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(folder) == 0
    assert "all files as they were written" in capsys.readouterr().out


def test_each_changed_missing_and_added_file_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[1000] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").rename(folder / "renamed.json")
    (folder / "evil.partial").write_text("import os")  # no name is beneath notice
    assert verify(folder) == 1
    assert capsys.readouterr().out.splitlines() == [
        "changed: model.safetensors",
        "missing: config.json",
        "added: evil.partial",
        "added: renamed.json",
    ]


@pytest.mark.parametrize(
    "content", [None, b"", b"[]", b"[" * 10**5, b'{"predicate": {"resources": 5}}']
)
def test_without_digests_nothing_is_verified(folder: Path, content: bytes | None) -> None:
    (folder / DIGESTS).unlink()
    if content is not None:
        (folder / DIGESTS).write_bytes(content)
    assert verify(folder) == cli.USER_ERROR


@pytest.mark.parametrize("name", ["config.json", "added", DIGESTS, SIGNATURE])
@pytest.mark.parametrize("kind", ["link", "loop", "folder", "pipe"])
def test_what_is_no_regular_file_is_named_and_not_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    """A link to the same bytes may lead to others tomorrow; a pipe would be waited for."""
    target, place = tmp_path / "elsewhere", folder / name
    if kind == "folder":
        target.mkdir()
    else:
        target.write_bytes(place.read_bytes() if place.exists() else b"")
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(place if kind == "loop" else target)
    assert verify(folder) in (1, cli.USER_ERROR)
    assert name in "".join(capsys.readouterr())


def _twice(statement: dict[str, Any]) -> None:
    resources = statement["predicate"]["resources"]
    resources.append(resources[0] | {"digest": "0" * 64})


@pytest.mark.parametrize(
    "change",
    [
        _twice,
        lambda statement: statement["subject"][0]["digest"].update(sha256="0" * 64),
        lambda statement: statement["predicate"]["resources"][0].update(algorithm="md5"),
        lambda statement: statement["predicate"]["resources"][0].update(digest="no hexadecimals"),
        lambda statement: statement["predicate"]["resources"][0].update(name=["a"]),
    ],
)
def test_digests_that_export_did_not_write_are_refused(
    folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    statement = json.loads((folder / DIGESTS).read_text())
    change(statement)
    (folder / DIGESTS).write_text(json.dumps(statement))
    assert verify(folder) == cli.USER_ERROR


def test_an_object_store_is_verified_too(s3_store: Store) -> None:
    place = s3_store.child("aligned")
    place.write("model.safetensors", b"weights")
    write_digests(place)
    assert compare(place).lines() == []
    place.write("model.safetensors", b"Weights")
    assert compare(place).lines() == ["changed: model.safetensors"]


def test_every_export_comes_with_digests(tmp_path: Path) -> None:
    policy = tiny_policy(tmp_path / "policy", tied=True)
    run = finish(Store(str(tmp_path / "run")), policy, None, "lora")
    to = tmp_path / "aligned"
    export(run.root.uri, None, str(to))
    listed = json.loads((to / DIGESTS).read_text())["predicate"]["resources"]
    assert {"README.md", "config.json", "model.safetensors"} <= {each["name"] for each in listed}
    assert compare(Store(str(to))).lines() == []


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private and a public key."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


def test_a_signature_is_of_all_files(
    folder: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Who changes a file and its digest is found by the signature alone."""
    private, public = keys
    sign(Store(str(folder)), private)
    assert verify(folder, "--key", public) == 0
    assert "as they were signed" in capsys.readouterr().out
    (folder / "config.json").write_text("{ }")
    (folder / DIGESTS).unlink()
    write_digests(Store(str(folder)))
    assert verify(folder) == 0
    assert verify(folder, "--key", public) == 1
    assert "config.json" in capsys.readouterr().out


def test_another_key_does_not_do(folder: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    sign(Store(str(folder)), keys[0])
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    public = tmp_path / "other.pem"
    public.write_bytes(
        other.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    assert verify(folder, "--key", public) == 1
    (folder / SIGNATURE).write_text("{}")
    assert verify(folder, "--key", keys[1]) == 1
    (folder / SIGNATURE).unlink()
    assert verify(folder, "--key", keys[1]) == cli.USER_ERROR
    with pytest.raises(SigningError, match="--sign"):
        sign(Store(str(folder)), keys[1])  # a public one


def test_our_digests_are_those_that_the_library_signs(folder: Path) -> None:
    from model_signing import hashing  # not above: it is heavy

    config = hashing.Config().set_ignored_paths(paths=[DIGESTS], ignore_git_paths=False)
    theirs = {
        each.identifier: each.digest.digest_hex
        for each in config.hash(folder).resource_descriptors()
    }
    statement = json.loads((folder / DIGESTS).read_text())
    assert {r["name"]: r["digest"] for r in statement["predicate"]["resources"]} == theirs
