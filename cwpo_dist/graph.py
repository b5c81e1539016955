"""A configuration and an arm in; the stage outputs they stand for, each under its content key.

Each stage says how its outputs come about from those before it; here they are put together, in the
order of `stage_order.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from typing import Any

from cwpo_dist.config import Config, ConfigError
from cwpo_dist.runs.arms import ArmRun, needs_annotator
from cwpo_dist.runs.output_key import Node, Nodes, ancestors
from cwpo_dist.runs.stage import Stage
from cwpo_dist.stage_order import LISTED


def _record(name: str) -> Stage[Any]:
    stage: Stage[Any] = import_module(f"cwpo_dist.stages.{name}").STAGE
    return stage


STAGES: dict[str, Stage[Any]] = {name: _record(name) for name in LISTED}


def graph(config: Config, arm: str) -> dict[str, Node]:
    """The nodes of one arm by role, each after those that it reads.

    Raises:
        ConfigError: when the arm needs a model that the config lacks.
    """
    nodes = _nodes(ArmRun.of(config, arm), STAGES)
    if config.policy is None:
        raise ConfigError(_no_policy(arm))
    return nodes


def nodes_until(config: Config, arm: str, until: str | None) -> dict[str, Node]:
    """The nodes that `until` needs, itself included; all of the arm's for None.

    `prepare`, `fit`, `annotate` and `weigh` are products of their own: they need no policy, and
    annotating needs no arm either.

    Args:
        config: the run.
        arm: its name.
        until: a stage, or the role of an output.

    Raises:
        ConfigError: when the arm has no such stage, or needs a model that the config lacks.
    """
    if until is None:
        return graph(config, arm)
    run, names = ArmRun.of(config, arm), list(STAGES)
    if until in STAGES:
        names = names[: names.index(until) + 1]
    if until in {"fit", "annotate"}:
        run = replace(run, annotates=True)
    made = _nodes(run, names)
    ends = _of_role(made, until) or [node for node in made.values() if node.stage == until]
    if not ends:
        raise ConfigError(_no_stage(config, arm, until))
    needed = ancestors(ends)
    return {role: node for role, node in made.items() if node.path in needed}


def _of_role(made: Nodes, name: str) -> list[Node]:
    """Of several annotators all, whose roles are annotate_0, annotate_1 and so on."""
    return [node for role, node in made.items() if role == name or role.startswith(f"{name}_")]


def prepare_node(config: Config) -> Node:
    """The sources, as they are now: the same for all arms."""
    return nodes_until(config, config.arms[0], "prepare")["prepare"]


def _nodes(run: ArmRun, names: Iterable[str]) -> dict[str, Node]:
    """What these stages make of a run.

    A stage may have several outputs, some of them made of later stages': all are asked again, in
    their order, until that brings nothing new.
    """
    stages = [STAGES[name] for name in names]
    if run.teacher is not None and STAGES["implicit"] in stages:
        run = replace(run, taught=_nodes(run.teacher, STAGES))
    nodes: dict[str, Node] = {}
    known = -1
    while len(nodes) > known:
        known = len(nodes)
        for stage in stages:
            made = stage.nodes(run, nodes)
            nodes |= {role: node for role, node in made.items() if role not in nodes}
    return nodes


def _no_stage(config: Config, arm: str, stage: str) -> str:
    if stage == "fit" and config.annotate.ready():
        field = config.annotate.ready()[0][0]
        return f"{field}: given, so there is nothing to fit; remove it to train `weak`"
    if config.policy is None:
        return _no_policy(arm)
    why = "" if needs_annotator(config) else " (no arm reads the annotator's labels)"
    return f"{stage}: arm {arm!r} has no such stage{why}"


def _no_policy(arm: str) -> str:
    return f"policy: arm {arm!r} aligns a policy; give policy.model_name_or_path"
