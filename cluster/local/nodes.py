"""A folder and a number of nodes in, a Ray cluster on this one machine out; and its end.

Each node has an address of its own, and a disk of its own at the same path (Ray's files, TMPDIR);
every other folder is shared, as on NFS. Without the right to make namespaces, nodes are told apart
by loopback addresses alone, and share the disk too. Nothing is ended that was not started here:
`state.json` says what was, also after a crash.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import network
from network import ClusterError

START_S = 240.0
END_S = 5.0
HEAD = "head"
GCS_PORT, JOBS_PORT = 6379, 8265
# What a node's processes get of this shell: no credentials, those travel with a job.
INHERITED = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "HF_HOME", "HF_HUB_OFFLINE")
# A node that is silent so long counts as lost: sooner than Ray's own minute, as this is a try-out.
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}

# Run by `sh -c` on a node, with its name, its disk, where that is seen, a hosts file, a command.
AS_A_MACHINE = (
    'echo "$0" > /proc/sys/kernel/hostname && mount --bind "$1" "$2" '
    '&& mount --bind "$3" /etc/hosts && shift 3 && exec "$@"'
)


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        name: `head`, `node1`, …
        address: its own.
        cpus: what Ray may use; 0 on the head, which does no work.
        leader: the process of `ray start --block`; 0 before.
        python_path: put before PYTHONPATH on this node.
    """

    name: str
    address: str
    cpus: float
    leader: int = 0
    python_path: str = ""


@dataclass(frozen=True)
class Cluster:
    """A cluster's state on disk.

    Attributes:
        folder: where its state, token, logs and the nodes' disks lie.
        namespaces: False where nodes share this machine's network.
        gcs_port, jobs_port: of the head.
        nodes: the head first.
    """

    folder: Path
    namespaces: bool
    gcs_port: int
    jobs_port: int
    nodes: tuple[Node, ...]

    @property
    def head(self) -> Node:
        """The node that the others join."""
        return self.nodes[0]

    @property
    def jobs_url(self) -> str:
        """The job server."""
        return f"http://{self.head.address}:{self.jobs_port}"

    @property
    def token(self) -> Path:
        """Ray's token, asked of everyone."""
        return self.folder / "token"

    @property
    def disk(self) -> Path:
        """Where every node sees a folder of its own."""
        return self.folder / "disk"

    def node(self, name: str) -> Node:
        """The node of this name."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise ClusterError(f"no node {name!r}; there are {', '.join(n.name for n in self.nodes)}")

    def save(self) -> None:
        """Writes the state, in one step."""
        state = {**asdict(self), "folder": str(self.folder)}
        partial = self.folder / "state.json.partial"
        partial.write_text(json.dumps(state, indent=1))
        partial.replace(self.folder / "state.json")

    @classmethod
    def load(cls, folder: Path) -> Cluster:
        """The state that `save` wrote."""
        path = folder / "state.json"
        if not path.exists():
            raise ClusterError(f"no cluster in {folder}; start one with `up`")
        state = json.loads(path.read_text())
        nodes = tuple(Node(**node) for node in state["nodes"])
        return cls(**{**state, "folder": folder, "nodes": nodes})


def bring_up(folder: Path, workers: int, cpus: float, loopback: bool) -> Cluster:
    """A head that does no work and `workers` nodes that do, all of them ready for jobs."""
    if (folder / "state.json").exists():
        raise ClusterError(f"there is a cluster in {folder}; see `status`, end it with `down`")
    if len(str(folder)) > 30:
        raise ClusterError(f"--state {folder}: over 30 characters, too long for Ray's sockets")
    cluster = _planned(folder, workers, cpus, not loopback and network.allowed())
    folder.mkdir(parents=True, mode=0o700)
    cluster.disk.mkdir()
    with os.fdopen(os.open(cluster.token, os.O_CREAT | os.O_WRONLY, 0o600), "w") as token:
        token.write(secrets.token_hex(32))
    cluster.save()  # before anything is started: `down` finds it also after a crash
    try:
        if cluster.namespaces:
            addresses = {node.name: node.address for node in cluster.nodes}
            network.make(cluster.folder.name, addresses)
        return _start_all(cluster)
    except BaseException:  # also Ctrl-C: what was brought up is taken down, then raised again
        take_down(cluster, keep_logs=True)
        raise


def take_down(cluster: Cluster, keep_logs: bool = False) -> None:
    """Ends what `bring_up` started; also what a crash left of it."""
    _end(cluster, *cluster.nodes)
    if cluster.namespaces:
        network.remove(cluster.folder.name, [node.name for node in cluster.nodes])
    if keep_logs:
        (cluster.folder / "state.json").unlink()
        shutil.rmtree(cluster.disk, ignore_errors=True)
        cluster.folder.rename(cluster.folder.with_name(f"{cluster.folder.name}-{os.getpid()}"))
    else:
        shutil.rmtree(cluster.folder, ignore_errors=True)


def client(cluster: Cluster) -> dict[str, str]:
    """The environment of who submits."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token),
        "RAY_API_SERVER_ADDRESS": cluster.jobs_url,
    }


