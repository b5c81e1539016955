"""A configuration with a `compare` section in; all its trials run, their figures and pages out.

What runs share, by its key, is made once; the same command resumes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from cwpo_dist.config import Config, ConfigError
from cwpo_dist.evaluation.paired import Items, over_seeds, paired
from cwpo_dist.evaluation.stopping import looks, lost
from cwpo_dist.execution.asked_labels import learning_curves
from cwpo_dist.execution.side_by_side import Job, make_all
from cwpo_dist.execution.trial_items import Runs, context_of, evaluated, items_of
from cwpo_dist.graph import graph
from cwpo_dist.manifest import Manifest
from cwpo_dist.report.comparison_page import FIGURES, PAGE, print_comparison, render_comparison
from cwpo_dist.report.left_out_table import added
from cwpo_dist.report.page import render
from cwpo_dist.results import collect as report
from cwpo_dist.results.items import BySeed, against, with_gold
from cwpo_dist.results.sample import sample
from cwpo_dist.runs.checks import check_trials
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.node_probes import versions
from cwpo_dist.runs.output_key import Node
from cwpo_dist.runs.trials import Trial, baseline, names, section, trials, tuned, tuning
from cwpo_dist.stages.weigh import chooser_of
from cwpo_dist.storage import Store

logger = logging.getLogger(__name__)

Rates = Mapping[Trial, float]
SINGLE = "single-runs-{}.html"


def compare(config: Config) -> str:
    """Runs every trial with every seed, and writes `comparison.json`, `.html` and single runs.

    Returns:
        The place of the page.

    Raises:
        ConfigError: for everything that would stop it later, before any worker starts.
    """
    chosen = trials(config)
    check_trials(config, chosen)
    rates, tuned_by = _rates(config, chosen)
    runs = {
        (trial, seed): trial.configured(config, seed, rates[trial])
        for trial in chosen
        for seed in section(config).seeds
    }
    runs = _made(config, runs)
    root = Store(config.output_dir)
    found = collect(config, runs, tuned_by) | {"single_runs": _single_runs(config, runs)}
    if section(config).ask:
        found["asked"] = learning_curves(config)
    root.write(FIGURES, json.dumps(found, indent=1).encode())  # trials keep their order
    root.write(PAGE, render_comparison(found).encode())
    print_comparison(found)
    return root.child(PAGE).uri


def _made(config: Config, runs: Runs) -> Runs:
    """Makes the runs and gives them back, without those that a trial was stopped before.

    What decides is read from what was made, so that the same command decides the same.
    """
    seeds, told = section(config).seeds, names([*dict.fromkeys(trial for trial, _ in runs)])
    made: Runs = {}
    losers: set[Trial] = set()
    for k in [*(looks(len(seeds)) if section(config).stop_losers else []), len(seeds)]:
        these = {of: run for of, run in runs.items() if of[0] not in losers and of[1] in seeds[:k]}
        make_all([job for (trial, _), run in these.items() for job in _jobs(run, trial.arm)])
        made |= these
        if k < len(seeds):
            losers |= _losers(config, these, told, k)
    return made


def _losers(config: Config, runs: Runs, told: Mapping[Trial, str], k: int) -> set[Trial]:
    """The trials that are surely below the baseline on held-out labels, after k seeds."""
    seeds, name = len(section(config).seeds), baseline(config, list(told))
    base = next(trial for trial in told if told[trial] == name)
    theirs, losers = items_of(runs, base)["accuracy"], set[Trial]()
    for trial in dict.fromkeys(trial for trial, _ in runs if trial != base):
        if lost(paired(items_of(runs, trial)["accuracy"], theirs), seeds):
            logger.info("compare: %s is stopped after %d seeds", told[trial], k)
            losers.add(trial)
    return losers


def _jobs(config: Config, arm: str) -> Iterator[Job]:
    for node in graph(config, arm).values():
        yield Job(context_of(config), node)


def _rates(config: Config, chosen: list[Trial]) -> tuple[Rates, dict[str, object]]:
    """Each trial's rate, and by name how good those tried were and on how many pairs.

    The rule is one for all: the highest share of held-out `validation` labels that the implicit
    reward agrees with, a tie as a half, with the first seed; of equal ones the smallest rate.
    """
    given = section(config).learning_rates or [config.align.learning_rate]
    if not tuned(config):
        return dict.fromkeys(chosen, given[0]), {"tried": {}, "validation_pairs": {}}
    tried, pairs = _tried(config, chosen, given)
    rates = {trial: max(found, key=lambda rate: found[rate]) for trial, found in tried.items()}
    told = names(chosen)
    for trial, rate in rates.items():
        logger.info("compare: %s takes learning rate %g", told[trial], rate)
    return rates, {
        "tried": {
            told[trial]: {f"{rate:g}": value for rate, value in found.items()}
            for trial, found in tried.items()
        },
        "validation_pairs": {told[trial]: count for trial, count in pairs.items()},
    }


def _tried(
    config: Config, chosen: list[Trial], given: list[float]
) -> tuple[dict[Trial, dict[float, float]], dict[Trial, int]]:
    """Each trial's agreement by learning rate, and on how many pairs it was measured."""
    runs = {(t, rate): tuning(config, t, rate) for t in chosen for rate in sorted(given)}
    make_all([job for (trial, _), run in runs.items() for job in _jobs(run, trial.arm)])
    tried: dict[Trial, dict[float, float]] = {trial: {} for trial in chosen}
    pairs: dict[Trial, int] = {}
    for (trial, rate), run in runs.items():
        accuracy, pairs[trial] = _agreement(run, trial.arm)
        if accuracy is None:
            raise ConfigError(
                "compare.learning_rates: no pair of split 'validation' has a human label and fits "
                "policy.max_length; give a source of labelled pairs with into: validation, or one "
                "rate"
            )
        tried[trial][rate] = accuracy
    return tried, pairs


