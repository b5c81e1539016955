"""A cluster that is not there is named within seconds, and so is a folder too long for Ray."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import ray

from cwpo_dist.placement import Machine, described
from cwpo_dist.runs import checks, cluster
from cwpo_dist.runs.checks import available
from cwpo_dist.runs.cluster import ClusterError, connect, refuse_unreachable


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cluster, "ANSWER_S", 0.5)


@pytest.fixture
def silent() -> Iterator[str]:
    """Something listens, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def web() -> Iterator[str]:
    """A web server, such as Ray's own dashboard."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def refusal(address: str | None) -> str:
    started = time.monotonic()
    with pytest.raises(ClusterError) as caught:
        refuse_unreachable(address)
    assert time.monotonic() - started < 5
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_listens_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    said = refusal(address)
    assert said.startswith(f"RAY_ADDRESS: no Ray head answers at {address} (")
    assert "Connection refused" in said
    assert "or unset RAY_ADDRESS" in said
    assert "Connection refused" in refusal(f"ray://{address}")


def test_what_listens_is_no_head(silent: str, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for address in (silent, web):
        assert "does not answer as Ray does" in refusal(address)


def test_addresses_of_other_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is a job server's address, which `cwpo submit` takes" in refusal("http://head:8265")
    assert "it is not HOST:PORT" in refusal("head")
    assert "no Ray head answers at head:x" in refusal("head:x")
    assert "no Ray head answers at no-such-host.invalid:6379" in refusal(
        "no-such-host.invalid:6379"
    )

    def nothing(*_: object) -> str:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(cluster, "head_of_this_machine", nothing)
    assert "at auto (Could not find any running Ray" in refusal("auto")


@pytest.mark.parametrize("ask", [connect, available])
def test_every_way_to_a_cluster_asks_first(
    ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", silent)
    with pytest.raises(ClusterError, match="no Ray head answers"):
        ask()


def test_a_head_that_is_there(ray_local: None) -> None:
    refuse_unreachable(ray.get_runtime_context().gcs_address)


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_too_long_for_sockets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = cluster.LONGEST - len(cluster.SESSION.format(pid=os.getpid()))
    monkeypatch.setenv(name, "/tmp/" + "x" * (longest - 5))
    refuse_unreachable(None)
    monkeypatch.setenv(name, "/tmp/" + "é" * (longest - 5))
    said = refusal(None)
    assert said.startswith(f"{name}: '/tmp/éé")
    assert f"Ray's sockets allow {longest}; set RAY_TMPDIR to a shorter folder" in said


def test_a_cluster_is_never_called_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert described([Machine(2.0, 0.0, here=True)]) == "this machine (2 CPUs, 0 GPUs)"
    assert described([Machine(2.0, 0.0)]) == "a cluster of one node (2 CPUs, 0 GPUs)"
    assert described([Machine(2.0, 1.0)] * 3) == "a cluster of 3 nodes (6 CPUs, 3 GPUs)"
    assert "instead of this machine" in checks.elsewhere()
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert checks.elsewhere() == ""


def test_a_node_that_comes_up_too_slowly_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises that as a plain Exception."""

    def slow(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", slow)
    with pytest.raises(ClusterError, match=r"does not start on this machine: .* timed out"):
        connect()
