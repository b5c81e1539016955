"""A cluster's name and its nodes' addresses in, a network namespace for each out (iproute2's `ip`).

The bridge that joins them stands in a further namespace, beyond this machine's own firewall; links
vanish with the namespaces that hold them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Network
from pathlib import Path

BRIDGE = "net"  # the namespace with the bridge


class ClusterError(RuntimeError):
    """What cannot be done; the message says why, and what to do."""


def allowed() -> bool:
    """True where this user may make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    probe = f"cwpo-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False)
    if made.returncode == 0:
        _run("ip", "netns", "del", probe)
    return made.returncode == 0


def free_addresses(number: int) -> list[str]:
    """So many addresses of the first of 10.77.0.0/24 … 10.77.255.0/24 that is not in use here."""
    here = _run("ip", "-4", "-o", "addr")
    for third in range(256):
        if f" 10.77.{third}." not in here:
            subnet = IPv4Network(f"10.77.{third}.0/24")
            return [str(subnet[10 + place]) for place in range(number)]
    raise ClusterError("no free network among 10.77.0.0/24 … 10.77.255.0/24")


def make(cluster: str, nodes: Mapping[str, str]) -> None:
    """Namespaces, the bridge, and a link to it from each node and from this machine.

    Args:
        cluster: its name; this machine's end of its link is named after it.
        nodes: name → address in one /24, whose .1 this machine takes.
    """
    net = _namespace(cluster, BRIDGE)
    _run("ip", "netns", "add", net)
    _run("ip", "-n", net, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", net, "link", "set", "bridge", "up")
    here, link = gateway(next(iter(nodes.values()))), cluster[:15]
    _run("ip", "link", "add", link, "type", "veth", "peer", "name", "here", "netns", net)
    _run("ip", "-n", net, "link", "set", "here", "master", "bridge", "up")
    _run("ip", "addr", "add", f"{here}/24", "dev", link)
    _run("ip", "link", "set", link, "up")
    for name, address in nodes.items():
        own = _namespace(cluster, name)
        _run("ip", "netns", "add", own)
        peer = ("type", "veth", "peer", "name", name, "netns", net)
        _run("ip", "-n", own, "link", "add", "eth0", *peer)
        _run("ip", "-n", own, "addr", "add", f"{address}/24", "dev", "eth0")
        _run("ip", "-n", own, "link", "set", "lo", "up")
        _run("ip", "-n", own, "link", "set", "eth0", "up")
        _run("ip", "-n", net, "link", "set", name, "master", "bridge", "up")


def gateway(address: str) -> str:
    """This machine's address beside a node's."""
    return f"{address.rpartition('.')[0]}.1"


def remove(cluster: str, nodes: Iterable[str]) -> None:
    """Takes down what `make` made, or as much of it as there is."""
    for name in (BRIDGE, *nodes):
        if _exists(cluster, name):
            _run("ip", "netns", "del", _namespace(cluster, name))


def set_link(cluster: str, node: str, state: str) -> None:
    """A node's link `down` or `up`."""
    _run("ip", "-n", _namespace(cluster, BRIDGE), "link", "set", node, state)


def inside(cluster: str, node: str, command: Sequence[str]) -> list[str]:
    """The command that runs a command on a node."""
    return ["ip", "netns", "exec", _namespace(cluster, node), *command]


def processes(cluster: str, node: str) -> list[int]:
    """Those that run in a node's namespace."""
    if not _exists(cluster, node):
        return []
    return [int(pid) for pid in _run("ip", "netns", "pids", _namespace(cluster, node)).split()]


def _namespace(cluster: str, node: str) -> str:
    return f"{cluster}-{node}"


def _exists(cluster: str, node: str) -> bool:
    return Path("/run/netns", _namespace(cluster, node)).exists()


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