def start(cluster: Cluster, name: str, python_path: str | None = None) -> Cluster:
    """Starts Ray on a node that has ended; starting the head starts the others anew."""
    node = cluster.node(name)
    if members(cluster, node):
        raise ClusterError(f"{name} runs; `kill {name}` ends it")
    if name == HEAD:
        _end(cluster, *cluster.nodes)
        return _start_all(cluster)
    path = node.python_path if python_path is None else python_path
    cluster = _started(cluster, replace(node, python_path=path))
    _await_ready(cluster, cluster.node(name))
    return cluster


def mend(cluster: Cluster) -> None:
    """Joins all nodes again, and starts Ray where it has ended or lost its raylet."""
    if cluster.namespaces:
        for node in cluster.nodes:
            set_link(cluster, node.name, "up")
    for node in cluster.nodes:
        if not any(_command(pid).endswith("/raylet") for pid in members(cluster, node)):
            _end(cluster, node)
            cluster = start(cluster, node.name)


def set_link(cluster: Cluster, name: str, state: str) -> None:
    """Cuts a node off from all others, or joins it again; its processes live on."""
    if not cluster.namespaces:
        raise ClusterError("nodes on loopback addresses cannot be cut off; kill them instead")
    network.set_link(cluster.folder.name, cluster.node(name).name, state)


def kill(cluster: Cluster, name: str, raylet_only: bool) -> None:
    """SIGKILLs all of a node's processes, as a power cut does, or its raylet alone."""
    node = cluster.node(name)
    pids = members(cluster, node)
    if raylet_only:
        pids = [pid for pid in pids if _command(pid).endswith("/raylet")]
        if not pids:
            raise ClusterError(f"{name} has no raylet")
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while any(pid in members(cluster, node) for pid in pids):
        time.sleep(0.05)


def _planned(folder: Path, workers: int, cpus: float, namespaces: bool) -> Cluster:
    names = [HEAD, *(f"node{number}" for number in range(1, workers + 1))]
    if namespaces:
        addresses = network.free_addresses(len(names))
        ports = GCS_PORT, JOBS_PORT
    else:
        addresses = [f"127.0.0.{2 + number}" for number in range(len(names))]
        ports = _free_port(), _free_port()
    nodes = [
        Node(name, address, 0 if name == HEAD else cpus)
        for name, address in zip(names, addresses, strict=True)
    ]
    return Cluster(folder, namespaces, *ports, tuple(nodes))


def _start_all(cluster: Cluster) -> Cluster:
    cluster = _started(cluster, cluster.head)
    _await_ready(cluster, cluster.head)
    for node in cluster.nodes[1:]:
        cluster = _started(cluster, node)
    for node in cluster.nodes[1:]:
        _await_ready(cluster, node)
    _wait(lambda: _answers(cluster), "the job server does not answer")
    return cluster


