"""Held-out pairs with the margins of one or several annotators in; joint and single figures out.

Shapes: N = pairs, K = annotators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cwpo_dist.evaluation.accuracy import annotator_accuracy
from cwpo_dist.evaluation.calibration import (
    CalibrationError,
    Temperature,
    fit_scale,
    fit_temperature,
)
from cwpo_dist.evaluation.shares import Floats, agreement, group_numbers
from cwpo_dist.pairs.chosen import Label, signs
from cwpo_dist.weighting import Joined, Scale, join

SAME_SPLIT = "temperatures are fitted on the same split as figures are measured on"


@dataclass(frozen=True)
class HeldOut:
    """Pairs with a human label that an annotator scored.

    Attributes:
        margins_NK: a − b of each annotator, NaN where it has no score.
        labels: [N] `a` or `b`.
        people: [N] the share of people that chose a.
        length_a: [N] characters of the first answer.
        length_b: [N] of the second.
        prompts: [N] what tells prompts apart.
    """

    margins_NK: Floats
    labels: Sequence[Label]
    people: Floats
    length_a: Floats
    length_b: Floats
    prompts: Sequence[str]

    def select(self, mask: NDArray[np.bool_]) -> HeldOut:
        """The pairs where a mask is true."""
        selected = np.flatnonzero(mask).tolist()
        return HeldOut(
            self.margins_NK[selected],
            [self.labels[i] for i in selected],
            self.people[selected],
            self.length_a[selected],
            self.length_b[selected],
            [self.prompts[i] for i in selected],
        )


def annotator_figures(
    held: HeldOut, calibration: HeldOut | None, names: Sequence[str], *, by_member: bool
) -> dict[str, object]:
    """What annotators are worth on held-out pairs, together and, where there are several, each.

    Args:
        held: the pairs to measure on.
        calibration: the pairs to fit temperatures to; None where these would be the same.
        names: of the annotators.
        by_member: whether the arm divides members' margins by their own temperatures first.
    """
    scale, temperature, why = _joint(calibration, names, by_member=by_member)
    joined = join(held.margins_NK, scale)
    figures = _figures(held, joined.margin, temperature, why)
    if len(names) == 1:
        return figures
    figures["members"] = [
        {"name": name} | _figures(held, held.margins_NK[:, k], *_single(calibration, k))
        for k, name in enumerate(names)
    ]
    return figures | {"ensemble": _ensemble(held, joined)}


def _joint(
    calibration: HeldOut | None, names: Sequence[str], *, by_member: bool
) -> tuple[Scale, Temperature | None, str | None]:
    """The members' scale, the temperature of their mean margin, or why there is none."""
    raw = Scale.raw(len(names))
    if calibration is None:
        return raw, None, SAME_SPLIT
    try:
        found = fit_scale(
            calibration.margins_NK,
            calibration.people,
            calibration.prompts,
            names,
            by_member=by_member,
        )
    except CalibrationError as error:
        return raw, None, str(error)
    return Scale(found.scale.members), found.joint, None


def _single(calibration: HeldOut | None, k: int) -> tuple[Temperature | None, str | None]:
    """The temperature of one annotator, or why there is none."""
    if calibration is None:
        return None, SAME_SPLIT
    margin = calibration.margins_NK[:, k]
    known = calibration.select(np.isfinite(margin))
    try:
        return fit_temperature(known.margins_NK[:, k], known.people, known.prompts), None
    except CalibrationError as error:
        return None, str(error)


def _figures(
    held: HeldOut, margin: Floats, temperature: Temperature | None, why: str | None
) -> dict[str, object]:
    """Figures of one margin a pair, on the pairs that have it."""
    known = np.isfinite(margin)
    pairs = held.select(known)
    found = annotator_accuracy(
        margin[known],
        pairs.labels,
        pairs.length_a,
        pairs.length_b,
        pairs.prompts,
        people=pairs.people,
        temperature=None if temperature is None else temperature.value,
    )
    return found.as_dict() | {
        "temperature": None if temperature is None else temperature.as_dict(),
        "no_temperature": why,
    }


def _ensemble(held: HeldOut, joined: Joined) -> dict[str, object]:
    """Accuracy where all annotators agree and where they do not."""
    known = np.isfinite(joined.margin)
    margin, dissent = joined.margin[known], joined.dissent[known]
    pairs = held.select(known)
    human, groups = signs(pairs.labels), group_numbers(pairs.prompts, len(margin))
    parts = {"unanimous": dissent == 0, "contested": dissent > 0}
    found: dict[str, object] = {
        name: agreement(margin[part], human[part], groups[part]).as_dict()
        for name, part in parts.items()
    }
    disagreement = joined.disagreement[known]
    return found | {
        "alone": int(np.sum(~known)),
        "mean_disagreement": float(disagreement.mean()) if len(margin) else None,
    }
