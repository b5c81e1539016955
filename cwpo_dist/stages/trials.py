"""A `compare` section in; its trials, each as a configuration of its own, out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cwpo_dist.config import CompareConfig, Config, ConfigError, Grid


@dataclass(frozen=True)
class Trial:
    """What is compared; each seed runs it once.

    Attributes:
        arm: its name.
        loss: `align.loss_type`.
        labelled: share of training prompts whose labels may be used.
        flipped: share of training labels turned round.
        beside: the arms of its grid, which share the pairs that their annotator can read.
    """

    arm: str
    loss: str
    labelled: float
    flipped: float
    beside: tuple[str, ...]

    @property
    def facts(self) -> tuple[str, str, str]:
        """What tells trials of one arm apart, in words."""
        return (
            self.loss,
            f"{100 * self.labelled:g} % labelled",
            f"{100 * self.flipped:g} % flipped",
        )

    def configured(self, config: Config, seed: int, learning_rate: float | None = None) -> Config:
        """The run of this trial with a seed; None: the rate of `align`."""
        align = config.align.model_copy(update={"loss_type": self.loss})
        if learning_rate is not None:
            align = align.model_copy(update={"learning_rate": learning_rate})
        prepare = config.prepare.model_copy(
            update={"labelled_fraction": self.labelled, "flipped_labels": self.flipped}
        )
        changes = {"seed": seed, "arms": list(self.beside), "prepare": prepare, "align": align}
        return config.model_copy(update=changes)


def section(config: Config) -> CompareConfig:
    """The `compare` section.

    Raises:
        ConfigError: where there is none, or its parts do not go together.
    """
    if config.compare is None:
        raise ConfigError(
            "compare: missing; give seeds and grids, see jobs/recipes/hh-compare.yaml"
        )
    compare, faults = config.compare, []
    if len(set(compare.seeds)) < len(compare.seeds):
        faults.append("compare.seeds: one stands twice; it would count as two")
    if config.fit.seeds is not None:
        faults.append("fit.seeds: an ensemble has the same seeds in every trial; leave it out")
    if len(compare.learning_rates) > 1:
        if config.evaluate.split != "test":
            faults.append(
                "evaluate.split: rates are chosen on validation, so figures must be of test"
            )
        if not config.prepare.validation_fraction and not any(
            source.into == "validation" for source in config.prepare.sources
        ):
            faults.append(
                "prepare.validation_fraction: 0, but compare.learning_rates are chosen there; "
                "raise it, or give one rate"
            )
    if faults:
        raise ConfigError("\n".join(faults))
    return compare


def trials(config: Config) -> list[Trial]:
    """All trials, in the order of the grids, each once."""
    grids = section(config).grids or [Grid(arms=config.arms)]
    found = list(dict.fromkeys(trial for grid in grids for trial in _of_grid(config, grid)))
    baseline, told = section(config).baseline, list(names(found).values())
    if baseline is not None and baseline not in told:
        known = "; ".join(told)
        raise ConfigError(f"compare.baseline: {baseline!r} is no trial; choose from {known}")
    if len(set(told)) < len(told):
        raise ConfigError("compare.grids: two grids have the same trial beside other arms")
    return found


def by_grid(config: Config, found: Sequence[Trial]) -> Iterator[Config]:
    """One run of each grid and loss, to be checked: others differ in seed, shares and rate."""
    seed = section(config).seeds[0]
    for trial in {(trial.beside, trial.loss): trial for trial in found}.values():
        yield trial.configured(config, seed)


def _of_grid(config: Config, grid: Grid) -> Iterator[Trial]:
    shares = grid.labelled_fractions or [config.prepare.labelled_fraction]
    flipped = grid.flipped_labels or [config.prepare.flipped_labels]
    losses = grid.losses or [config.align.loss_type]
    for loss, labelled, flip, arm in itertools.product(losses, shares, flipped, grid.arms):
        yield Trial(arm, loss, labelled, flip, tuple(grid.arms))


def names(found: Sequence[Trial]) -> Mapping[Trial, str]:
    """A short name of each: its arm, and those facts that are not the same for all."""
    varies = [len({trial.facts[k] for trial in found}) > 1 for k in range(3)]
    return {
        trial: ", ".join(
            [trial.arm, *(fact for fact, told in zip(trial.facts, varies, strict=True) if told)]
        )
        for trial in found
    }


def tuned(config: Config) -> bool:
    """Whether there are several rates to choose from."""
    return len(section(config).learning_rates) > 1


def tuning(config: Config, trial: Trial, learning_rate: float) -> Config:
    """The run that tells how good a rate is: on validation, with the first seed, no answers."""
    run = trial.configured(config, section(config).seeds[0], learning_rate)
    measured = {"split": "validation", "num_prompts": 0, "kl": False}
    return run.model_copy(update={"evaluate": config.evaluate.model_copy(update=measured)})


def planned(config: Config) -> Iterator[tuple[Config, str]]:
    """Every run and its arm; where rates are chosen, with the first of them, as costs are alike."""
    rates: Sequence[float | None] = section(config).learning_rates or [None]
    found = trials(config)
    if tuned(config):
        for trial, rate in itertools.product(found, section(config).learning_rates):
            yield tuning(config, trial, rate), trial.arm
    for trial, seed in itertools.product(found, section(config).seeds):
        yield trial.configured(config, seed, rates[0]), trial.arm
