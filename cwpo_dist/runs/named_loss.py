"""The section `align` in; the objective that it names and its numbers out, or a refusal."""

from __future__ import annotations

from dataclasses import replace

from cwpo_dist.config import AlignConfig, ConfigError
from cwpo_dist.objectives import OBJECTIVES, LossSettings, Objective


def objective(align: AlignConfig, *, soft_labels: bool = False) -> tuple[Objective, LossSettings]:
    """The objective that a configuration names, with its numbers.

    Args:
        align: its section.
        soft_labels: the arm's; the task then gives each pair its own ε.

    Raises:
        ConfigError: for a name that there is not, or a setting that this objective would ignore.
    """
    name = align.loss_type
    if name not in OBJECTIVES:
        raise ConfigError(
            f"align.loss_type: {name!r} is unknown; choose from {', '.join(OBJECTIVES)} (DPO is "
            "sigmoid, rDPO is robust; MADPO is a weight: arm human_madpo)"
        )
    found = OBJECTIVES[name]
    _refuse_unread(align, found)
    if soft_labels:
        _refuse_soft(align, found)
    given = align.label_smoothing
    epsilon = found.label_smoothing or 0.0 if given is None else given
    settings = LossSettings(align.beta, epsilon, sft_coefficient=align.sft_coefficient)
    if found.own is not None and (own := getattr(align, found.own)) is not None:
        settings = replace(settings, **{found.own: own})
    return found, settings


def _refuse_unread(align: AlignConfig, found: Objective) -> None:
    """Settings that the objective would ignore."""
    name = align.loss_type
    if align.label_smoothing is not None and found.label_smoothing is None:
        raise ConfigError(
            f"align.label_smoothing: {align.label_smoothing} is not read by loss_type {name!r}; "
            f"remove it, or take {_those_with('label_smoothing')}"
        )
    for other, its in OBJECTIVES.items():
        given = None if its.own in (None, found.own) else getattr(align, str(its.own))
        if given is not None:
            unread = f"align.{its.own}: {given} is not read by loss_type {name!r}"
            raise ConfigError(f"{unread}; remove it, or take {other}")


def _refuse_soft(align: AlignConfig, found: Objective) -> None:
    """What does not go with the probabilities of an annotator in place of hard labels."""
    if not found.soft_labels:
        raise ConfigError(
            f"align.loss_type: {align.loss_type!r} takes no soft labels, which arm 'soft' trains "
            f"on; take {_those_with('soft_labels')}"
        )
    if align.label_smoothing is not None:
        raise ConfigError(
            f"align.label_smoothing: {align.label_smoothing} beside arm 'soft', whose ε is one "
            "minus the annotator's probability, pair by pair; remove one of them"
        )


def _those_with(attribute: str) -> str:
    """The names of the objectives that have it, for a message."""
    having = {name: getattr(found, attribute) for name, found in OBJECTIVES.items()}
    names = [name for name, value in having.items() if value is not None and value is not False]
    return " or ".join(names)
