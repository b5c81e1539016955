"""The figures of several trials and seeds in; the tables of a comparison out."""

from __future__ import annotations

import math
from dataclasses import replace

from cwpo_dist.report.arms_in_words import ALL_HUMAN, has_own_labels
from cwpo_dist.report.cells import (
    AS_GIVEN,
    NOT_RUN,
    Cell,
    Table,
    at,
    count,
    interval,
    together,
    without_empty,
    written,
)
from cwpo_dist.report.figures import Mean
from cwpo_dist.report.judged_table import judged_tables
from cwpo_dist.report.left_out_table import beside, left_out_tables
from cwpo_dist.report.outcomes import Found, p_in_words

MOST_IN_MATRIX = 12  # trials: a wider table is read by nobody
_ONE_SEED = "One seed: intervals are of its items alone and do not hold the spread between seeds."
_SEVERAL = (
    "Each figure is the mean over seeds; a seed draws split, initialisation and order anew. Seeds "
    "split the same pairs, so their test sets overlap and are not independent. Small: the 95 % "
    "interval, the widest of Student's over seeds, over items (clustered by prompt), and over both."
)
_MARK = "An asterisk: the interval leaves zero out."
_FIGURES = {
    "accuracy": "accuracy",
    "length_balanced": "length-balanced",
    "gra_own_sft": "GRA, own SFT",
    "gra_common": "GRA, common",
}
# What is known of an annotator → its column, its format, the least and the most that it can be.
_OF_ANNOTATOR: dict[str, tuple[str, str, float, float]] = {
    "labels_right": ("labels right", "%", 0, 1),
    "least_confident": ("least confident", "%", 0, 1),
    "most_confident": ("most confident", "%", 0, 1),
    "calibration_error": ("ECE", ".3f", 0, 1),
    "brier": ("Brier", ".3f", 0, 1),
    "nll": ("NLL", ".3f", 0, math.inf),
    "mean_confidence": ("mean C", ".2f", 0, 1),
    "margin_length": ("length, r", "+.2f", -1, 1),
}


def tables(found: Found) -> list[Table]:
    """Every table, in reading order."""
    asked = [_asked_table(found)] if at(found, "asked") else []
    if not found["trials"]:
        return asked
    matrix = [_matrix_table(found)] if 2 < len(found["trials"]) <= MOST_IN_MATRIX else []
    known = _annotators(found)
    annotators = [_annotators_table(known)] if known else []
    rates = [_rates_table(found)] if found["tried"] else []
    stopped = [_stopped_table(found)] if _stopped(found) else []
    first = [_trials_table(found), *left_out_tables(found), *judged_tables(found), *stopped]
    shown = [*first, _paired_table(found), *matrix, _training_table(found)]
    return [without_empty(table) for table in [*shown, *annotators, *asked, *rates]]


def seeds_note(found: Found) -> str:
    """What the intervals hold."""
    return _ONE_SEED if len(found["seeds"]) == 1 else _SEVERAL


def _trials_table(found: Found) -> Table:
    trials = found["trials"]
    counts = {at(trial, "test_pairs") for trial in trials.values()}
    differ = len(counts) > 1
    rows = tuple(
        (
            Cell(name),
            *([count(at(trial, "test_pairs"))] if differ else []),
            AS_GIVEN
            if has_own_labels(str(at(trial, "arm"))) and not at(trial, "by_seed", "labels_right")
            else _share(at(trial, "by_seed", "labels_right")),
            _share(at(trial, "figures", "accuracy")),
            _share(at(trial, "figures", "length_balanced")),
            _gra(trial, "own_sft"),
            _gra(trial, "common"),
            _share(at(trial, "by_seed", "length_controlled_common")),
            _mean(Mean.of(at(trial, "figures", "length")), ".0f", 0),
            beside(
                _mean(Mean.of(at(trial, "by_seed", "kl")), ".2f", 0), at(trial, "left_out", "kl")
            ),
        )
        for name, trial in trials.items()
    )
    columns = ("labels right", *_FIGURES.values(), "at equal length", "answer length", "KL, nats")
    same = "" if differ or None in counts else f" Test pairs, over all seeds: {max(counts):,}."
    return Table(
        "Trials",
        ("trial", *(["test pairs"] if differ else []), *columns),
        rows,
        note="Accuracy: the policy's implicit reward agrees with held-out labels (a tie counts a "
        "half). Length-balanced: the mean of that where the longer answer is preferred and where "
        "the shorter is, so that length alone comes to 50 %. GRA: share of prompts on which the "
        "gold reward puts the trial's answer above the other model's; a tie counts as a loss there "
        "and stands apart. Each trial has an SFT model of its own, so only the common reference, "
        "the policy as it was given, compares trials. At equal length: win rate against that, ties "
        "halved, by a logistic regression on the difference in length. KL: from the trial's own "
        "SFT model, on its sampled answers. " + seeds_note(found) + same,
    )


