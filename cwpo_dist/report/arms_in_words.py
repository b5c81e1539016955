"""The name of an arm in; what it trains on out, in words, as its preset says."""

from __future__ import annotations

from cwpo_dist.config import ARMS, Arm

UNWEIGHTED = "weak"  # the annotator's labels as they are: what weighting them is held against
ALL_HUMAN = "human100"
NOTE = (
    "Labelled part: the training pairs whose labels an annotator may be fitted on. Unlabelled "
    "part: the other ones; their labels are uncovered for arms of the data's own labels alone. "
    "C = 2·(σ(m) − ½) is the annotator's confidence in a label, for the margin m of its two scores."
)
_WEIGHTS = {
    "one": "1",
    "confidence": "C",
    "lower_confidence": "C of the mean margin less the annotators' disagreement",
}

# By the weight function of arms whose labels annotators judge.
WEIGHTS_OF_JUDGED = {
    "sigmoid": "σ(m), the label's probability by annotators that did not learn from it",
    "madpo": "MADPO's, of the label's margin by annotators that did not learn from it",
    "one": "1, without pairs whose label most annotators deny that did not learn from it",
}


def is_human(name: str) -> bool:
    """Whether the arm trains on the data's own labels, so that no annotator's apply to it.

    Args:
        name: of an arm; `run/arm` where several runs share a page, or a trial's, `arm, facts`.
    """
    arm = name.rsplit("/", 1)[-1].split(",")[0]
    return arm in ARMS and ARMS[arm].labels == "human"


def has_own_labels(name: str) -> bool:
    """Whether it needs no annotator: the data's own labels or numbers say which answer is better.

    Args:
        name: as in `is_human`.
    """
    arm = name.rsplit("/", 1)[-1].split(",")[0]
    return arm in ARMS and ARMS[arm].labels != "annotator"


def is_weighted(arm: str) -> bool:
    """Whether it makes more of an annotator's confident labels, by weight, choice or softness."""
    preset, plain = ARMS.get(arm), ARMS[UNWEIGHTED]
    if preset is None or arm == UNWEIGHTED:
        return False
    return (preset.labels, preset.annotator, preset.splits) == (
        plain.labels,
        plain.annotator,
        plain.splits,
    )


def in_words(arm: str) -> str:
    """Whose labels it trains on, of which pairs, and with which weight."""
    preset = ARMS[arm]
    where = f"the {' and the '.join(preset.splits)} part"
    if preset.top_fraction is not None:
        where = f"the {100 * preset.top_fraction:g} % most confident pairs of {where}"
    if preset.with_human:
        return (
            "the data's own labels of the labelled part, with weight 1, and the annotator's of the "
            f"unlabelled part, with weight {_weight(preset)}"
        )
    return f"{_labels(preset)} of {where}; weight {_weight(preset)}"


def _labels(preset: Arm) -> str:
    if preset.labels == "human":
        uncovered = ", uncovered," if "unlabelled" in preset.splits else ""
        return f"the data's own labels{uncovered}"
    if preset.labels == "own":
        return "the data's own labels, or those of their own scores,"
    if preset.annotator == "implicit":
        return "the labels of a weak model after DPO (its implicit reward)"
    return f"the annotator's {'probabilities, as soft labels,' if preset.soft_labels else 'labels'}"


def _weight(preset: Arm) -> str:
    if preset.judged is not None:
        return WEIGHTS_OF_JUDGED[preset.weight_function]
    if preset.labels == "own":
        return "the data's own, or C of their own confidence or scores"
    weight = _WEIGHTS[preset.weight_function]
    if preset.sampling is not None:
        return f"1, each pair drawn with probability {weight}"
    if preset.temperature is not None:
        weight += " of margins divided by a temperature that was fitted to the data's own labels"
    if preset.weight_normalization != "none":
        weight += ", divided by its mean"
    return weight
