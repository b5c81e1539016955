"""A configuration in; what each stage will do and about what it costs out, before a worker starts.

Counts come from reading the sources for a few seconds, times from a matrix product on this
machine. Both are rough, and say so; the checks are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cwpo_dist.config import Config, ConfigError
from cwpo_dist.graph import graph, prepare_node
from cwpo_dist.pairs.alone import AloneCounts
from cwpo_dist.pairs.estimate import Census, census
from cwpo_dist.pairs.rejects import Tally
from cwpo_dist.pairs.row_forms import ListCounts
from cwpo_dist.pairs.unread import Unread
from cwpo_dist.placement import Machine, total
from cwpo_dist.planning import fleet as fleet_costs
from cwpo_dist.planning.costs import Estimate, Rates
from cwpo_dist.planning.fleet import Fleet
from cwpo_dist.planning.label_faults import ask_faults
from cwpo_dist.planning.plan_faults import run_faults, until_of
from cwpo_dist.planning.plan_notes import ask_notes, graphs, run_notes
from cwpo_dist.planning.sampled import (
    SampleRead,
    ShownRow,
    read_sample,
    reading_notes,
    shown_rows,
    unrendered,
)
from cwpo_dist.planning.sampled_answers import answer_notes
from cwpo_dist.runs.checks import Checked, check, check_trials, models
from cwpo_dist.runs.cluster import named_cluster
from cwpo_dist.runs.cluster_share import fit_two, need, share
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node
from cwpo_dist.runs.trials import Trial, planned, section, starting, trials
from cwpo_dist.storage import Store


@dataclass(frozen=True)
class StagePlan:
    """One stage output.

    Attributes:
        stage: its name, with its role where a stage has several.
        arms: the arms that share it.
        done: it is committed already.
        work: what it does, in words.
        tokens: that go through a model; 0 where none does.
        seconds: about; None where this machine cannot tell.
        memory: bytes of one worker or actor: weights, gradients, optimizer, activations; about.
        at_least: a part of that memory is unknown.
        details: of that memory, a line each.
        device_hours: by kind of device, all held to the end; None: the time is not known.
        stored: bytes that it leaves behind; about.
        checkpoints: bytes beside it until it is done, 0 where it is; about.
    """

    stage: str
    arms: tuple[str, ...]
    done: bool
    work: str
    tokens: int = 0
    seconds: float | None = None
    memory: int | None = None
    at_least: bool = False
    details: tuple[str, ...] = ()
    device_hours: Mapping[str, float] | None = field(default_factory=dict)
    stored: int = 0
    checkpoints: int = 0


@dataclass(frozen=True)
class Plan:
    """What a run will do."""

    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...]
    rows: tuple[ShownRow, ...]
    fleet: Fleet

    @property
    def where(self) -> str:
        """What the times hold for."""
        if self.fleet.rates:
            return "annotation at the rate that was given"
        return "on this machine alone" if named_cluster() is None else "on one node of the cluster"

    def fleet_lines(self) -> Iterator[str]:
        """Device-hours of what is left to do, what they cost, and all that storage will hold."""
        left = [stage for stage in self.stages if not stage.done]
        hours = [(stage.stage, stage.device_hours) for stage in left if stage.device_hours != {}]
        yield from fleet_costs.hours_lines(hours, self.fleet)
        if any(stage.stored for stage in self.stages):
            stored = [(stage.stage, stage.stored) for stage in self.stages]
            most = max(stage.checkpoints for stage in self.stages)
            yield fleet_costs.storage_line(stored, most)


def plan(config: Config, show: int = 0, fleet: Fleet | None = None) -> Plan:
    """Checks a run and estimates what it costs; starts and writes nothing.

    Args:
        config: the run.
        show: how many sampled pairs to show as each model sees them.
        fleet: what is known of the devices.

    Raises:
        ConfigError: for everything that would stop the run later; one line a fault.
    """
    given = config
    config, found = _with_trials(given)
    fleet, until = fleet or Fleet(), until_of(config)
    runs = [trial.configured(config, section(config).seeds[0]) for trial in found] or [config]
    checked = check_trials(config, found) if found else check(config, until)
    named = {name: model for run in runs for name, model, _ in models(run, until)}
    censuses = _censuses(runs)
    sample = next(iter(censuses.values())).sample
    read = {
        name: read_sample(model, checked.encoders[name], sample) for name, model in named.items()
    }
    estimates = _estimates(runs, censuses, checked, read)
    rows = shown_rows(named, checked.encoders, sample[:show])
    planned_stages = _trial_stages if found else _stages
    _refuse_asking(given, censuses)
    notes = [
        *reading_notes(named, checked.encoders, read),
        *answer_notes(config, read, estimates[0].counted),
        *run_notes(config, estimates),
        *ask_notes(given, estimates[0].counted),
        *unrendered(checked.encoders, sample),
        *fleet_costs.fleet_notes(config, estimates[0].counted, fleet),
    ]
    return Plan(tuple(planned_stages(config, estimates, fleet)), tuple(notes), tuple(rows), fleet)


def _with_trials(config: Config) -> tuple[Config, list[Trial]]:
    """A comparison's trials; of one that asks for labels alone, where its first seed starts."""
    found = trials(config) if config.compare else []
    if config.compare and not found:
        config = starting(config, section(config).seeds[0])
    return config, found


