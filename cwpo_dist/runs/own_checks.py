"""A configuration and what its sources hold in; what keeps arms from the data's own numbers out."""

from __future__ import annotations

from collections.abc import Iterator

from cwpo_dist.config import TRAINING, Config
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.numbers import Own, kinds
from cwpo_dist.pairs.sources import Plan
from cwpo_dist.runs.arms import Weighting, weighting
from cwpo_dist.runs.own_numbers import OwnNumbersError, chosen, void_fault, void_of


def own_arms(config: Config) -> list[str]:
    """The arms that weigh by the data's own numbers, alone or beside an annotator."""
    arms = {name: config.arm(name) for name in config.arms}
    return [name for name, arm in arms.items() if arm.labels == "own" or arm.with_own]


def own_faults(config: Config, planned: Plan) -> Iterator[str]:
    """What can be told from the sources' columns."""
    arms = own_arms(config)
    if not arms:
        yield from _idle_settings(config)
        return
    there = {own for piece in planned.pieces for own in kinds(piece.layout.columns)}
    if not there:
        found = ", ".join(dict.fromkeys(name for names in planned.names for name in names))
        yield (
            f"arms: {arms[0]!r} weighs by the data's own numbers, but no source has weight, "
            "confidence, or two scores (score_a and score_b; score_chosen and score_rejected "
            f"beside chosen and rejected); they have {found}. Say which they are: "
            "prepare.sources.N.columns: {weight: …}"
        )
        return
    try:
        own = chosen(config.weigh.column, there)
    except OwnNumbersError as error:
        yield str(error)
        return
    for arm in arms:
        yield from _misfits(config, arm, own)


def own_counts_faults(config: Config, counted: Census) -> Iterator[str]:
    """What only their values tell."""
    for name in own_arms(config):
        own, arm = chosen(config.weigh.column, counted.own), config.arm(name)
        if not counted.own_pairs(own, *TRAINING):
            label = "" if own == "scores" else ", with a label that it is about"
            yield f"arms: no training pair has {own} of its own for arm {name!r}{label}"
        if arm.sampling is not None and own == "weight" and counted.most_weight > 1:
            yield (
                f"arms: {name!r} draws pairs with a weight as probability, but the data's own go "
                f"up to {counted.most_weight:g}; divide them, or take arm own"
            )
        most = config.prepare.max_reject_fraction
        if counted.exact and (fault := void_fault(own, counted.void, counted.rows_in, most)):
            yield fault


def own_notes(config: Config, counted: Census) -> Iterator[str]:
    """Pairs that such an arm leaves out."""
    for name in own_arms(config):
        own, splits = chosen(config.weigh.column, counted.own), config.arm(name).splits
        pairs, without = counted.pairs(*splits), counted.own_pairs(own, *splits)
        if config.arm(name).labels == "own" and without < pairs:
            void = void_of(own, counted.void)
            if counted.unlike:
                void |= {"copies of a pair with different numbers": counted.unlike}
            named = ", ".join(f"{count:,} × {why}" for why, count in void.items())
            yield (
                f"arm {name!r}: {pairs - without:,} of {pairs:,} training pairs have no {own} of "
                "their own that can be used, and are left out" + (f" ({named})" if named else "")
            )


def _idle_settings(config: Config) -> Iterator[str]:
    """Settings of arms that there are not."""
    if config.weigh.from_ != "annotator":
        yield (
            f"weigh.from: {config.weigh.from_!r} applies to arms that read an annotator, but the "
            f"arms are {', '.join(config.arms)}; take cw, or remove it"
        )
    if config.weigh.column is not None:
        yield f"weigh.column: no arm reads {config.weigh.column!r}; take arm own, or remove it"


def _misfits(config: Config, name: str, own: Own) -> Iterator[str]:
    """What an arm asks of numbers of a kind that cannot give it."""
    if own == "weight":
        yield from _misfits_of_weights(config, name)
    elif own == "confidence":
        yield from _misfits_of_confidences(config, name)


def _misfits_of_weights(config: Config, name: str) -> Iterator[str]:
    """Of a weight, which is about no answer and has no margin."""
    arm = config.arm(name)
    asked = _of_margins(config, weighting(config, arm))
    if arm.with_own:
        yield (
            "weigh.from: 'both', but a weight says nothing of which answer is better; beside an "
            "annotator the data need two scores, or a confidence"
        )
    elif asked or arm.soft_labels:
        what = " and ".join(f"weigh.{k}" for k in asked) or "soft labels"
        yield f"arms: {name!r} has {what}, of margins, but a weight of the data's own is none"


def _misfits_of_confidences(config: Config, name: str) -> Iterator[str]:
    """Of a confidence, whose side is the label's."""
    arm = config.arm(name)
    temperature = weighting(config, arm).chooser.temperature
    alone = temperature is not None and not arm.with_own
    if alone or temperature == "fitted":
        yield (
            f"weigh.temperature: {temperature} (arm {name!r}) is for scores; the side "
            "of the data's own confidences is the label's, which no temperature makes more honest"
        )


def _of_margins(config: Config, how: Weighting) -> list[str]:
    """The settings of `weigh` that an arm has and that are about margins."""
    told = {
        "pairing": None if how.pairing == "given" else how.pairing,
        "top_fraction": how.top_fraction,
        "min_confidence": how.min_confidence,
        "temperature": how.chooser.temperature,
    }
    asked = [name for name, value in told.items() if value is not None]
    weighs = config.weigh.weight_function is not None and how.weight_function != "one"
    return [*asked, "weight_function"] if weighs else asked
