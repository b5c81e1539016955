"""The figures of several trials and seeds in; their tables on the terminal and their page out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from cwpo_dist.report.cells import AS_GIVEN, NOT_RUN, Cell, Table, at, plain, without_empty
from cwpo_dist.report.page import TEMPLATES
from cwpo_dist.report.plots import Dot, cost_plot, dots_plot
from cwpo_dist.report.summary import SIMULATED, is_human, is_simulated
from cwpo_dist.report.table import print_table

Found = Mapping[str, Any]
FIGURES, PAGE = "comparison.json", "comparison.html"  # of a run directory
ONE_SEED = "One seed: intervals are of its items alone and do not hold the spread between seeds."
SEVERAL = (
    "Each figure is the mean over seeds; a seed draws split, initialisation and order anew. Small: "
    "the 95 % interval, the wider of Student's over the seeds and the normal's over items "
    "(clustered by prompt)."
)
_ENDS = ("mean", "low", "high")
MOST_IN_MATRIX = 12  # trials: a wider table is read by nobody
_COLUMNS = (
    "trial",
    "rate",
    "pairs",
    "labels right",
    "accuracy",
    "GRA, own SFT",
    "GRA, common",
    "at equal length",
    "answer length",
    "KL, nats",
    "device-hours",
)


# What is known of an annotator → its column: three shares, then numbers.
_OF_ANNOTATOR = {
    "labels_right": "labels right",
    "least_confident": "least confident",
    "most_confident": "most confident",
    "calibration_error": "ECE",
    "mean_confidence": "mean C",
    "margin_length": "length, r",
}

# Figure → what it says, in words: those by which a trial is held against the baseline.
_VERDICTS = {
    "accuracy": "on held-out labels",
    "gra_common": "by the gold reward (GRA, common)",
}
CHANCE = (
    "Paired differences with their 95 % intervals. Each line is a comparison of its own: of twenty "
    "true zeros one is told apart by chance."
)


def print_comparison(found: Found, console: Console | None = None) -> None:
    """Prints every table, and last what came out."""
    console = console or Console()
    for table in tables(found):
        print_table(table, console, simulated=is_simulated(found))
    for _, title, lines in verdicts(found):
        console.print(Text(f"\n{title}", style="bold"))
        for line in lines:
            console.print(Text(line))
    if verdicts(found):
        console.print(Text(CHANCE, style="dim"))


def verdicts(found: Found) -> list[tuple[str, str, list[str]]]:
    """Figure, what it says, and every other trial against the baseline by it, in words."""
    told = []
    for figure, words in _VERDICTS.items():
        lines = [
            _verdict(name, record)
            for name, trial in found["trials"].items()
            for record in [at(trial, "against", found["baseline"], figure)]
            if record is not None and record["mean"] is not None
        ]
        if lines:
            told.append((figure, f"Against {found['baseline']}, {words}", lines))
    return told


def _verdict(name: str, record: Found) -> str:
    """Told apart where the interval of the paired difference leaves zero out."""
    mean, low, high = (None if record[k] is None else 100 * record[k] for k in _ENDS)
    if mean is None or low is None or high is None:
        return f"{name}: {mean or 0.0:+.1f} points, and nothing to tell chance by"
    interval = f"({low:+.1f} to {high:+.1f})"
    if low <= 0 <= high:
        unseen = f"a true difference below {100 * record['smallest']:.1f} would often go unseen"
        return f"{name}: not told apart, {mean:+.1f} points {interval}; {unseen}"
    return f"{name}: {abs(mean):.1f} points {'above' if low > 0 else 'below'} {interval}"


def render_comparison(found: Found) -> str:
    """The page: it opens offline and runs no script."""
    trials = found["trials"]
    plots = [
        ("Held-out preference accuracy", _dots(found, "accuracy", "accuracy")),
        ("Gold reward accuracy against the common reference", _dots(found, "gra_common", "GRA")),
        ("Accuracy against cost", _cost(found)),
    ]
    page = TEMPLATES.get_template("comparison.html.j2").render(
        output_dir=found["run"]["output_dir"],
        seeds=found["seeds"],
        trials=trials,
        simulated=SIMULATED if is_simulated(found) else None,
        verdicts=[
            (title, lines, _dots(found, figure, "difference", True))
            for figure, title, lines in verdicts(found)
        ],
        chance=CHANCE,
        single_runs=at(found, "single_runs"),
        tables=tables(found),
        plots=[(title, plot) for title, plot in plots if plot is not None],
        provenance=_provenance(found),
        config=yaml.safe_dump(found["config"], sort_keys=False, allow_unicode=True),
        footer=ONE_SEED if len(found["seeds"]) == 1 else SEVERAL,
    )
    return page.encode("utf-8", "replace").decode()  # no page can hold a lone surrogate


def tables(found: Found) -> list[Table]:
    """Every table, in reading order."""
    rates = [_rates_table(found)] if found["tried"] else []
    matrix = [_matrix_table(found)] if 2 < len(found["trials"]) <= MOST_IN_MATRIX else []
    known = _annotators(found)
    annotators = [_annotators_table(known)] if known else []
    shown = [_trials_table(found), _paired_table(found), *matrix, *annotators, *rates]
    return [without_empty(table) for table in shown]


def _trials_table(found: Found) -> Table:
    rows = tuple(
        (
            Cell(name),
            Cell(f"{trial['learning_rate']:g}"),
            _mean(at(trial, "by_seed", "pairs"), "{:,.0f}", interval=False),
            AS_GIVEN
            if is_human(str(trial.get("arm")))
            else _share(at(trial, "by_seed", "labels_right")),
            _share(at(trial, "figures", "accuracy")),
            _gra(trial, "own_sft"),
            _gra(trial, "common"),
            _share(at(trial, "by_seed", "length_controlled_common")),
            _mean(at(trial, "figures", "length"), "{:.0f}"),
            _mean(at(trial, "by_seed", "kl"), "{:.2f}"),
            _mean(at(trial, "by_seed", "device_hours"), "{:.2f}", interval=False),
        )
        for name, trial in found["trials"].items()
    )
    return Table(
        "Trials",
        _COLUMNS,
        rows,
        note="Accuracy: the policy's implicit reward agrees with held-out labels (a tie counts a "
        "half). GRA: share of prompts on which the gold reward puts the trial's answer above the "
        "other model's; a tie counts as a loss there and stands apart. Each trial has an SFT model "
        "of its own, so only the common reference, the policy as it was given, compares trials. "
        "At equal length: win rate against that, ties halved, by a logistic regression on the "
        "difference in length. KL: from the trial's own SFT model, on its sampled answers. "
        "Device-hours: of all stages that the trial needs, a seed, shared ones included. "
        + (ONE_SEED if len(found["seeds"]) == 1 else SEVERAL),
    )


def _paired_table(found: Found) -> Table:
    figures = {"accuracy": "accuracy", "gra_own_sft": "GRA, own SFT", "gra_common": "GRA, common"}
    rows = []
    for name, trial in found["trials"].items():
        if name == found["baseline"]:
            continue
        cells = []
        for figure in figures:
            mean = at(trial, "against", found["baseline"], figure)
            cells += [_points(mean), _smallest(mean)]
        rows.append((Cell(name), *cells))
    columns = [text for words in figures.values() for text in (f"Δ {words}", f"smallest Δ {words}")]
    return Table(
        f"Against {found['baseline']}, paired",
        ("trial", *columns),
        tuple(rows) or ((NOT_RUN, *[Cell("")] * len(columns)),),
        note="Differences in percentage points, on the same seeds and items. Smallest: the true "
        "difference that so many seeds and items find with 80 % probability at the 5 % level; "
        "a smaller one that was not found is no evidence that there is none.",
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
        "Of so many comparisons one in twenty excludes zero by chance alone.",
    )


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
            Cell("; ".join(names)),
            *(_share(known[k]) for k in list(_OF_ANNOTATOR)[:3]),
            _mean(known["calibration_error"], "{:.3f}"),
            _mean(known["mean_confidence"], "{:.2f}"),
            _mean(known["margin_length"], "{:+.2f}"),
        )
        for names, known in annotators
    )
    return Table(
        "Annotators",
        ("of trials", *_OF_ANNOTATOR.values()),
        rows,
        note="On held-out labels. Were confidence worth its name, labels would be right more "
        "often in the most confident quarter of pairs than in the least, and the calibration error "
        "(ECE, ten bins) small. The last column: the margin's correlation with the difference in "
        "length.",
    )


def _rates_table(found: Found) -> Table:
    rates = sorted({rate for told in found["tried"].values() for rate in told}, key=float)
    rows = tuple(
        (
            Cell(name),
            *(Cell(f"{100 * told[rate]:.1f} %") for rate in rates),
            Cell(f"{found['trials'][name]['learning_rate']:g}"),
        )
        for name, told in found["tried"].items()
    )
    return Table(
        "Learning rates on validation",
        ("trial", *rates, "taken"),
        rows,
        note=f"Accuracy with seed {found['seeds'][0]}: the best is taken, of equal ones the "
        "smallest rate; the rule is the same for every trial, and no test pair is looked at.",
    )


def _provenance(found: Found) -> Table:
    run = found["run"]
    rows = [("output dir", run["output_dir"]), ("device", run["device"]), *run["versions"].items()]
    return Table("Run", ("", "value"), tuple((Cell(str(k)), plain(v)) for k, v in rows))


def _mean(record: Found | None, form: str, *, interval: bool = True) -> Cell:
    if record is None or record["mean"] is None:
        return NOT_RUN
    if not interval or record["low"] is None:
        return Cell(form.format(record["mean"]))
    return Cell(
        form.format(record["mean"]),
        (f"{form.format(record['low'])} – {form.format(record['high'])}",),
    )


def _share(record: Found | None) -> Cell:
    if record is None or record["mean"] is None:
        return NOT_RUN
    if record["low"] is None:
        return Cell(f"{100 * record['mean']:.1f} %")
    low, high = max(0.0, record["low"]), min(1.0, record["high"])
    return Cell(f"{100 * record['mean']:.1f} %", (f"{100 * low:.1f} – {100 * high:.1f}",))


def _gra(trial: Found, against: str) -> Cell:
    cell, tied = (_share(at(trial, "figures", f"{kind}_{against}")) for kind in ("gra", "ties"))
    if cell.missing:
        return cell
    return Cell(cell.text, (*cell.details, f"{tied.text} ties"))


def _points(record: Found | None) -> Cell:
    if record is None or record["mean"] is None:
        return NOT_RUN
    if record["low"] is None:
        return Cell(f"{100 * record['mean']:+.1f}")
    low, high = 100 * record["low"], 100 * record["high"]
    return Cell(f"{100 * record['mean']:+.1f}", (f"{low:+.1f} – {high:+.1f}",))


def _smallest(record: Found | None) -> Cell:
    if record is None or record["smallest"] is None:
        return NOT_RUN
    return Cell(f"{100 * record['smallest']:.1f}")


def _cost(found: Found) -> Any:
    dots = [
        (hours["mean"], Dot(name, record["mean"], record["low"], record["high"]))
        for name, trial in found["trials"].items()
        for hours in [at(trial, "by_seed", "device_hours")]
        for record in [at(trial, "figures", "accuracy")]
        if hours is not None and record is not None and record["mean"] is not None
    ]
    plot = cost_plot(dots) if dots else None
    return plot and {"svg": Markup(plot.svg), "caption": plot.caption}


def _dots(found: Found, figure: str, words: str, against: bool = False) -> Any:
    """A dot a trial, or None where the figure was not had."""
    part = ("against", found["baseline"]) if against else ("figures",)
    dots = [
        Dot(name, record["mean"], record["low"], record["high"], tuple(record["values"]))
        for name, trial in found["trials"].items()
        for record in [at(trial, *part, figure)]
        if record is not None and record["mean"] is not None
    ]
    if not dots:
        return None
    plot = dots_plot(dots, words, f"{part[0]}-{figure}", middle=0.0 if against else 0.5)
    return {"svg": Markup(plot.svg), "caption": plot.caption}
