"""A run's metrics in; tables of what arms and annotators are worth out, for terminal and page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cwpo_dist.report.arms_in_words import has_own_labels, is_human
from cwpo_dist.report.cells import (
    AS_GIVEN,
    NOT_RUN,
    Cell,
    Metrics,
    Table,
    arm_items,
    at,
    calibration_error,
    correlation,
    count,
    estimate,
    inner,
    number,
    percent,
    share,
    temperature,
    together,
    without_empty,
)
from cwpo_dist.report.judged_table import judged_tables
from cwpo_dist.report.left_out_table import beside, left_out_tables
from cwpo_dist.report.outputs import cost_table, data_tables

COMPARISONS = {
    "own_sft": "its own SFT model",
    "common": "the common reference",
}
PARTS = ("unanimous", "contested")  # of an ensemble's held-out pairs
SIMULATED = (
    "SIMULATED LABELS: the preferences come from a rule, not from people. The figures say how "
    "well that rule was recovered, and nothing about what people prefer."
)


def tables(metrics: Metrics) -> list[Table]:
    """Every table, in reading order."""
    ensemble = ensemble_table(metrics)
    return [
        without_empty(arms_table(metrics)),
        gra_table(metrics),
        *left_out_tables(metrics),
        *judged_tables(metrics),
        annotator_table(metrics),
        *([] if ensemble is None else [ensemble]),
        weights_table(metrics),
        *data_tables(metrics),
        cost_table(metrics),
    ]


def is_simulated(metrics: Metrics) -> bool:
    """Whether labels come from a rule."""
    return bool(at(metrics, "run", "simulated_labels"))


def held_out(metrics: Metrics) -> str:
    """What annotators and policies are measured against."""
    return "held-out simulated labels" if is_simulated(metrics) else "held-out human labels"


def arms_table(metrics: Metrics) -> Table:
    """One row an arm: what it was trained on and how it did."""
    rows = tuple(
        (
            Cell(name),
            count(at(arm, "pairs")),
            number(at(arm, "mean_weight"), 3),
            AS_GIVEN
            if is_human(name) or (at(arm, "annotator") is None and has_own_labels(name))
            else share(at(arm, "annotator", "agreement"), with_ties=True),
            share(at(arm, "policy", "agreement"), with_ties=True),
            *(_gra(at(arm, "gra", key)) for key in COMPARISONS),
        )
        for name, arm in arm_items(metrics)
    )
    return Table(
        "Results by arm",
        (
            "arm",
            "pairs",
            "mean weight",
            "labels right",
            "policy right",
            "GRA, own SFT",
            "GRA, common",
        ),
        rows,
        note=f"Labels right: the annotator's choice against {held_out(metrics)}; as given: the arm "
        "trains on the data's own labels. Policy right: the policy's implicit reward against the "
        "same labels. Both are shares of the decided pairs. GRA: share of prompts on which the "
        "gold reward puts the arm's answer above the other model's; each arm has an SFT model of "
        "its own, so only the common reference, the policy as it was given, compares arms. A tie "
        "counts as a loss in GRA. Small: the 95 % interval of this one run, which does not hold "
        "the spread between seeds, ties, and prompts of which the gold model could not read an "
        "answer.",
    )


def _gra(record: Metrics | None) -> Cell:
    return beside(share(record, with_ties=True), at(record, "left_out"))


def gra_table(metrics: Metrics) -> Table:
    """Wins, ties and losses behind each GRA; one row where none was run."""
    rows = []
    for name, arm in arm_items(metrics):
        if not at(arm, "gra"):
            continue
        for key, words in COMPARISONS.items():
            found = at(arm, "gra", key)
            rows.append(
                (
                    Cell(name if key == "own_sft" else ""),
                    Cell(words),
                    *(count(at(found, part)) for part in ("wins", "ties", "losses")),
                    share(found),
                    percent(found, "accuracy_ties_halved"),
                )
            )
    return Table(
        "Gold reward accuracy",
        ("arm", "against", "wins", "ties", "losses", "GRA", "with ties halved"),
        tuple(rows) or ((NOT_RUN, *[Cell("")] * 6),),
        n_names=2,
    )


_OF_JUDGED = ("denied", "dropped", "unjudged")
_JUDGED = (
    " Denied: people's labels of which most annotators that did not learn from them prefer the "
    "other answer; dropped: those of them whose pairs are left out. Unjudged: pairs that "
    "annotators could not score, which are left out, too."
)


def weights_table(metrics: Metrics) -> Table:
    """What each arm's weights are, and how many equally weighted pairs they are worth."""
    told = [at(arm, "weigh") or {} for _, arm in arm_items(metrics)]
    judged = [name for name in _OF_JUDGED if any(name in weigh for weigh in told)]
    rows = tuple(
        (
            Cell(name),
            count(at(arm, "weigh", "pairs")),
            *(count(at(arm, "weigh", name)) for name in judged),
            count(at(arm, "weigh", "selected")),
            count(at(arm, "weigh", "ties")),
            number(at(arm, "weigh", "mean_confidence"), 3),
            number(at(arm, "weigh", "mean_weight"), 3),
            percent(at(arm, "weights"), "effective"),
        )
        for name, arm in arm_items(metrics)
    )
    return Table(
        "Weights by arm",
        (
            "arm",
            "labelled by it",
            *judged,
            "selected",
            "ties",
            "mean confidence",
            "mean weight",
            "effective share",
        ),
        rows,
        note="Effective share: (Σw)² / (n·Σw²), of the selected pairs how many equally weighted "
        "ones vary as little (Kish). In the paper's form a mean weight below 1 also shrinks every "
        "gradient; cw_mean divides it out." + (_JUDGED if judged else ""),
    )


