"""A Ray cluster of several nodes on this one machine, to try things out and to break them.

`python cluster/local/cluster.py up -n 2`, then `eval "$(python cluster/local/cluster.py env)"` and
`cwpo submit …`; `python cluster/local/cluster.py try CONFIG` does all of it, and the taking down.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import nodes
import typer
from network import ClusterError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

State = Annotated[
    Path, typer.Option("--state", help="The cluster's folder; another one is another cluster.")
]
DEFAULT_STATE = Path(tempfile.gettempdir()) / "cwpo-local"
NodeName = Annotated[str, typer.Argument(metavar="NODE", help="head, node1, node2, …")]
Workers = Annotated[int, typer.Option("-n", "--nodes", min=1, help="Nodes beside the head.")]
Cpus = Annotated[float, typer.Option("--cpus", help="What Ray may use of each node but the head.")]
Loopback = Annotated[
    bool, typer.Option("--loopback", help="No namespaces: loopback addresses, one network.")
]


@app.command()
def up(
    workers: Workers = 2, cpus: Cpus = 2, loopback: Loopback = False, state: State = DEFAULT_STATE
) -> None:
    """Start a head, which does no work, and nodes; ready for jobs at the end."""
    cluster = nodes.bring_up(state, workers, cpus, loopback)
    kind = "network namespaces" if cluster.namespaces else "loopback addresses"
    typer.echo(f"{workers} nodes and a head on {kind}; jobs: {cluster.jobs_url}")


@app.command()
def down(state: State = DEFAULT_STATE) -> None:
    """End all that `up` started, and nothing else."""
    nodes.take_down(nodes.Cluster.load(state))


@app.command()
def status(state: State = DEFAULT_STATE) -> None:
    """Say which nodes have processes."""
    cluster = nodes.Cluster.load(state)
    for node in cluster.nodes:
        running = len(nodes.members(cluster, node))
        typer.echo(f"{node.name}  {node.address}  {node.cpus:g} CPUs  {running} processes")


@app.command()
def env(state: State = DEFAULT_STATE) -> None:
    """Print what a shell needs to submit: `eval "$(… env)"`."""
    for name, value in nodes.client(nodes.Cluster.load(state)).items():
        typer.echo(f"export {name}={value}")


@app.command()
def cut(node: NodeName, state: State = DEFAULT_STATE) -> None:
    """Take a node's network away; its processes live on."""
    nodes.set_link(nodes.Cluster.load(state), node, "down")


@app.command()
def heal(node: NodeName, state: State = DEFAULT_STATE) -> None:
    """Give a node's network back. Ray ends on a node that it has missed: then `start` it."""
    nodes.set_link(nodes.Cluster.load(state), node, "up")


@app.command()
def kill(
    node: NodeName,
    raylet: Annotated[bool, typer.Option("--raylet", help="Its raylet alone.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """SIGKILL every process of a node, as a power cut does."""
    nodes.kill(nodes.Cluster.load(state), node, raylet)


@app.command()
def start(
    node: NodeName,
    python_path: Annotated[
        str | None,
        typer.Option(help="Goes before this node's PYTHONPATH: other versions of packages."),
    ] = None,
    state: State = DEFAULT_STATE,
) -> None:
    """Start Ray on a node where it has ended; with the head, all others start anew."""
    nodes.start(nodes.Cluster.load(state), node, python_path)


@app.command()
def mend(state: State = DEFAULT_STATE) -> None:
    """Join all nodes again, and start Ray wherever it has ended."""
    nodes.mend(nodes.Cluster.load(state))


@app.command("try")
def try_out(
    submitted: Annotated[
        list[str], typer.Argument(metavar="ARGUMENTS", help="Of `cwpo submit`: CONFIG, overrides.")
    ],
    workers: Workers = 2,
    cpus: Cpus = 2,
    loopback: Loopback = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Cluster up, `cwpo submit`, its log followed, cluster down."""
    up(workers, cpus, loopback, state)
    cluster = nodes.Cluster.load(state)
    command = [sys.executable, "-m", "cwpo_dist.cli", "submit", *submitted]
    try:
        done = subprocess.run(command, env=os.environ | nodes.client(cluster), check=False)
    finally:
        nodes.take_down(cluster)
    raise typer.Exit(done.returncode)


if __name__ == "__main__":
    try:
        app()
    except ClusterError as error:
        sys.exit(f"error: {error}")
