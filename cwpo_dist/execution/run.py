"""Drives a run: what is done stays, what was half done goes on; a manifest says what is whole.

A configuration in; every stage that is not done yet is done, arm by arm, in order. The only place
that commits the outputs of stages.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypedDict

import ray

from cwpo_dist.config import Config, ConfigError
from cwpo_dist.graph import STAGES, graph, nodes_until
from cwpo_dist.manifest import Manifest
from cwpo_dist.results import collect
from cwpo_dist.runs.cluster import connect
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.node_probes import versions
from cwpo_dist.runs.output_key import Node, ancestors, retry_manifest
from cwpo_dist.runs.stage import Retry
from cwpo_dist.scoring.device_time import held_hours
from cwpo_dist.storage import MANIFEST, Store
from cwpo_dist.training.lease import device_hours

logger = logging.getLogger(__name__)

STARTED = "started.json"  # written first: tells a half-finished output from none


class Started(TypedDict):
    """What a manifest says of an output before it is made, and `started.json` says alone."""

    stage: str
    key: str
    settings: Mapping[str, object]
    inputs: Mapping[str, str]


def run(config: Config, until: str | None = None, resume: bool = False) -> str:
    """Does all that is not done, for every arm, and writes the report.

    Args:
        config: the run.
        until: stop after this stage; None: go on to the report.
        resume: refuse to start a stage afresh when inputs or settings changed half-way.

    Returns:
        The URI of the report, or of the run directory when `until` stopped before it.
    """
    context = Context(Store(config.output_dir))
    context.root.sweep()
    graphs = {arm: nodes_until(config, arm, until) for arm in config.arms}
    if not all(context.done(node) for nodes in graphs.values() for node in nodes.values()):
        connect()
    for arm, nodes in graphs.items():
        for node in nodes.values():
            execute(context, node, resume)
        if until is None:
            logger.info("arm %s: all stages done", arm)
    if until is not None:
        return config.output_dir
    return collect.run(context, config, graphs)


Made = Callable[[Node], Mapping[str, object]]


def execute(context: Context, node: Node, resume: bool = False, by: Made | None = None) -> None:
    """Runs one stage unless its output is committed; its manifest is written last.

    Args:
        context: the run.
        node: the output.
        resume: refuse to start afresh.
        by: writes the output and returns its counts, where that is no stage of an arm.

    Raises:
        ConfigError: with `resume`, when the stage was half finished under another key.
    """
    if context.done(node):
        clear(context, node)
        logger.info("%s: done before", node.path)
        return
    if by is None:
        _tell_changed(context, node, resume)
    make(context, node, by)


def clear(context: Context, node: Node) -> None:
    """Removes what nobody reads beside a committed output: a driver killed there has left it."""
    if node.stage in STAGES:
        STAGES[node.stage].clear(context.place(node))


def make(context: Context, node: Node, by: Made | None = None) -> None:
    """Runs one stage and commits its output."""
    context.place(node).create_json(STARTED, _identity(node))
    logger.info("%s: starting", node.path)
    started = time.time()
    counts = by(node) if by is not None else STAGES[node.stage].make(context, node)
    manifest = _record(context, node, counts, started)
    context.place(node).sweep()  # who was killed on the way left it
    context.place(node).settle()  # what the manifest stands for is on the disk before it
    manifest.write(context.place(node))
    clear(context, node)
    logger.info("%s: done in %.0f s", node.path, manifest.seconds)


def retry_rejects(config: Config) -> str:
    """Annotates what is left to annotate, or scores again what was set aside for a failure.

    Returns:
        The URI of the run directory.
    """
    context = Context(Store(config.output_dir))
    graphs = [nodes_until(config, arm, "annotate") for arm in config.arms]
    connect()
    for node in {node.path: node for nodes in graphs for node in nodes.values()}.values():
        again = STAGES[node.stage].retry
        if again is not None:
            node = _retry(config, context, node, again)
        execute(context, node)
    return config.output_dir


def _retry(config: Config, context: Context, node: Node, again: Retry[Any]) -> Node:
    """Retries the rejects of one annotator, commits that, and says what was made before it."""
    readers = list(_made_from(config, context, node))
    started = time.time()
    counts = again(context, node)
    if counts is not None:
        node = replace(node, retries=node.retries + 1)
        record = _record(context, node, counts, started)
        context.place(node).settle()
        record.write(context.place(node), retry_manifest(node.retries))
        logger.info("%s: retry %d is done", node.path, node.retries)
        for made in readers:
            logger.warning(
                "%s was made of the scores before this retry: it stays, and the next `cwpo run` "
                "makes another beside it",
                made.path,
            )
    return node


def _made_from(config: Config, context: Context, node: Node) -> Iterable[Node]:
    """The committed outputs of this configuration that read a node."""
    arms = config.arms if config.policy is not None else []
    nodes = {n.path: n for arm in arms for n in graph(config, arm).values()}
    for made in nodes.values():
        if node.path in ancestors(made.inputs.values()) and context.done(made):
            yield made


def _record(context: Context, node: Node, counts: Mapping[str, object], started: float) -> Manifest:
    return Manifest(
        **_identity(node),
        counts=counts,
        seconds=round(time.time() - started, 3),
        versions=versions(),
        device=device(),
        device_hours=_device_hours(context.place(node)),
    )


def _device_hours(output: Store) -> float:
    """GPU-hours, or CPU-hours where no GPU was used, of all commands that worked on the output."""
    return float(f"{device_hours(output) + held_hours(output):.6g}")


def _identity(node: Node) -> Started:
    return {
        "stage": node.stage,
        "key": node.key,
        "settings": node.settings.identity(),
        "inputs": {name: f"{given.stage}/{given.content}" for name, given in node.inputs.items()},
    }


def _tell_changed(context: Context, node: Node, resume: bool) -> None:
    """Says so when a half-finished output of this role and stage was made from something else."""
    if context.place(node).exists(STARTED):
        logger.info("%s: resuming", node.path)
        return
    for key, started in _unfinished(context.root.child(node.stage)):
        if started.has_format(node.settings.format):
            changed = ", ".join(_changed(started, _identity(node)))
            why = f"{changed} changed since the unfinished {node.stage}/{key}"
            remedy = "restore what changed"
        else:
            why = f"another version of cwpo_dist began the unfinished {node.stage}/{key}"
            remedy = "finish it with that version"
        message = f"{node.stage}: {why}; this config makes {node.path}"
        if resume:
            raise ConfigError(
                f"{message}. --resume refuses to start from scratch: {remedy}, or run without "
                "--resume"
            )
        logger.warning("%s: starting from scratch", message)
    if others := context.others(node):
        logger.info(
            "%s: %s of another version of cwpo_dist: this one makes its own beside it",
            *(node.path, ", ".join(others)),
        )


def _unfinished(stage: Store) -> list[tuple[str, Manifest]]:
    """The outputs of a stage that were started and never committed."""
    names = set(stage.names())
    keys = {name.split("/")[0] for name in names if name.endswith(f"/{STARTED}")}
    half = [key for key in sorted(keys) if f"{key}/{MANIFEST}" not in names]
    return [(key, Manifest.read(stage, f"{key}/{STARTED}")) for key in half]


def _changed(old: Manifest, new: Started) -> list[str]:
    """Dotted names of the settings and inputs that differ."""
    parts = {
        "settings": (old.settings, new["settings"]),
        "inputs": (old.inputs, new["inputs"]),
    }
    return [
        f"{part}.{name}"
        for part, (before, now) in parts.items()
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def device() -> str:
    """The kinds of accelerator in the cluster, or the CPU's architecture."""
    kinds = {name for name in ray.cluster_resources() if name.startswith("accelerator_type:")}
    return ", ".join(sorted(kinds)) or f"cpu {platform.machine()}"
