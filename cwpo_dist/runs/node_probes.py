"""A cluster's nodes and a run directory in; why they cannot work on one run together out.

A probe on each node writes a file into the run directory and reads the driver's, says which
versions it has, and opens a connection to the next node.
"""

from __future__ import annotations

import hashlib
import platform
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import cwpo_dist
from cwpo_dist.storage import StorageError, Store

PACKAGES = ("ray", "torch", "transformers", "deepspeed", "datasets", "pyarrow", "peft")
ANSWER_S = 120.0  # for all probes together: a node may have to unpack the job's files first
CONNECT_S = 5.0
SHARED = "give a URI (s3://, gs://) with its credentials, or a folder that all nodes share"


@dataclass(frozen=True)
class Report:
    """What a probe is.

    Attributes:
        versions: of the packages there.
        address: where it listens.
    """

    versions: Mapping[str, str]
    address: tuple[str, int]


def node_faults(output_dir: str) -> list[str]:
    """One line for each reason why the nodes of the cluster we are in cannot work together.

    A single node has nothing to disagree with, and is not asked.

    Args:
        output_dir: the run directory; what the probes write there is removed.
    """
    nodes = {node["NodeID"]: _named(node) for node in ray.nodes() if node["Alive"]}
    if len(nodes) < 2:
        return []
    store = Store(Store(output_dir).root) if Store(output_dir).is_local else Store(output_dir)
    place = store.child(f".probe-{uuid.uuid4().hex[:8]}")
    try:
        place.create("driver", b"")
    except StorageError as error:
        return [f"output_dir: the driver cannot write there: {error}"]
    try:
        probes = {node: _probe(node, place) for node in nodes}
        found, silent = _answers({node: probe.report.remote() for node, probe in probes.items()})
        probes = {node: probes[node] for node in found}
        faults = [_silent(nodes[node]) for node in silent]
        faults += _version_faults(nodes, found)
        faults += _storage_faults(output_dir, place, nodes, probes)
        faults += _port_faults(nodes, found, probes)
    finally:
        place.remove()
    return faults


def versions() -> dict[str, str]:
    """What outputs are made with, here."""
    found = {name: metadata.version(name) for name in PACKAGES}
    with suppress(metadata.PackageNotFoundError):  # an extra
        found["vllm"] = metadata.version("vllm")
    return {"cwpo_dist": cwpo_dist.__version__} | found | {"python": platform.python_version()}


class _Probe:
    """On one node."""

    def __init__(self, place: Store, name: str) -> None:
        self.place, self.name = place, name
        host = ray.util.get_node_ip_address()
        # Never accepts: the system answers for it, which is all that is asked.
        self.listener = socket.create_server((host, 0))

    def report(self) -> Report:
        return Report(_comparable(), self.listener.getsockname()[:2])

    def storage(self) -> str:
        """What went wrong in the run directory; empty: it is the driver's."""
        try:
            self.place.create(self.name, b"")
            seen = self.place.exists("driver")
        except OSError as error:
            return str(error)
        return "" if seen else "it does not see the driver's file there"

    def reach(self, address: tuple[str, int]) -> str:
        """What went wrong on the way to another node; empty: nothing."""
        try:
            socket.create_connection(address, CONNECT_S).close()
        except OSError as error:
            return str(error)
        return ""


def _named(node: Mapping[str, object]) -> str:
    return f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']})"


def _probe(node: str, place: Store) -> ActorHandle[Any]:
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    probe: Any = ray.remote(_Probe).options(num_cpus=0, scheduling_strategy=there)
    handle: ActorHandle[Any] = probe.remote(place, node)
    return handle


def _answers(asked: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What came in time, and who did not answer."""
    deadline, found = time.monotonic() + ANSWER_S, {}
    for node, answer in asked.items():
        try:
            found[node] = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
        except RayError:  # too late, or the node is gone
            continue
    return found, [node for node in asked if node not in found]


def _silent(name: str) -> str:
    return (
        f"{name}: Ray counts it as alive, but nothing ran there within {ANSWER_S:.0f} s. Open all "
        "TCP ports between the nodes (Ray, gloo and NCCL choose theirs), or take it out"
    )


def _storage_faults(
    output_dir: str, place: Store, nodes: Mapping[str, str], probes: Mapping[str, Any]
) -> Iterator[str]:
    found, silent = _answers({node: probe.storage.remote() for node, probe in probes.items()})
    seen = set(place.names())
    found |= dict.fromkeys(silent, f"no answer within {ANSWER_S:.0f} s")
    for node, wrong in found.items():
        wrong = wrong or ("" if node in seen else "the driver does not see its file there")
        if wrong:
            yield f"output_dir: {output_dir!r} fails on {nodes[node]}: {wrong}; {SHARED}"


def _version_faults(nodes: Mapping[str, str], found: Mapping[str, Report]) -> Iterator[str]:
    ours = _comparable()
    for node, report in found.items():
        differ = [
            f"{name} {report.versions.get(name)} (here {version})"
            for name, version in ours.items()
            if report.versions.get(name) != version
        ]
        if differ:
            yield (
                f"{nodes[node]} has {', '.join(differ)}; install the same everywhere "
                "(pip install -c constraints.txt), or use one image"
            )


def _comparable() -> dict[str, str]:
    """Versions without the kind of device (`+cu128`), and this package by its content."""
    plain = {name: version.partition("+")[0] for name, version in versions().items()}
    return plain | {"cwpo_dist": f"{plain['cwpo_dist']}/{_source()}"}


def _source() -> str:
    root = Path(cwpo_dist.__file__).parent
    content = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return content.hexdigest()[:8]


def _port_faults(
    nodes: Mapping[str, str], found: Mapping[str, Report], probes: Mapping[str, Any]
) -> Iterator[str]:
    """Each node to the next: all of them are dialled, and all dial."""
    ring: Sequence[str] = list(found)
    following = dict(zip(ring, [*ring[1:], *ring[:1]], strict=True))
    asked = {node: probes[node].reach.remote(found[following[node]].address) for node in ring}
    for node, wrong in _answers(asked)[0].items():
        if wrong:
            host, port = found[following[node]].address
            yield (
                f"{nodes[node]} cannot connect to {nodes[following[node]]}, {host}:{port}: "
                f"{wrong}. Open all TCP ports between the nodes: Ray, gloo and NCCL choose theirs"
            )
