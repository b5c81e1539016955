"""What noise.py tries: whose labels, with which errors, by which loss, and with which weights."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Method(NamedTuple):
    """What a policy is trained on, and how.

    Attributes:
        labels: whose, of which pairs: people's of the unlabelled part (human), of the labelled one
            (labelled_only) or of both (human100); the annotators' of the unlabelled part, alone or
            beside people's of the labelled one (semi).
        loss: a key of `OBJECTIVES`.
        smoothing: ε of the loss; None: the share of flipped labels.
        weight: a key of `WEIGHT_FUNCTIONS`, of the annotators' margin.
        top: the most confident share that is kept.
        annotators: one; or how several are joined (ensemble), or one divided by its temperature
            (calibrated).
        cleaned: without human labels that the annotator denies.
    """

    labels: Literal["human", "human100", "labelled_only", "annotator", "semi"]
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
    "labelled_only": Method("labelled_only"),
    "weak": Method("annotator"),
    "cw_mean": Method("annotator", weight="confidence"),
    "cw_calibrated": Method("annotator", weight="confidence", annotators="calibrated"),
    "ensemble": Method("annotator", weight="lower_confidence", annotators="ensemble"),
    "ensemble, C": Method("annotator", weight="confidence", annotators="ensemble"),
    "semi": Method("semi", weight="confidence"),
}
ABLATIONS = {
    "weak": Method("annotator"),
    "top 30 %": Method("annotator", top=0.3),
    "top 50 %": Method("annotator", top=0.5),
    "top 75 %": Method("annotator", top=0.75),
    "cw_mean": Method("annotator", weight="confidence"),
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
        careful: whether the labels of the labelled part are not flipped, whoever learns them.
    """

    method: str
    flipped: float
    labelled: float = 0.3
    careful: bool = False

    @property
    def plain(self) -> Case:
        """The case whose policy is the same: of careful labels alone no flip is seen."""
        unseen = self.careful and TRIED[self.method].labels not in {"human", "human100"}
        flipped = 0.0 if unseen else self.flipped
        return self._replace(flipped=flipped, careful=self.careful and flipped > 0)


FLIPPED = (0.0, 0.1, 0.2, 0.3, 0.4)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
NOISE = [Case(name, share) for share in FLIPPED for name in METHODS]
WEIGHTS = [Case(name, 0.0) for name in ABLATIONS]
SHARED = [Case(name, 0.0, share) for share in SHARES for name in ("weak", "cw_mean", "human100")]
LEARNED = (0.05, 0.2, 0.5)  # shares that an annotator learns, beside all labels with their errors
RIVALS = ("human100", "labelled_only", "weak", "cw_mean", "semi")
AGAINST_ALL = [
    Case(name, flipped, share, careful)
    for flipped in FLIPPED
    for share in LEARNED
    for careful in (False, True)
    for name in RIVALS
]
