"""A cluster in; its devices checked one by one and together, a table and `check.json`, out."""

from __future__ import annotations

import json
import logging
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NoReturn, TypedDict

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from cwpo_dist.check.device import check_device
from cwpo_dist.check.finding import Finding, found
from cwpo_dist.check.ranks import Rank
from cwpo_dist.runs.cluster import connect
from cwpo_dist.scoring.devices import hide_other_gpus
from cwpo_dist.storage import Store
from cwpo_dist.waiting import tell_waiting

logger = logging.getLogger(__name__)

Nodes = Literal["one", "all"]
_WORDS = {True: "right", False: "WRONG", None: ""}
_FEWEST_RANKS = 2  # that have something to exchange
_START_S = 300.0  # for an actor to come up on a node that is busy


@dataclass(frozen=True)
class Place:
    """One device that is checked: a GPU, or a CPU of a node without GPUs.

    Attributes:
        node: Ray's id of its node.
        name: the node's address.
        gpu: whether it is a GPU.
    """

    node: str
    name: str
    gpu: bool


class RayNode(TypedDict):
    """What `ray.nodes` says of a node, as far as it is read here."""

    NodeID: str
    NodeManagerAddress: str
    Alive: bool
    Resources: Mapping[str, float]


class CheckError(RuntimeError):
    """There is nothing to check; the message says what lacks."""


def check(nodes: Nodes, to: str, *, quick: bool, storage: str | None) -> bool:
    """Checks devices, prints a table, writes `to`; whether all is right.

    Args:
        nodes: one device and a second rank beside it, or every device of every node.
        to: the JSON file, on this machine.
        quick: no figures of speed.
        storage: a folder or URI that all nodes see, for a checkpoint.

    Raises:
        CheckError: for a cluster without a free CPU.
        ClusterError: where no Ray answers.
    """
    connect()
    console = Console(highlight=False)
    places, group = chosen(ray.nodes(), nodes)
    kind = "GPU" if places[0].gpu else "CPU"
    logger.info("check: %d × %s, then %d ranks together", len(places), kind, len(group))
    tell_waiting(
        f"check: {len(places)} × {kind}",
        {"CPU": float(len(places))} | ({"GPU": float(len(places))} if places[0].gpu else {}),
        "check when they are free",
    )
    found_there: dict[str, list[Finding]] = {}
    for name, findings in _of_devices(places, quick):
        console.print(_table(name, findings))
        found_there[name] = findings
    together = _of_group(group, storage)
    n_nodes = len({place.node for place in group})
    name = f"{len(group)} ranks on {f'{n_nodes} nodes' if n_nodes > 1 else 'one node'}"
    console.print(_table(name, together))
    right = not any(each.right is False for each in chain(together, *found_there.values()))
    record = {
        "right": right,
        "devices": {name: list(map(asdict, findings)) for name, findings in found_there.items()},
        "together": {"ranks": len(group), "findings": list(map(asdict, together))},
    }
    Path(to).write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"{'all right' if right else 'something is WRONG'}; {to} has the figures")
    return right


def chosen(nodes: Sequence[RayNode], which: Nodes) -> tuple[list[Place], list[Place]]:
    """The devices to check one by one, and those of the ranks that work together.

    Where the cluster has GPUs, they are checked; else a CPU of each node.

    Raises:
        CheckError: for a cluster without a node that has a CPU.
    """
    alive = [node for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    gpus = list(chain.from_iterable(map(_gpus_of, alive)))
    places = gpus or [_place(node, gpu=False) for node in alive]
    if not places:
        raise CheckError("check: the cluster has no node with a CPU; start one (cluster/README.md)")
    group = places if gpus else _with_second_ranks(places, alive)
    if which == "one":
        return places[:1], group[:_FEWEST_RANKS]
    return places, group


def _with_second_ranks(cpus: list[Place], nodes: Sequence[RayNode]) -> list[Place]:
    """Processors for enough ranks to exchange something: a node lends a second one."""
    spare = [_place(node, gpu=False) for node in nodes if node["Resources"]["CPU"] >= 2]
    return cpus + spare[: max(0, _FEWEST_RANKS - len(cpus))]


def _gpus_of(node: RayNode) -> list[Place]:
    return [_place(node, gpu=True)] * int(node["Resources"].get("GPU", 0))


def _place(node: RayNode, *, gpu: bool) -> Place:
    return Place(node["NodeID"], node["NodeManagerAddress"], gpu)


def _of_devices(places: Sequence[Place], quick: bool) -> Iterator[tuple[str, list[Finding]]]:
    """All devices at once; each as it is asked for."""
    check_one = ray.remote(max_calls=1)(_checked)
    asked = [check_one.options(**_options(place)).remote(quick) for place in places]
    for number, (place, work) in enumerate(zip(places, asked, strict=True)):
        try:
            findings: list[Finding] = ray.get(work)
        except ray.exceptions.RayError as error:
            findings = [_lost(error)]
        yield f"{place.name}, {'GPU' if place.gpu else 'CPU'} {number}", findings


def _checked(quick: bool) -> list[Finding]:
    hide_other_gpus()
    disable_progress_bar()
    return check_device(quick=quick)


def _of_group(group: Sequence[Place], storage: str | None) -> list[Finding]:
    scratch = _scratch(group, storage)
    make: Any = ray.remote(Rank)  # whose methods Ray gives no types
    ranks = [make.options(**_options(place)).remote() for place in group]
    try:
        meet = ray.get(ranks[0].address.remote(), timeout=_START_S)
        where = None if scratch is None else scratch.uri
        asked = [
            rank.check.remote(number, len(ranks), meet, where) for number, rank in enumerate(ranks)
        ]
        return _agreed(ray.get(asked))
    except ray.exceptions.RayError as error:
        return [_lost(error)]
    finally:
        for rank in ranks:
            ray.kill(rank)
        if scratch is not None:
            scratch.remove()


def _scratch(group: Sequence[Place], storage: str | None) -> Store | None:
    """Where ranks may lay checkpoints: below what the user names; of one node on its disk.

    Which is ours only where the driver is on that node, too.
    """
    here = {ray.get_runtime_context().get_node_id()}
    if storage is None and {place.node for place in group} != here:
        return None
    return Store(f"{storage or tempfile.gettempdir()}/cwpo-check-{uuid.uuid4().hex[:8]}")


def _agreed(of_ranks: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Of each part what the first rank found, unless another one found a fault."""
    parts = zip(*of_ranks, strict=True)
    return [next((each for each in part if each.right is False), part[0]) for part in parts]


def _options(place: Place) -> dict[str, object]:
    there = NodeAffinitySchedulingStrategy(place.node, soft=False)
    return {"num_cpus": 1, "num_gpus": int(place.gpu), "scheduling_strategy": there}


def _lost(error: Exception) -> Finding:
    def fail() -> NoReturn:
        raise error

    return found("process", fail)


def _table(name: str, findings: Sequence[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, title=name, title_justify="left", title_style="bold")
    for column in ("part", "", "found"):
        table.add_column(column)
    table.add_column("s", justify="right")
    for each in findings:
        word, style = _WORDS[each.right], "bold red" if each.right is False else None
        table.add_row(each.part, word, escape(each.said), f"{each.seconds:.1f}", style=style)
    return table
