"""What noise.py tries: whose labels, with which errors, by which loss, and with which weights."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Method(NamedTuple):
    """What a policy is trained on, and how.

    Attributes:
        labels: whose: human (of the unlabelled part), human100, or the annotators'.
        loss: a key of `OBJECTIVES`.
        smoothing: ε of the loss; None: the share of flipped labels.
        weight: a key of `WEIGHT_FUNCTIONS`, of the annotators' margin.
        top: the most confident share that is kept.
        annotators: one; or how several are joined (ensemble), or one divided by its temperature
            (calibrated).
        cleaned: without human labels that the annotator denies.
    """

    labels: Literal["human", "human100", "annotator"]
    loss: str = "sigmoid"
    smoothing: float | None = 0.0
    weight: str = "one"
    top: float = 1.0
    annotators: Literal["one", "ensemble", "calibrated"] = "one"
    cleaned: bool = False


METHODS = {
    "human100": Method("human100"),
    "human": Method("human"),
    "human, cDPO": Method("human", smoothing=0.1),
    "human, rDPO": Method("human", "robust", 0.1),
    "human, rDPO, share known": Method("human", "robust", None),
    "human, ROPO": Method("human", "ropo"),
    "human, Dr. DPO": Method("human", "dr_dpo"),
    "human, cleaned": Method("human", cleaned=True),
    "weak": Method("annotator"),
    "cw_mean": Method("annotator", weight="confidence"),
    "cw_calibrated": Method("annotator", weight="confidence", annotators="calibrated"),
    "ensemble": Method("annotator", weight="lower_confidence", annotators="ensemble"),
}
ABLATIONS = {
    "weak": Method("annotator"),
    "top 30 %": Method("annotator", top=0.3),
    "top 50 %": Method("annotator", top=0.5),
    "top 75 %": Method("annotator", top=0.75),
    "C": Method("annotator", weight="confidence"),
    "σ(m)": Method("annotator", weight="sigmoid"),
    "min(m, 1)": Method("annotator", weight="clipped"),
    "min(0.2 m, 1)": Method("annotator", weight="clipped_fifth"),
}
TRIED = METHODS | ABLATIONS


class Case(NamedTuple):
    """A method, and the world that it is tried in.

    Attributes:
        method: its name.
        flipped: the share of training labels turned round.
        labelled: the share of training prompts whose labels the annotator learns.
        careful: whether the labels that the annotator learns are not flipped.
    """

    method: str
    flipped: float
    labelled: float = 0.3
    careful: bool = False


FLIPPED = (0.0, 0.1, 0.2, 0.3, 0.4)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
NOISE = [Case(name, share) for share in FLIPPED for name in METHODS]
SMALL = [Case(name, 0.0) for name in ABLATIONS]
SHARED = [Case(name, 0.0, share) for share in SHARES for name in ("weak", "cw_mean")]
QUALITY = [
    Case(name, flipped, share, careful)
    for flipped in FLIPPED
    for share in (0.05, 0.2, 0.5)
    for careful in (False, True)
    for name in ("weak", "cw_mean")
]