def _estimates(
    runs: Sequence[Config],
    censuses: Mapping[str, Census],
    checked: Checked,
    read: Mapping[str, SampleRead],
) -> list[Estimate]:
    """What each run takes.

    Raises:
        ConfigError: for runs that would end before they are done.
    """
    lengths = {name: each.lengths for name, each in read.items()}
    estimates = [Estimate(run, censuses[_split(run)], checked, lengths) for run in runs]
    faults = dict.fromkeys(fault for each in estimates for fault in run_faults(each, read))
    if faults:
        raise ConfigError("\n".join(faults))
    return estimates


def _refuse_asking(given: Config, censuses: Mapping[str, Census]) -> None:
    """Stops a comparison that would ask for labels and find none.

    Raises:
        ConfigError: for what it would ask for.
    """
    counted = censuses.get(_split(given))
    if faults := [] if counted is None else list(ask_faults(given, counted)):
        raise ConfigError("\n".join(faults))


def _censuses(runs: Sequence[Config]) -> dict[str, Census]:
    """The sources counted, once for each way in which the runs split them."""
    ways = {_split(run): run for run in runs}
    return {way: _as_made(run, census(run.prepare, run.seed)) for way, run in ways.items()}


def _as_made(run: Config, counted: Census) -> Census:
    """With the run's own counts, where `prepare` is done."""
    context, node = Context(Store(run.output_dir)), prepare_node(run)
    if not context.done(node):
        return counted
    made = context.counts(node)
    return replace(
        counted,
        splits=made["splits"],
        prompts=made["prompts"],
        answers=made["answers"],
        labelled=made["labelled"],
        merged=made["merged_duplicates"],
        ties=made["ties"],
        rejects=sum(made["rejects"].values()),
        tally=Tally(Counter(made["rejects"])),
        unread=tuple(Unread(**made["not_read"].get(name, {})) for name, _ in counted.sources),
        **_lists_as_made(made),
        alone=AloneCounts(**made.get("alone", {})),
        answers_alone=made.get("answers_alone", {}),
        prompts_alone=made.get("prompts_alone", {}),
        exact=True,
        begun=True,
        rows_in=made["rows_in"],
        made=True,
    )


def _lists_as_made(made: Mapping[str, Any]) -> dict[str, Any]:
    """What became of lists of responses, which most sources do not have."""
    if "lists" not in made:
        return {}
    set_aside = Counter(made["lists"]["set_aside"])
    lists = ListCounts(**{**made["lists"], "set_aside": set_aside.total()})
    return {"lists": lists, "of_lists": Tally(set_aside)}


def _split(run: Config) -> str:
    """What tells one way of splitting from another; every seed counts as the first."""
    return run.prepare.model_dump_json()