def _stopped(found: Found) -> dict[str, Found]:
    """The trials that have not all seeds, by name."""
    return {k: v for k, v in found["trials"].items() if at(v, "stopped_after") is not None}


def _stopped_table(found: Found) -> Table:
    rows = []
    for name, trial in _stopped(found).items():
        difference = at(trial, "against", found["baseline"], "accuracy")
        told = Cell(f"{trial['stopped_after']} of {len(found['seeds'])}")
        rows.append((Cell(name), told, _points(difference), Cell(p_in_words(difference["p"]))))
    return Table(
        "Stopped early",
        ("trial", "seeds", "Δ accuracy", "p"),
        tuple(rows),
        note=f"Surely below {found['baseline']} on held-out labels, so that it got no more "
        "seeds (compare.stop_losers). P counts how often one looked. A trial is stopped when it "
        "looks its worst: its figures are somewhat too low, and are of fewer seeds.",
    )


def _paired_table(found: Found) -> Table:
    rows = []
    for name, trial in found["trials"].items():
        if name == found["baseline"]:
            continue
        cells = []
        for figure in _FIGURES:
            mean = at(trial, "against", found["baseline"], figure)
            cells += [_points(mean), _smallest(mean)]
        rows.append((Cell(name), *cells))
    columns = [
        text for words in _FIGURES.values() for text in (f"Δ {words}", f"smallest Δ {words}")
    ]
    return Table(
        f"Against {found['baseline']}, paired",
        ("trial", *columns),
        tuple(rows) or ((NOT_RUN, *[Cell("")] * len(columns)),),
        note=f"Differences in percentage points, on the same seeds and items. {_MARK} Smallest: "
        "the true difference that so many seeds and items find with 80 % probability at the 5 % "
        "level; a smaller one that was not found is no evidence that there is none.",
    )


def _matrix_table(found: Found) -> Table:
    trials = found["trials"]
    rows = tuple(
        (
            Cell(name),
            *(
                Cell("–", missing=True)
                if other == name
                else _points(at(trial, "against", other, "accuracy"))
                for other in trials
            ),
        )
        for name, trial in trials.items()
    )
    return Table(
        "Accuracy, each trial less each other",
        ("trial", *trials),
        rows,
        note="The row's less the column's, in percentage points, on the same seeds and items. "
        f"{_MARK} Of so many comparisons one in twenty does by chance alone.",
    )


def _training_table(found: Found) -> Table:
    rows = tuple(
        (
            Cell(name),
            _labelled(trial),
            Cell(_rate(trial["learning_rate"])),
            _alone(at(trial, "by_seed", "pairs"), ",.0f"),
            _alone(at(trial, "by_seed", "mean_weight"), ".3f"),
            _alone(at(trial, "by_seed", "steps"), ",.0f"),
            _alone(at(trial, "by_seed", "sft_loss"), ".2f"),
            _alone(at(trial, "by_seed", "device_hours"), ".2f"),
        )
        for name, trial in found["trials"].items()
    )
    return Table(
        "How they were trained",
        ("trial", "labelled", "rate", "pairs", "mean weight", "steps", "SFT loss", "device-hours"),
        rows,
        note="Means over seeds. Labelled: the share of training prompts whose labels may be used. "
        "Steps: of the optimizer, in preference optimisation; an arm that draws its pairs takes "
        "fewer an epoch. SFT loss: nats a token in the last step; guessing evenly costs "
        "ln(vocabulary), 10.8 for 50,000 tokens. Device-hours: of all stages that the trial needs, "
        "a seed, shared ones included, but not of an annotator that only says which pairs an arm "
        "of the data's own labels may train on.",
    )


def _labelled(trial: Found) -> Cell:
    share, arm = at(trial, "labelled_fraction"), str(at(trial, "arm"))
    if share is None:
        return NOT_RUN
    return Cell("all" if arm == ALL_HUMAN else f"{100 * share:g} %")


def _annotators(found: Found) -> list[tuple[list[str], Found]]:
    """Trials that share an annotator, and what is known of it."""
    shared: list[tuple[list[str], Found]] = []
    for name, trial in found["trials"].items():
        known = {k: at(trial, "by_seed", k) for k in _OF_ANNOTATOR}
        names = next((names for names, other in shared if other == known), None)
        if names is not None:
            names.append(name)
        elif known["labels_right"] is not None:
            shared.append(([name], known))
    return shared