def _agreement(config: Config, arm: str) -> tuple[float | None, int]:
    """The share of held-out labels that the policy agrees with, a tie as a half, and of how many.

    Of the decided pairs alone a rate that decides next to none would seem the best.
    """
    metrics = evaluated(config, arm)[0].read_json("metrics.json")
    found = metrics["policy"]["agreement"]
    right = found["correct"] + found["ties"] / 2
    return (right / found["n"] if found["n"] else None), found["n"]


def collect(config: Config, runs: Runs, tuned_by: Mapping[str, object]) -> dict[str, object]:
    """Every figure: means over seeds; differences of any two, paired by seed and item."""
    told = names([*dict.fromkeys(trial for trial, _ in runs)])
    items = {name: items_of(runs, trial) for trial, name in told.items()}
    seeds = section(config).seeds
    return {
        "run": {
            "output_dir": config.output_dir,
            "simulated_labels": config.simulated_labels,
            "versions": dict(versions()),
            "device": ", ".join(sorted(_devices(runs))),
            "made": datetime.now(UTC).date().isoformat(),
        },
        "seeds": seeds,
        "baseline": baseline(config, list(told)),
        **tuned_by,
        "trials": {
            name: {
                "stopped_after": len(of["accuracy"]) if _stopped(of, seeds) else None,
                "figures": {k: over_seeds([*v.values()]).as_dict() for k, v in of.items()},
                "test_pairs": sum(len(each.names) for each in of["accuracy"].values()),
                "against": _against(name, items, seeds),
                **_told(trial, [run for (other, _), run in runs.items() if other == trial]),
            }
            for (trial, name), of in zip(told.items(), items.values(), strict=True)
        },
        "config": config.model_dump(mode="json"),
    }


def _told(trial: Trial, single: list[Config]) -> dict[str, object]:
    """What a trial is, and its figures that are not held against another's."""
    powered = with_gold([evaluated(run, trial.arm)[0] for run in single])
    return {
        **({"with_gold": powered} if powered else {}),
        "arm": trial.arm,
        "loss": trial.loss,
        "labelled_fraction": trial.labelled,
        "flipped_labels": trial.flipped,
        "learning_rate": single[0].align.learning_rate,
        "keys": [evaluated(run, trial.arm)[1]["evaluate"].key for run in single],
        **_by_seed(trial, single),
    }


def _stopped(items: BySeed, seeds: Sequence[int]) -> bool:
    return len(items["accuracy"]) < len(seeds)


def _against(name: str, items: Mapping[str, BySeed], seeds: Sequence[int]) -> dict[str, object]:
    """The differences to each other trial; one that was stopped was looked at several times."""
    looked = {
        other: len(looks(len(seeds))) if _stopped(of, seeds) else 1 for other, of in items.items()
    }
    return {
        other: against(items[name], of, max(looked[name], looked[other]))
        for other, of in items.items()
        if other != name
    }


