"""A `compare` section in; its trials, each as a configuration of its own, out."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cwpo_dist.acquisition import STRATEGIES
from cwpo_dist.config import ARMS, CompareConfig, Config, ConfigError, FitConfig, Grid
from cwpo_dist.objectives import OBJECTIVES


@dataclass(frozen=True)
class Trial:
    """What is compared; each seed runs it once.

    Attributes:
        arm: its name.
        loss: `align.loss_type`.
        labelled: share of training prompts whose labels may be used.
        flipped: share of training labels turned round.
    """

    arm: str
    loss: str
    labelled: float
    flipped: float

    @property
    def facts(self) -> tuple[str, str, str]:
        """What tells trials of one arm apart, in words."""
        return (
            self.loss,
            f"{100 * self.labelled:g} % labelled",
            f"{100 * self.flipped:g} % flipped",
        )

    @property
    def work(self) -> tuple[str, str, float | None, float]:
        """The same for trials that do the same: the share is nothing to who knows all labels."""
        arm = ARMS[self.arm]
        knows_all = len(arm.splits) > 1 and not arm.with_human
        return self.arm, self.loss, None if knows_all else self.labelled, self.flipped

    def configured(self, config: Config, seed: int, learning_rate: float | None = None) -> Config:
        """The run of this trial with a seed; None: the rate of `align`."""
        align = config.align.model_copy(update={"loss_type": self.loss})
        if learning_rate is not None:
            align = align.model_copy(update={"learning_rate": learning_rate})
        prepare = config.prepare.model_copy(
            update={"labelled_fraction": self.labelled, "flipped_labels": self.flipped}
        )
        changes = {"seed": seed, "arms": _beside(config, self.arm), "prepare": prepare}
        changes |= {"align": align, "fit": _fit(config, seed)}
        return config.model_copy(update=changes)


def _beside(config: Config, arm: str) -> list[str]:
    """The arm, with one that reads the annotator where any trial does.

    It is then compared on the pairs that the annotator could read (see `needs_annotator`).
    """
    compared = {name for grid in _grids(config) for name in grid.arms}
    reads = any(config.arm(name).reads_annotator for name in compared)
    return [arm, "weak"] if reads and not config.arm(arm).reads_annotator else [arm]


def _fit(config: Config, seed: int) -> FitConfig:
    """An ensemble's annotators are others with each seed of the comparison."""
    given = config.fit.seeds
    if given is None:
        return config.fit
    shift = seed * (max(given) - min(given) + 1)
    return config.fit.model_copy(update={"seeds": [one + shift for one in given]})


def section(config: Config) -> CompareConfig:
    """The `compare` section.

    Raises:
        ConfigError: where there is none, or its parts do not go together.
    """
    if config.compare is None:
        raise ConfigError(
            "compare: missing; give seeds and grids, see jobs/recipes/hh-compare.yaml"
        )
    faults = [*_loss_faults(config.compare), *_rate_faults(config, config.compare)]
    faults += _ask_faults(config, config.compare)
    if config.compare.stop_losers and len(config.compare.seeds) < 4:
        faults.append("compare.stop_losers: nothing to save with fewer than 4 compare.seeds")
    if faults:
        raise ConfigError("\n".join(faults))
    return config.compare


def _loss_faults(compare: CompareConfig) -> Iterator[str]:
    for k, grid in enumerate(compare.grids):
        for loss in grid.losses or []:
            if loss not in OBJECTIVES:
                known = ", ".join(OBJECTIVES)
                yield f"compare.grids.{k}.losses: {loss!r} is unknown; choose from {known}"


def _rate_faults(config: Config, compare: CompareConfig) -> Iterator[str]:
    """Rates to choose from, and no split to choose by."""
    if len(compare.learning_rates) < 2:
        return
    if config.evaluate.split != "test":
        yield "evaluate.split: rates are chosen on validation, so figures must be of test"
    given = any(source.into == "validation" for source in config.prepare.sources)
    if not config.prepare.validation_fraction and not given:
        yield (
            "prepare.validation_fraction: 0, but compare.learning_rates are chosen there; "
            "raise it, or give one rate"
        )