def _started(cluster: Cluster, node: Node) -> Cluster:
    """Starts Ray on a node; the cluster with its leader."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block"]
    command += [f"--node-ip-address={node.address}", f"--num-cpus={node.cpus:g}", "--num-gpus=0"]
    command += [f"--labels=cwpo-node={node.name}", "--object-store-memory=150000000"]
    if node.name == HEAD:
        command += ["--head", f"--port={cluster.gcs_port}", f"--temp-dir={cluster.disk}"]
        command += [f"--dashboard-host={node.address}", f"--dashboard-port={cluster.jobs_port}"]
        command += ["--disable-usage-stats"]
    else:
        command += [f"--address={cluster.head.address}:{cluster.gcs_port}"]
    if cluster.namespaces:
        disk = cluster.folder / node.name
        disk.mkdir(exist_ok=True)
        arguments = [node.name, str(disk), str(cluster.disk), str(_hosts(cluster)), *command]
        machine = ["unshare", "--uts", "sh", "-c", AS_A_MACHINE, *arguments]
        command = network.inside(cluster.folder.name, node.name, machine)
    else:
        command += [f"--dashboard-agent-listen-port={_free_port()}"]
    with _log(cluster, node).open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(cluster, node),
            start_new_session=True,  # it outlives us, and its session names what it started
        )
    nodes = [replace(node, leader=process.pid) if n.name == node.name else n for n in cluster.nodes]
    cluster = replace(cluster, nodes=tuple(nodes))
    cluster.save()
    return cluster


def _hosts(cluster: Cluster) -> Path:
    """Every node's name and address, for all of them."""
    path = cluster.folder / "hosts"
    lines = ["127.0.0.1 localhost", *(f"{node.address} {node.name}" for node in cluster.nodes)]
    path.write_text("\n".join(lines) + "\n")
    return path


def _environment(cluster: Cluster, node: Node) -> dict[str, str]:
    kept = {name: os.environ[name] for name in INHERITED if name in os.environ}
    path = [part for part in (node.python_path, kept.get("PYTHONPATH", "")) if part]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster.token)}
    # More threads than cores cost far more than they bring, and nodes share the cores here.
    own = {"OMP_NUM_THREADS": "1", "TMPDIR": str(cluster.disk), "PYTHONPATH": ":".join(path)}
    own["PATH"] = f"{Path(sys.executable).parent}:{kept.get('PATH', '')}"  # a job's `python`
    own["RAY_worker_niceness"] = "0"  # not behind all else that this machine does
    # Ray would look for its head among this machine's processes, and find any other cluster's too.
    own["RAY_ADDRESS"] = f"{cluster.head.address}:{cluster.gcs_port}"
    interface = {"GLOO_SOCKET_IFNAME": "eth0"} if cluster.namespaces else {}
    return {**kept, **HEALTH, **token, **own, **interface}


def _end(cluster: Cluster, *ending: Node) -> None:
    """Asks the nodes' processes to end, all at once, then kills what is left."""

    def left() -> list[int]:
        return [pid for node in ending for pid in members(cluster, node)]

    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + END_S
        for pid in left():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        while (remaining := left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not remaining:
            return
    raise ClusterError(f"processes {remaining} do not end; look at them, then `down` again")


def members(cluster: Cluster, node: Node) -> list[int]:
    """The living processes of a node: all in its namespace, or all in its leader's session."""
    if cluster.namespaces:
        found = network.processes(cluster.folder.name, node.name)
        return [pid for pid in found if _stat(pid)[0] not in "ZX"]
    if node.leader == 0:
        return []
    members: set[int] = set()
    processes = list(_processes())
    while True:  # a job's driver has a session of its own, but a parent among ours
        more = {
            pid
            for pid, parent, session in processes
            if session == node.leader or parent in members or session in members
        }
        if more <= members:
            return sorted(members)
        members |= more


def _processes() -> Iterator[tuple[int, int, int]]:
    """(process, parent, session) of all that live."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            state, parent, _, session = _stat(int(entry.name))
            if state not in "ZX":
                yield int(entry.name), int(parent), int(session)


def _stat(pid: int) -> list[str]:
    """State, parent, group and session of a process; state X where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ["X", "0", "0", "0"]
    return text.rpartition(")")[2].split()[:4]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return ""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _log(cluster: Cluster, node: Node) -> Path:
    return cluster.folder / f"{node.name}.log"


def _await_ready(cluster: Cluster, node: Node) -> None:
    log = _log(cluster, node)

    def ready() -> bool:
        if "Ray runtime started" in log.read_text():
            return True
        if _stat(node.leader)[0] in "ZX":
            raise ClusterError(f"{node.name} ended at once:\n{log.read_text()[-2000:]}")
        return False

    _wait(ready, f"{node.name} is not ready, see {log}")


def _answers(cluster: Cluster) -> bool:
    with suppress(OSError), socket.create_connection((cluster.head.address, cluster.jobs_port), 1):
        return True
    return False


def _wait(holds: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + START_S
    while not holds():
        if time.monotonic() > deadline:
            raise ClusterError(f"{otherwise} (after {START_S:.0f} s)")
        time.sleep(0.2)
