"""A configuration in; arms whose weights need labels or annotators that it will not have, out."""

from __future__ import annotations

from collections.abc import Iterator

from cwpo_dist.config import Arm, Config, Split
from cwpo_dist.runs.arms import ArmRun, held_out_split, implicit_arms, judged_arms, weighting


def weighing_faults(config: Config) -> Iterator[str]:
    """Arms whose weights need labels or annotators that the run will not have."""
    fitted = config.fit.heads * len(config.fit.seeds or [config.seed])
    annotators = len(config.annotate.ready()) or fitted
    if "ensemble" in config.arms and not _are_several(config.arm("ensemble"), annotators):
        yield (
            "arms: 'ensemble' weighs by what several annotators differ by, but there is one; give "
            "fit.heads, fit.seeds, annotate.models, or weigh.from: both"
        )
    yield from _mixed_faults(config)
    yield from _drawn_faults(config)
    judged = judged_arms(config) if config.annotate.ready() else []
    if judged and "labelled" not in config.annotate.scored_splits():
        yield f"annotate.splits: lacks 'labelled', whose labels arm {judged[0]!r} judges; add it"
    yield from _unscored_faults(config)
    if calibrated := calibrated_arms(config):
        yield from _calibration_faults(config, calibrated)


def _drawn_faults(config: Config) -> Iterator[str]:
    """A weight that is no probability, where pairs are drawn by it."""
    drawn = [arm for arm in config.arms if config.arm(arm).sampling is not None]
    if drawn and config.weigh.weight_function == "madpo":
        yield (
            f"weigh.weight_function: 'madpo' goes beyond 1, but arm {drawn[0]!r} draws a pair with "
            "its weight as probability; take another function, or leave the arm out"
        )


def _mixed_faults(config: Config) -> Iterator[str]:
    """What does not go with arms that join people's labels with an annotator's."""
    mixed = [arm for arm in config.arms if config.arm(arm).with_human]
    weigh = config.weigh
    unfit = {
        "from": weigh.from_ != "annotator",
        "pairing": weigh.pairing != "given",
        "top_fraction": weigh.top_fraction is not None,
    }
    for name, given in unfit.items():
        if mixed and given:
            yield (
                f"weigh.{name}: arm {mixed[0]!r} has people's pairs beside the annotator's, which "
                "have no margin to choose by; leave the setting out, or the arm"
            )


def _calibration_faults(config: Config, fitted: list[str]) -> Iterator[str]:
    """A split on which no temperature can be fitted for the arms that ask for one."""
    what, split = f"weigh.temperature: fitted (arm {fitted[0]!r})", config.weigh.calibration_split
    ours = not config.annotate.ready() or set(fitted) & set(implicit_arms(config))
    if split == "labelled" and ours:
        yield (
            "weigh.calibration_split: 'labelled' holds what the annotator is trained on; give "
            "'validation'"
        )
    if split == "validation" and held_out_split(config) != "validation":
        yield (
            f"prepare.validation_fraction: 0, but {what} needs human labels there; raise it, or "
            "give a source with into: validation"
        )
    if split not in config.annotate.scored_splits():
        yield f"annotate.splits: lacks {split!r}, where {what} needs scores; add it"


def _unscored_faults(config: Config) -> Iterator[str]:
    """An arm that keeps no pair, as the annotators that it reads score none of those it has."""
    for name in config.arms:
        if len(lacking := _unscored(config, name)) == len(config.arm(name).splits):
            yield (
                f"annotate.splits: {config.annotate.scored_splits()} lacks {_listed(lacking)}, "
                f"where arm {name!r} has its pairs, of which it trains on those with scores; add "
                "it, or leave the setting out"
            )
            return


def weighing_notes(config: Config) -> Iterator[str]:
    """Arms that leave some of their pairs to no annotator."""
    for name in config.arms:
        if 0 < len(lacking := _unscored(config, name)) < len(config.arm(name).splits):
            yield (
                f"annotate.splits: lacks {_listed(lacking)}, so that arm {name!r} has the rest of "
                "its pairs alone"
            )


def _unscored(config: Config, name: str) -> list[Split]:
    """The splits of whose pairs an arm keeps none: it needs scores of them, and there are none.

    As `pairs.labels.decide` has it: people's labels of the labelled part need no score, but where
    annotators judge them, which have folds, or a check of their own. Of the data's own scores
    beside an annotator's any is enough.
    """
    arm = config.arm(name)
    reads = ArmRun.of(config, name).annotates or arm.annotator == "implicit"
    if not reads or arm.judged is not None or arm.with_own:
        return []
    told = {"labelled"} if arm.labels == "human" or arm.with_human else set()
    return [s for s in arm.splits if s not in {*told, *config.annotate.scored_splits()}]


def _listed(splits: list[Split]) -> str:
    return " and ".join(map(repr, splits))


def _are_several(arm: Arm, annotators: int) -> bool:
    """Whether an arm joins the opinions of more than one, the data's own scores among them."""
    return arm.labels != "own" and annotators + arm.with_own > 1


def calibrated_arms(config: Config) -> list[str]:
    """The arms whose margins are divided by a fitted temperature."""
    return [
        a for a in config.arms if weighting(config, config.arm(a)).chooser.temperature == "fitted"
    ]
