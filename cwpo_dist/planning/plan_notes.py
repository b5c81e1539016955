"""A configuration and what it is estimated to take in; what a reader should know of it out."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from cwpo_dist.config import Config
from cwpo_dist.graph import graph, nodes_until
from cwpo_dist.lm.batches import total_steps
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.sources import MAP_LABELS
from cwpo_dist.placement import Machine, gpus, gpus_taken
from cwpo_dist.planning.costs import Estimate
from cwpo_dist.planning.plan_faults import until_of
from cwpo_dist.runs.arms import needs_annotator
from cwpo_dist.runs.checks import pools, reached, trainings
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node
from cwpo_dist.runs.own_checks import own_notes
from cwpo_dist.runs.stage import Training
from cwpo_dist.runs.trials import section, tuned
from cwpo_dist.runs.weighing_checks import weighing_notes
from cwpo_dist.storage import Store


def graphs(config: Config) -> dict[str, dict[str, Node]]:
    """The outputs of each arm, as far as they can be planned."""
    if config.policy is not None:
        return {arm: graph(config, arm) for arm in config.arms}
    if not needs_annotator(config):
        return {arm: nodes_until(config, arm, "weigh") for arm in config.arms}
    until = until_of(config)  # of no arm yet, but of those that judge people's labels
    return {
        arm if config.arm(arm).judged else "": nodes_until(config, arm, until)
        for arm in config.arms
    }


def run_notes(config: Config, estimates: Sequence[Estimate]) -> Iterator[str]:
    """What a reader should know that is no fault."""
    estimate = estimates[0]
    yield from (f"prepare: {remark}" for remark in estimate.counted.remarks)
    if config.compare:
        yield _size_of_comparison(config, len(estimates))
    yield from _of_sources(estimate.counted)
    if config.policy is None:
        yield _end(config, estimate.counted)
    if until_of(config) in {None, "weigh"}:
        yield from own_notes(config, estimate.counted)
        runs = [each.config for each in estimates]
        yield from dict.fromkeys(note for run in runs for note in weighing_notes(run))
    yield from estimate.checked.notes
    if config.annotate.batch_invariant:
        yield _invariance(config)
    yield from _short_trainings(config, estimates)
    yield from _idle_gpus(config, estimate.checked.machines)
    yield from _other_versions(config)
    if config.simulated_labels:
        yield "labels are simulated: drawn from a rule, not given by people"


def _of_sources(counted: Census) -> Iterator[str]:
    """What was read of the sources, and that their pairs have nothing to weigh them by."""
    if not counted.exact:
        yield "counts are estimates: the sources are too large to read in a few seconds"
    yield from counted.sentences()
    if any(counted.splits.values()) and not any(counted.labelled.values()) and not counted.own:
        yield f"no pair has a label, or a number of its own to weigh it by; {MAP_LABELS}"


def _other_versions(config: Config) -> Iterator[str]:
    """Why stages are still to be done in a run directory that looks finished."""
    context = Context(Store(config.output_dir))
    nodes = (node for of_arm in graphs(config).values() for node in of_arm.values())
    left = {node.stage: node for node in nodes if not context.done(node)}
    if others := [path for node in left.values() for path in context.others(node)]:
        yield (
            f"output_dir has {len(others)} outputs of another version of cwpo_dist ({others[0]} "
            "first): `cwpo report` and `cwpo export` read them, and a run makes its own beside "
            "them; to go on with them, take that version"
        )


def _end(config: Config, counted: Census) -> str:
    """Up to where a run without a policy is planned."""
    pairs = any(counted.splits.values())
    follows = "; `weigh` can follow" if pairs else ", which scores answers that stand in no pair"
    if until_of(config) == "prepare":
        return "no model is given: planned up to `prepare`"
    if needs_annotator(config):
        return f"no policy is given: planned up to `annotate`{follows}"
    return "no policy is given: planned up to `weigh`"


def _invariance(config: Config) -> str:
    if "annotate" not in reached(config, until_of(config)):
        return "annotate.batch_invariant: on, but nothing here is scored by `annotate`"
    return (
        "annotate.batch_invariant: on; a score has the same bits whatever is scored beside it, on "
        "one kind of device, and on a CPU each actor computes with one thread"
    )


def _size_of_comparison(config: Config, number: int) -> str:
    seeds, rates = section(config).seeds, section(config).learning_rates
    chosen = f"; before, each at {len(rates)} learning rates with seed {seeds[0]}"
    spread = "; one seed says nothing of the spread between seeds" if len(seeds) == 1 else ""
    times = "; times count outputs side by side where two fit on the cluster"
    return f"{number} trials × {len(seeds)} seeds{chosen if tuned(config) else ''}{spread}{times}"


def ask_notes(config: Config, counted: Census) -> Iterator[str]:
    """What `compare.ask` takes beside what is counted, and what it cannot show."""
    if config.compare is None or not config.compare.ask:
        return
    trials = {(each.strategy, budget) for each in config.compare.ask for budget in each.budgets}
    seeds, hidden = len(config.compare.seeds), counted.labelled.get("unlabelled", 0)
    yield (
        f"compare.ask: {len(trials)} trials × {seeds} seeds = {len(trials) * seeds} annotators, "
        "each with a `fit` and a pass over held-out answers, and those that ask; of them all the "
        "lines and totals here count the first that asks"
    )
    by_lot = {budget for name, budget in trials if name == "random"}
    if alone := {budget for _, budget in trials} - by_lot:
        budgets = ", ".join(map(str, sorted(alone)))
        yield f"compare.ask: no `random` with budgets {budgets}, so no differences from it there"
    if (most := max(budget for _, budget in trials)) > hidden:
        yield (
            f"compare.ask: budget {most:,}, but about {hidden:,} labels are hidden: every strategy "
            "gets these"
        )


def _short_trainings(config: Config, estimates: Sequence[Estimate]) -> Iterator[str]:
    """Schedules that end before they have warmed up, in the arm with the fewest steps."""
    sections = {name: section for name, section, _ in trainings(config, until_of(config))}
    fewest: dict[str, tuple[int, str]] = {}
    for estimate in estimates:
        for stage, steps, arm in _steps(estimate, sections):
            fewest[stage] = min((steps, arm), fewest.get(stage, (steps, arm)))
    for name, (steps, arm) in fewest.items():
        warmup = sections[name].warmup_steps
        if warmup >= steps:
            yield (
                f"{name}.warmup_steps: {warmup} of about {steps} steps (arm {arm!r}), so the "
                "learning rate never reaches its peak"
            )


def _steps(estimate: Estimate, stages: Container[str]) -> Iterator[tuple[str, int, str]]:
    """Of each arm's trainings: the stage, its optimizer steps, and the arm."""
    for arm, nodes in graphs(estimate.config).items():
        for role, node in nodes.items():
            if node.stage not in stages or role.startswith("teacher_"):
                continue
            work = estimate.work(node)
            if isinstance(work, Training):
                yield node.stage, total_steps(work.training, estimate.trained_on(work)), arm


def _idle_gpus(config: Config, machines: Sequence[Machine]) -> Iterator[str]:
    """Scoring stages that leave GPUs of the cluster without work."""
    there = gpus(machines)
    for name, pool in pools(config, until_of(config)):
        taken = gpus_taken(pool, machines)
        if taken < there and (name != "evaluate" or config.evaluate.num_prompts):
            yield (
                f"{name}: its actors take {taken:g} of {there:g} GPUs; {name}.gpus_per_actor and "
                "num_actors say how many there may be"
            )