# The rows of the annotators' table: what stands there of each one's figures.
_OF_ANNOTATOR: dict[str, Callable[[Metrics | None], Cell]] = {
    "accuracy": lambda r: share(at(r, "agreement"), with_ties=True),
    "longer answer wins": lambda r: share(at(r, "length_baseline"), with_ties=True),
    "calibration error (ECE)": calibration_error,
    "Brier score": lambda r: estimate(at(r, "brier")),
    "negative log-likelihood": lambda r: estimate(at(r, "nll")),
    "temperature fitted to held-out labels": temperature,
    "ECE with it": lambda r: calibration_error(at(r, "calibrated")),
    "Brier score with it": lambda r: estimate(at(r, "calibrated", "brier")),
    "negative log-likelihood with it": lambda r: estimate(at(r, "calibrated", "nll")),
    "mean probability": lambda r: percent(r, "mean_probability"),
    "mean confidence": lambda r: inner(r, "mean_confidence"),
    "margin × length difference": lambda r: correlation(at(r, "margin_length")),
    "confidence × |length difference|": lambda r: correlation(at(r, "confidence_length")),
}


def annotator_table(metrics: Metrics) -> Table:
    """One column of figures for each distinct annotator; members stand beside their ensemble."""
    columns = [named for each in annotators(metrics) for named in _with_members(*each)]
    names = tuple(label for label, _ in columns) or ("annotator",)
    found: list[Metrics | None] = [record for _, record in columns] or [None]
    rows = tuple((Cell(name), *map(cell, found)) for name, cell in _OF_ANNOTATOR.items())
    return Table(
        f"Annotator on {held_out(metrics)}",
        ("", *names),
        rows,
        note="Mean probability is σ(|margin|) of the predicted answers: above the accuracy it "
        "means overconfident. ECE is over ten bins of it, against the share of people that agree. "
        "Brier score and negative log-likelihood (nats) hold each claim against what people said; "
        "less is better, and a coin has ¼ and ln 2. "
        "The temperature, with its 95 % interval, is what margins must be divided by to be honest; "
        "it is in the weights of arms that ask for it alone. Correlations: Pearson's, with "
        "Spearman's on the second line; far from zero they say that length is part of the score."
        + "".join(f" Not fitted ({name}): {why}." for name, why in _reasons(columns)),
    )


def _with_members(label: str, record: Metrics) -> list[tuple[str, Metrics]]:
    """An annotator, or an ensemble and each of its members."""
    members = at(record, "members") or []
    return [(label, record), *((member["name"], member) for member in members)]


def _reasons(columns: Sequence[tuple[str, Metrics]]) -> list[tuple[str, str]]:
    """Why there is no temperature, by annotator."""
    found = [(label, at(record, "no_temperature")) for label, record in columns]
    return [(label, why) for label, why in found if why is not None]


def ensemble_table(metrics: Metrics) -> Table | None:
    """How far several annotators agree, one row an arm; None where every arm has one."""
    rows = [
        (
            Cell(name),
            count(at(joined, "annotators")),
            count(at(joined, "partial")),
            count(at(joined, "alone")),
            count(at(joined, "contested")),
            number(at(joined, "mean_disagreement"), 3),
            *(share(at(arm, "annotator", "ensemble", part)) for part in PARTS),
        )
        for name, arm in arm_items(metrics)
        for joined in [at(arm, "weigh", "ensemble")]
        if joined is not None
    ]
    if not rows:
        return None
    columns = ("arm", "annotators", "not by all", "left out", "contested", "disagreement")
    return Table(
        "Ensemble",
        (*columns, *(f"right where {part}" for part in PARTS)),
        tuple(rows),
        note="Pairs to train on. Not by all: pairs that some annotators could not score; the "
        "others' scores count. Left out: only one scored it, so that nothing is known of "
        "disagreement. Contested: annotators choose different answers. Disagreement: mean standard "
        f"deviation of their margins. Right where …: on {held_out(metrics)}.",
    )


def annotators(metrics: Metrics) -> list[tuple[str, Metrics]]:
    """(arms in words, evaluation) of each distinct annotator."""
    groups = _by_annotator(metrics)
    if len(groups) == 1:
        record = groups[0][1]
        return [("ensemble" if at(record, "members") else "annotator", record)]
    return [(together(names), record) for names, record in groups]


def _by_annotator(metrics: Metrics) -> list[tuple[list[str], Metrics]]:
    """(arms, evaluation) of each.

    Arms of the data's own labels are measured beside one, too, but it is not theirs.
    """
    groups: list[tuple[list[str], Metrics]] = []
    items = sorted(arm_items(metrics), key=lambda item: is_human(item[0]))
    for name, arm in items:
        record = at(arm, "annotator")
        if record is None:
            continue
        same = [names for names, other in groups if other == record]
        if same and not is_human(name):
            same[0].append(name)
        elif not same:
            groups.append(([name], record))
    return groups
