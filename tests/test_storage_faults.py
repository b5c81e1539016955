"""What storage says is told apart: denied, unknown user, throttled, unreachable, missing, full."""

from __future__ import annotations

import errno
import socket
import uuid
from pathlib import Path
from typing import Any

import aiohttp
import botocore.exceptions as boto
import pytest
import s3fs

from cwpo_dist import storage_faults as faults
from cwpo_dist.config import ConfigError, Source
from cwpo_dist.pairs.locate import find
from cwpo_dist.pairs.readers import Part, SourceError, read
from cwpo_dist.storage import FileMissing, StorageError, Store


def client_error(code: str, status: int) -> boto.ClientError:
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return boto.ClientError(answer, "GetObject")


def http_error(status: int) -> aiohttp.ClientResponseError:
    request: Any = None
    return aiohttp.ClientResponseError(request, (), status=status, message="no")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


ERRORS = [
    (client_error("AccessDenied", 403), faults.DENIED),
    (client_error("403", 403), faults.DENIED),
    (PermissionError("Forbidden"), faults.DENIED),
    (http_error(403), faults.DENIED),
    (client_error("InvalidAccessKeyId", 403), faults.UNKNOWN_USER),
    (caused(PermissionError("expired"), client_error("ExpiredToken", 400)), faults.UNKNOWN_USER),
    (boto.NoCredentialsError(), faults.UNKNOWN_USER),
    (http_error(401), faults.UNKNOWN_USER),
    (client_error("SlowDown", 503), faults.THROTTLED),
    (client_error("ServiceUnavailable", 503), faults.THROTTLED),
    (OSError(errno.EBUSY, "Please reduce your request rate."), faults.THROTTLED),
    (http_error(429), faults.THROTTLED),
    (boto.EndpointConnectionError(endpoint_url="http://x"), faults.UNREACHABLE),
    (boto.ConnectTimeoutError(endpoint_url="http://x"), faults.UNREACHABLE),
    (boto.ReadTimeoutError(endpoint_url="http://x"), faults.UNREACHABLE),
    (caused(FileNotFoundError("http://x"), ConnectionRefusedError()), faults.UNREACHABLE),
    (socket.gaierror(-2, "Name or service not known"), faults.UNREACHABLE),
    (client_error("InternalError", 500), faults.UNREACHABLE),
    (client_error("NoSuchBucket", 404), faults.MISSING),
    (FileNotFoundError("x"), faults.MISSING),
    (http_error(404), faults.MISSING),
    (OSError(errno.ENOSPC, "No space left on device"), faults.FULL),
    (caused(RuntimeError("not written"), OSError(errno.EDQUOT, "Quota")), faults.FULL),
    (OSError("Corrupt snappy compressed data."), None),
    (KeyError("x"), None),
]


@pytest.mark.parametrize(("error", "fault"), ERRORS, ids=lambda each: type(each).__name__)
def test_each_error_has_its_meaning(error: Exception, fault: faults.Fault | None) -> None:
    assert faults.fault_of(error) == fault


def test_a_signed_address_is_not_repeated() -> None:
    assert faults.told(http_error(403)) == "403 no"


REFUSALS = [
    (client_error("AccessDenied", 403), "access is denied", "ask its owner"),
    (boto.NoCredentialsError(), "does not know who asks", "AWS_ACCESS_KEY_ID"),
    (client_error("SlowDown", 503), "throttled", "wait some minutes"),
    (boto.EndpointConnectionError(endpoint_url="http://x"), "cannot be reached", "the network"),
]


@pytest.mark.parametrize(("error", "what", "remedy"), REFUSALS, ids=lambda each: str(each)[:20])
def test_a_source_and_an_output_say_what_refuses(
    s3_store: Store,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    what: str,
    remedy: str,
) -> None:
    s3_store.create("x.jsonl", b"{}\n")
    s3_store.create("manifest.json", b"{}\n")
    uri = f"{s3_store.uri}/x.jsonl"

    async def refuse(*_: Any, **__: Any) -> Any:
        raise s3fs.errors.translate_boto_error(error)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", refuse)
    said = f"{what}.*{remedy}"
    for path in (uri, s3_store.uri, f"{s3_store.uri}/*.jsonl"):
        s3_store.filesystem.invalidate_cache()
        with pytest.raises(ConfigError, match=rf"sources\.0\.path: cannot read .*{said}"):
            find("prepare.sources.0", Source(path=path))
    with pytest.raises(SourceError, match=said):
        list(read(Part(uri, "jsonl")))
    asks = [s3_store.exists, s3_store.read, s3_store.read_json, s3_store.read_table]
    for ask in (*asks, s3_store.names, lambda name: s3_store.fetch(name, Path("/nowhere"))):
        with pytest.raises(StorageError, match=said):
            ask("manifest.json")
    for write in (s3_store.create, s3_store.write):
        with pytest.raises(StorageError, match=f"refused to write.*{what}.*stays readable; "):
            write("new", b"x")


def test_what_is_not_there_is_no_refusal(s3_server: str, s3_store: Store) -> None:
    missing = f"s3://none-{uuid.uuid4().hex[:12]}/x.jsonl"
    for path in (missing, f"{s3_store.uri}/x.jsonl", f"{s3_store.uri}/*.jsonl"):
        with pytest.raises(ConfigError, match="nothing to read at"):
            find("prepare.sources.0", Source(path=path))
    assert not s3_store.exists("x")
    assert s3_store.names("x") == []
    with pytest.raises(FileMissing, match="nothing is there"):
        s3_store.read("x")


def test_a_refusal_in_the_middle_of_a_file_is_no_damage(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client leaves out the number by which the system's own refusals are known."""
    s3_store.create("x.jsonl", b'{"a": 1}\n' * 1000)

    def refuse(*_: Any) -> bytes:
        raise PermissionError("Forbidden")

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", refuse)
    with pytest.raises(SourceError, match="access is denied"):
        list(read(Part(f"{s3_store.uri}/x.jsonl", "jsonl")))
