"""The stages in their order, and what people are told of each; the one list of them.

A stage itself is the file of its name in `stages/`. None is imported here: what a stage needs is
heavy, and who tells people of it wants words alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """How a report shows a training.

    Attributes:
        title: above it.
        caption: what the losses are.
        level: a dashed line.
    """

    title: str
    caption: str
    level: float | None = None


@dataclass(frozen=True)
class Listed:
    """What people are told of a stage.

    Attributes:
        does: in a sentence; `cwpo <stage>` exists for those of which something is said, the others
            are steps on the way.
        curve: of its training, where it is one.
        roles: of the outputs that a report lists at its place; none: its own name.
    """

    does: str = ""
    curve: Curve | None = None
    roles: tuple[str, ...] = ()


LISTED: dict[str, Listed] = {
    "prepare": Listed(
        "Read the sources, split them, set bad rows aside: pairs and rejects.",
    ),
    "fit": Listed(
        "Train the weak model on the labelled pairs: the annotator.",
        Curve(
            "Annotator (fit)",
            "Bradley–Terry loss of the annotator. Dashed: ln 2, a coin.",
            level=math.log(2),
        ),
    ),
    "annotate": Listed("Score every answer with the annotator or any one-label reward model."),
    "implicit": Listed(),
    "weigh": Listed("Scores to preferences: who won, how confidently, with what weight."),
    "tokens": Listed(),
    "sft": Listed(
        "Fine-tune the policy on the chosen answers.",
        Curve(
            "Supervised fine-tuning (sft)",
            "Negative log-likelihood of the chosen answers, per answer token.",
        ),
    ),
    "reference": Listed("The SFT policy's log-probabilities of both answers, once."),
    "align": Listed(
        "Confidence-weighted preference optimisation of the policy.",
        Curve(
            "Preference optimisation (align)",
            "Weighted preference loss. Arms of different weights or normalisation start at "
            "different levels: read each line for its shape, and compare arms by held-out figures.",
        ),
        roles=("align", "aligned"),  # with the log-probabilities of what it made
    ),
    "generate": Listed(roles=("answers_base", "answers_sft", "answers_aligned")),
    "evaluate": Listed("Held-out accuracy, calibration and gold reward accuracy."),
}
