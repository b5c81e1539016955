"""A run and what its splits hold in; settings that need people's labels, and find none, out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cwpo_dist.config import Config, Split
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.sources import MAP_LABELS
from cwpo_dist.runs.arms import held_out_split, teacher_config
from cwpo_dist.runs.checks import reached, trainings
from cwpo_dist.runs.trials import tuned
from cwpo_dist.runs.weighing_checks import calibrated_arms

# The parts that a source feeds which goes to one side; others are drawn by hash.
_FEEDS: dict[str, set[Split]] = {
    "train": {"labelled", "unlabelled"},
    "labelled": {"labelled"},
    "validation": {"validation"},
    "test": {"test"},
}


class Need(NamedTuple):
    """A setting that reads people's labels.

    Attributes:
        setting: its field and value.
        split: whose labels.
        use: what for.
        instead: what does without them.
    """

    setting: str
    split: Split
    use: str
    instead: str


def label_faults(config: Config, counted: Census, until: str | None) -> Iterator[str]:
    """What a run would find after hours of work: no label to follow, calibrate or choose by."""
    for need in _needs(config, until):
        if counted.lacks_labels(need.split):
            yield (
                f"{need.setting}: no pair of split {need.split!r} has a human label to {need.use}; "
                f"{_remedy(config, counted, need.split)}, or {need.instead}"
            )


def ask_faults(config: Config, counted: Census) -> Iterator[str]:
    """Labels that are hidden, and which `compare.ask` reveals, of which there are none."""
    asks = config.compare is not None and config.compare.ask
    if asks and not counted.ties and counted.lacks_labels("unlabelled"):
        share = config.prepare.labelled_fraction
        yield (
            "compare.ask: the sources have no label beside those of the labelled part, and so "
            "none that is hidden; give a smaller prepare.labelled_fraction "
            f"({share:g}), or more labelled pairs"
        )


def _needs(config: Config, until: str | None) -> Iterator[Need]:
    stages = reached(config, until)
    follow = "follow training by"
    for name, training, _ in trainings(config, until):
        if training.eval_steps is not None:
            told = f"{name}.eval_steps: {training.eval_steps}"
            yield Need(told, held_out_split(config), follow, f"set {name}.eval_steps to null")
    if "implicit" in stages and config.fit.eval_steps is not None:  # whose schedule it takes
        told = f"fit.eval_steps: {config.fit.eval_steps} (arm 'ws_dpo')"
        split = held_out_split(teacher_config(config))
        yield Need(told, split, follow, "set fit.eval_steps to null")
    if "weigh" in stages and (arms := calibrated_arms(config)):
        told = f"weigh.temperature: fitted (arm {arms[0]!r})"
        split = config.weigh.calibration_split
        yield Need(told, split, "fit it to", "set weigh.temperature to null, or leave the arm out")
    if config.compare is not None and tuned(config):
        told = f"compare.learning_rates: {config.compare.learning_rates}"
        yield Need(told, "validation", "choose one by", "give one rate")


def _remedy(config: Config, counted: Census, split: Split) -> str:
    """What gives a split labels: a larger share of it, only where that draws some."""
    if counted.lacks_labels(*counted.splits):
        return f"no pair has a label: {MAP_LABELS}"
    given = f"give a source of labelled pairs with into: {split}"
    raised = f"raise prepare.{split}_fraction, or {given}"
    return raised if _draws_labels(config, counted, split) else given


def _draws_labels(config: Config, counted: Census, split: Split) -> bool:
    """Whether labels are known to lie where a share decides, and not a source's `into`."""
    into = {source.into for source in config.prepare.sources}
    if split == "labelled":
        return bool(counted.labelled_pairs("unlabelled"))
    fed = {part for side in into if side is not None for part in _FEEDS[side]}
    drawn = [part for part in counted.splits if part not in fed]
    return None in into and bool(counted.labelled_pairs(*drawn))