def _stages(config: Config, estimates: Sequence[Estimate], fleet: Fleet) -> Iterator[StagePlan]:
    """Each stage output once, in order, with the arms that share it."""
    found: dict[str, tuple[str, Node, list[str]]] = {}
    for arm, nodes in graphs(config).items():
        for role, node in nodes.items():
            found.setdefault(node.path, (role, node, []))[2].extend([arm] if arm else [])
    (estimate,) = estimates
    rates = Rates(estimate.checked.machines)
    for role, node, arms in found.values():
        name = node.stage if role == node.stage else f"{node.stage} ({role})"
        yield _output(name, tuple(dict.fromkeys(arms)), node, estimate, rates, fleet)


def _output(
    name: str, arms: tuple[str, ...], node: Node, estimate: Estimate, rates: Rates, fleet: Fleet
) -> StagePlan:
    """What one stage output takes, with the cluster to itself."""
    work = estimate.work(node)
    cost, done = estimate.cost(work), Context(Store(estimate.config.output_dir)).done(node)
    measured = fleet_costs.seconds(work, estimate, fleet)
    seconds = 0.0 if done else measured or rates.seconds(cost)
    used = fleet_costs.devices(work, estimate)
    hours = {kind: (seconds or 0.0) * number / 3600 for kind, number in used.items()}
    return StagePlan(
        name,
        arms,
        done,
        cost.work,
        cost.tokens,
        seconds,
        cost.memory,
        cost.at_least,
        cost.details,
        None if used and seconds is None else hours,
        fleet_costs.stored(work, estimate),
        0 if done else fleet_costs.checkpoints(work, estimate),
    )


def _trial_stages(
    config: Config, estimates: Sequence[Estimate], fleet: Fleet
) -> Iterator[StagePlan]:
    """All outputs of a comparison, each once, added up by stage; every seed as the first.

    Where runs go side by side, an output takes of the time no more than its share of the cluster.
    """
    found: dict[str, tuple[str, Node, Config]] = {}
    for run, arm in planned(config):
        for role, node in graph(run, arm).items():
            name = f"{node.stage} (weak)" if role.startswith("teacher_") else node.stage
            found.setdefault(node.path, (name, node, run))
    by_split = {_split(each.config): each for each in estimates}
    machines = estimates[0].checked.machines
    shares = _shares([node for _, node, _ in found.values()], machines)
    rates, sums = Rates(machines), dict[str, list[StagePlan]]()
    foreseen: dict[str, set[str]] = {}
    for name, node, run in found.values():
        estimate = replace(by_split[_split(run)], config=run, foreseen=foreseen)
        each = _output(name, (), node, estimate, rates, fleet)
        if each.seconds is not None:
            each = replace(each, seconds=each.seconds * shares[node.path])
        sums.setdefault(name, []).append(each)
    for name, stages in sums.items():
        yield _summed(name, stages)


def _summed(name: str, stages: Sequence[StagePlan]) -> StagePlan:
    """Outputs of one kind as one line; the memory is that of the largest."""
    made, seconds = sum(stage.done for stage in stages), _seconds(stages)
    return StagePlan(
        name,
        ("all trials",),
        made == len(stages),
        f"{len(stages)} outputs" + (f", {made} of them done" if made else ""),
        sum(stage.tokens for stage in stages),
        seconds,
        max((stage.memory for stage in stages if stage.memory is not None), default=None),
        any(stage.at_least for stage in stages),
        device_hours=None if seconds is None else _hours(stages),
        stored=sum(stage.stored for stage in stages),
        checkpoints=max(stage.checkpoints for stage in stages),
    )


def _seconds(stages: Sequence[StagePlan]) -> float | None:
    """Of all, one after the other; None where that of one is not known."""
    times = [stage.seconds for stage in stages if stage.seconds is not None]
    return sum(times) if len(times) == len(stages) else None


def _hours(stages: Sequence[StagePlan]) -> Counter[str]:
    """Device-hours by kind, of all."""
    hours: Counter[str] = Counter()
    for stage in stages:
        hours.update(stage.device_hours or {})
    return hours


def _shares(outputs: Sequence[Node], machines: Sequence[Machine]) -> dict[str, float]:
    """Of the cluster, what each output takes while it is made; all of it where no two fit."""
    there = total(machines)
    if not fit_two(outputs, there):
        return dict.fromkeys((node.path for node in outputs), 1.0)
    return {node.path: share(need(node, there), there) for node in outputs}