def _devices(runs: Runs) -> set[str]:
    """Where the policies were trained: known without a cluster, when nothing is left to do."""
    aligned = ((run, graph(run, trial.arm)["align"]) for (trial, _), run in runs.items())
    return {Manifest.read(context_of(run).place(node)).device for run, node in aligned}


def _single_runs(config: Config, runs: Runs) -> dict[str, list[str]]:
    """Writes reports of the first seed's runs, side by side where they have their pairs in common.

    Returns:
        The name of each, and the trials in it.
    """
    told, seed = names([*dict.fromkeys(trial for trial, _ in runs)]), section(config).seeds[0]
    by_pairs: dict[str, dict[Trial, Config]] = {}
    for (trial, of), run in runs.items():
        if of == seed:
            by_pairs.setdefault(graph(run, trial.arm)["prepare"].path, {})[trial] = run
    written = {}
    for number, beside in enumerate(by_pairs.values(), 1):
        context, of_these = context_of(config), next(iter(beside.values()))
        graphs = {told[trial]: graph(run, trial.arm) for trial, run in beside.items()}
        metrics = report.collect(context, of_these, graphs) | {
            "config": config.model_dump(mode="json")
        }
        name = SINGLE.format(number)
        context.root.write(name, render(metrics, sample(context, graphs), PAGE).encode())
        written[name] = list(graphs)
    return written


def _by_seed(trial: Trial, runs: list[Config]) -> dict[str, object]:
    """Figures that have no items: one number a seed, and their mean with Student's interval.

    And what figures of sampled answers leave out, of all seeds.
    """
    found: dict[str, list[float]] = {}
    every = []
    for run in runs:
        store, nodes = evaluated(run, trial.arm)
        context = context_of(run)
        metrics = store.read_json("metrics.json")
        every.append(metrics)
        numbers = _single(context, nodes, metrics)
        if run.arm(trial.arm).labels != "human":
            numbers |= _annotator(metrics["annotator"])
        for name, value in numbers.items():
            if value is not None:
                found.setdefault(name, []).append(value)
    by_seed = {name: _seeds(values) for name, values in found.items()}
    return {"by_seed": by_seed, "left_out": added(every)}


def _single(
    context: Context, nodes: Mapping[str, Node], metrics: dict[str, Any]
) -> dict[str, float | None]:
    manifests = {role: report.committed(context, node) for role, node in nodes.items()}
    answers, kl, aligned = metrics["answers"] or {}, metrics["kl"], manifests["align"].counts
    # Of an arm on human labels the annotator says only which pairs are compared: it costs nothing.
    chooser = chooser_of(nodes["weigh"])
    by_model = chooser.labels == "annotator" or chooser.judged is not None
    spared = () if by_model else ("fit", "annotate")
    own = {role: made for role, made in manifests.items() if nodes[role].stage not in spared}
    return {
        "mean_weight": context.counts(nodes["weigh"])["mean_weight"],
        "pairs": float(aligned["rows"]),
        "steps": float(aligned["steps"]),
        "sft_loss": manifests["sft"].counts["last"]["loss"] if "sft" in nodes else None,
        "device_hours": sum(report.device_hours(nodes, own).values()),
        "kl": kl["mean"] if kl else None,
        **{f"length_controlled_{k}": v["length_controlled"] for k, v in answers.items()},
    }


def _annotator(found: dict[str, Any] | None) -> dict[str, float | None]:
    """How good the labels of an arm are, and what their confidence is worth."""
    if found is None:
        return {}
    quarters = [quarter["accuracy"] for quarter in found["by_quarter"]]
    return {
        "labels_right": found["agreement"]["accuracy"],
        "least_confident": quarters[0] if quarters else None,
        "most_confident": quarters[-1] if quarters else None,
        "calibration_error": found["expected_calibration_error"],
        "brier": found["brier"]["value"],
        "nll": found["nll"]["value"],
        "mean_confidence": found["mean_confidence"],
        "margin_length": found["margin_length"]["pearson"],
    }


def _seeds(values: list[float]) -> dict[str, object]:
    items = [Items(["all"], [k], np.array([value])) for k, value in enumerate(values)]
    return over_seeds(items).as_dict()