def _ask_faults(config: Config, compare: CompareConfig) -> Iterator[str]:
    """Labels that nobody would learn from or be measured on, or too few annotators to choose by."""
    if not compare.ask:
        return
    if config.annotate.ready():
        yield f"compare.ask: {config.annotate.ready()[0][0]} is ready, and learns from no label"
    elif config.weak is None:
        yield "weak: compare.ask compares annotators, and there is no model to make one of; give it"
    yield from _ask_split_faults(config)
    yield from _ask_score_faults(config, compare)
    for name in ("baseline", "learning_rates", "stop_losers") if not compare.grids else ():
        if given := getattr(compare, name):
            yield f"compare.{name}: {given!r} is read with grids, and there are none; remove it"
    there = config.fit.heads * len(config.fit.seeds or [config.seed])
    for k, asks in enumerate(compare.ask):
        if (wanted := STRATEGIES[asks.strategy].annotators) > there:
            yield (
                f"compare.ask.{k}.strategy: {asks.strategy!r} needs {wanted} annotators, and there "
                f"is {there}; give fit.heads or several fit.seeds"
            )


def _ask_split_faults(config: Config) -> Iterator[str]:
    """No labels to begin with, none that are hidden, or none to measure on."""
    prepare, into = config.prepare, {source.into for source in config.prepare.sources}
    share, split = prepare.labelled_fraction, config.evaluate.split
    if share == 1 or (share == 0 and "labelled" not in into):
        yield (
            f"prepare.labelled_fraction: {share:g}, but compare.ask begins with a labelled part, "
            "and asks for labels that are hidden; give a share between 0 and 1"
        )
    if not getattr(prepare, f"{split}_fraction") and split not in into:
        yield (
            f"prepare.{split}_fraction: 0, but compare.ask measures annotators on that split; "
            f"raise it, or give a source into: {split}"
        )


def _ask_score_faults(config: Config, compare: CompareConfig) -> Iterator[str]:
    """Strategies that choose by scores which the pairs to choose from will not have."""
    by_scores = [
        asks.strategy
        for asks in compare.ask
        if (rule := STRATEGIES[asks.strategy]).annotators and rule.worth is not None
    ]
    if by_scores and "unlabelled" not in config.annotate.scored_splits():
        yield (
            f"annotate.splits: {config.annotate.splits} lacks 'unlabelled', of which compare.ask "
            f"chooses pairs by their scores ({by_scores[0]}); add it"
        )


def starting(config: Config, seed: int) -> Config:
    """The run of a seed up to `annotate`: of `compare.ask`, before anything is asked."""
    changes = {"seed": seed, "arms": ["weak"], "policy": None, "compare": None}
    return config.model_copy(update=changes | {"fit": _fit(config, seed)})


def trials(config: Config) -> list[Trial]:
    """All trials, in the order of the grids, each once."""
    found: dict[Hashable, Trial] = {}
    for grid in _grids(config):
        for trial in _of_grid(config, grid):
            found.setdefault(trial.work, trial)
    return list(found.values())


def baseline(config: Config, found: Sequence[Trial]) -> str:
    """The name of the trial that others are held against.

    Raises:
        ConfigError: where there is none of that name.
    """
    told, given = list(names(found).values()), section(config).baseline
    if given is None:
        return next(iter(told), "")
    for name in told:
        if name.split() == given.replace("%", " %").split():  # 30% is 30 %
            return name
    known = "; ".join(told)
    raise ConfigError(f"compare.baseline: {given!r} is unknown; choose from {known}")


def by_loss(config: Config, found: Sequence[Trial]) -> Iterator[Config]:
    """One run of each loss with its arms, to be checked: others differ in seed, share and rate."""
    for loss in dict.fromkeys(trial.loss for trial in found):
        alike = [trial for trial in found if trial.loss == loss]
        run = alike[0].configured(config, section(config).seeds[0])
        arms = dict.fromkeys(trial.arm for trial in alike)
        yield run.model_copy(update={"arms": list(arms)})


def _grids(config: Config) -> Sequence[Grid]:
    compare = section(config)
    return compare.grids or ([] if compare.ask else [Grid(arms=config.arms)])


def _of_grid(config: Config, grid: Grid) -> Iterator[Trial]:
    shares = grid.labelled_fractions or [config.prepare.labelled_fraction]
    flipped = grid.flipped_labels or [config.prepare.flipped_labels]
    losses = grid.losses or [config.align.loss_type]
    for loss, labelled, flip, arm in itertools.product(losses, shares, flipped, grid.arms):
        yield Trial(arm, loss, labelled, flip)


def names(found: Sequence[Trial]) -> Mapping[Trial, str]:
    """A short name of each: its arm, and what tells it from other trials of that arm."""
    told = {}
    for trial in found:
        alike = [other.facts for other in found if other.arm == trial.arm]
        differs = [len({facts[k] for facts in alike}) > 1 for k in range(len(trial.facts))]
        said = [fact for fact, differ in zip(trial.facts, differs, strict=True) if differ]
        told[trial] = ", ".join([trial.arm, *said])
    return told


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