def _annotators_table(annotators: list[tuple[list[str], Found]]) -> Table:
    rows = tuple(
        (
            Cell(together(names)),
            *(
                _share(known[k]) if form == "%" else _mean(Mean.of(known[k]), form, *ends)
                for k, (_, form, *ends) in _OF_ANNOTATOR.items()
            ),
        )
        for names, known in annotators
    )
    return Table(
        "Annotators",
        ("of trials", *(column for column, *_ in _OF_ANNOTATOR.values())),
        rows,
        note="On held-out labels. Were confidence worth its name, labels would be right more "
        "often in the most confident quarter of pairs than in the least, and the calibration error "
        "(ECE, ten bins), Brier score and negative log-likelihood (NLL, nats) small. The last "
        "column: the margin's correlation with the difference in length.",
    )


def _asked_table(found: Found) -> Table:
    rows = tuple(
        (
            *(Cell(row["strategy"] or "before"), Cell(f"{row['labels']:,.0f}")),
            *(_share(row["accuracy"]), _points(at(row, "accuracy_less_random"))),
            _mean(Mean.of(row["nll"]), ".3f", 0),
            _mean(Mean.of(at(row, "nll_less_random")), "+.3f"),
        )
        for row in found["asked"]
    )
    return Table(
        "Labels that were asked for",
        ("strategy", "labels", "accuracy", "Δ accuracy", "NLL", "Δ NLL"),
        rows,
        note="Annotators on held-out labels. Labels: of the labelled part, and those that were "
        "asked for beside it; the mean over seeds. NLL: nats, of margins as they are. Differences "
        f"are from random with as many labels, on the same seeds and pairs. {_MARK}",
        n_names=2,
    )


def _rates_table(found: Found) -> Table:
    rates = sorted({rate for told in found["tried"].values() for rate in told}, key=float)
    pairs = at(found, "validation_pairs") or {}
    rows = tuple(
        (
            Cell(name),
            *([count(at(pairs, name))] if pairs else []),
            *(Cell(f"{100 * told[rate]:.1f} %") for rate in rates),
            Cell(_rate(found["trials"][name]["learning_rate"])),
        )
        for name, told in found["tried"].items()
    )
    columns = (*(["validation pairs"] if pairs else []), *(_rate(float(rate)) for rate in rates))
    return Table(
        "Learning rates on validation",
        ("trial", *columns, "taken"),
        rows,
        note=f"Accuracy with seed {found['seeds'][0]}: the best is taken, of equal ones the "
        "smallest rate; the rule is the same for every trial, and no test pair of that seed is "
        "looked at. Other seeds draw anew, and may test on some of these pairs."
        + _noise(min(filter(None, pairs.values()), default=0)),
    )


def _noise(pairs: int) -> str:
    """How far apart two equally good rates would be, in words: √(2·¼ / n) for unlike answers."""
    if not pairs:
        return ""
    return (
        f" On {pairs:,} pairs the difference of two rates has a standard error of up to "
        f"{100 * math.sqrt(0.5 / pairs):.0f} points (less, the more answers they share): a "
        "smaller gap chooses a rate, but is no finding."
    )


def _rate(value: float) -> str:
    """A learning rate as it is written in a configuration: 1e-4."""
    digits, exponent = f"{value:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _mean(found: Mean | None, form: str, least: float = -math.inf, most: float = math.inf) -> Cell:
    """A mean with its interval, cut at what the figure can be."""
    if found is None:
        return NOT_RUN
    told = found.cut(least, most)
    if told.low is None or told.high is None:
        return Cell(written(told.mean, form))
    return Cell(written(told.mean, form), (interval(told.low, told.high, form),))


def _alone(record: Found | None, form: str) -> Cell:
    """A mean without its interval."""
    return replace(_mean(Mean.of(record), form), details=())


def _share(record: Found | None) -> Cell:
    found = Mean.of(record)
    cell = _mean(found and found.hundredfold, ".1f", 0, 100)
    return cell if cell.missing else replace(cell, text=f"{cell.text} %")


def _gra(trial: Found, against: str) -> Cell:
    cell, tied = (_share(at(trial, "figures", f"{kind}_{against}")) for kind in ("gra", "ties"))
    told = cell if cell.missing else Cell(cell.text, (*cell.details, f"{tied.text} ties"))
    return beside(told, at(trial, "left_out", f"gra_{against}"))


def _points(record: Found | None) -> Cell:
    found = Mean.of(record)
    cell = _mean(found and found.hundredfold, "+.1f", -100, 100)
    if found is None or not found.excludes_zero:
        return cell
    return replace(cell, text=f"* {cell.text}")


def _smallest(record: Found | None) -> Cell:
    smallest = at(record, "smallest")
    return NOT_RUN if smallest is None else Cell(f"{100 * smallest:.1f}")
