"""The figures of several trials and seeds in; their tables on the terminal and their page out."""

from __future__ import annotations

import yaml
from rich.console import Console
from rich.text import Text

from cwpo_dist.config import ARMS
from cwpo_dist.report.arms_in_words import NOTE, in_words
from cwpo_dist.report.cells import Cell, Table, at, plain
from cwpo_dist.report.figures import Mean
from cwpo_dist.report.outcomes import CHANCE, Found, dot, verdicts
from cwpo_dist.report.page import TEMPLATES, Drawn, drawn
from cwpo_dist.report.plots import asked_plot, cost_plot, dots_plot
from cwpo_dist.report.summary import SIMULATED, is_simulated
from cwpo_dist.report.table import print_table
from cwpo_dist.report.trial_tables import seeds_note, tables

FIGURES, PAGE = "comparison.json", "comparison.html"  # of a run directory
_SECTIONS = {
    "verdicts": "What came out",
    "arms": "Arms",
    "figures": "Figures",
    "plots": "Plots",
    "single": "Single runs",
    "provenance": "Provenance",
}


def print_comparison(found: Found, console: Console | None = None) -> None:
    """Prints every table, and last what came out."""
    console = console or Console()
    for table in tables(found):
        print_table(table, console, simulated=is_simulated(found))
    for verdict in verdicts(found):
        console.print(Text(f"\n{verdict.title}", style="bold"))
        for line in verdict.lines:
            console.print(Text(line))
    if verdicts(found):
        console.print(Text(CHANCE, style="dim"))


def render_comparison(found: Found) -> str:
    """The page: it opens offline and runs no script."""
    asked = at(found, "asked") or []
    curve = asked_plot(asked)
    plots = [
        ("Held-out preference accuracy", _dots(found, "accuracy", "accuracy")),
        ("Gold reward accuracy against the common reference", _dots(found, "gra_common", "GRA")),
        ("Accuracy against cost", _cost(found)),
        ("Annotators by labels asked for", curve and drawn(curve)),
    ]
    told = [
        (verdict, drawn(dots_plot(verdict.dots, None, f"verdict-{k}")))
        for k, verdict in enumerate(verdicts(found))
    ]
    parts = {
        "verdicts": told,
        "arms": _arms(found),
        "figures": tables(found),
        "plots": [(title, plot) for title, plot in plots if plot is not None],
        "single": at(found, "single_runs"),
        "provenance": _provenance(found),
    }
    page = TEMPLATES.get_template("comparison.html.j2").render(
        output_dir=found["run"]["output_dir"],
        seeds=found["seeds"],
        n_trials=len(found["trials"]) + len(asked[1:]),
        simulated=SIMULATED if is_simulated(found) else None,
        sections=[(k, title) for k, title in _SECTIONS.items() if parts[k]],
        **parts,
        chance=CHANCE,
        arms_note=NOTE,
        overridden=_overridden(found),
        config=yaml.safe_dump(found["config"], sort_keys=False, allow_unicode=True),
        footer=seeds_note(found),
    )
    return page.encode("utf-8", "replace").decode()  # no page can hold a lone surrogate


def _arms(found: Found) -> dict[str, str]:
    """What each arm is, once however many trials it has."""
    arms = [at(trial, "arm") for trial in found["trials"].values()]
    return {arm: in_words(arm) for arm in dict.fromkeys(arms) if arm in ARMS}


def _overridden(found: Found) -> list[str]:
    """What the configuration sets over the arms' presets."""
    weigh = at(found, "config", "weigh") or {}
    keys = ("weight_function", "top_fraction", "min_confidence", "temperature")
    named = ["weigh.from"] if weigh.get("from", "annotator") != "annotator" else []
    named += ["weigh.pairing"] if weigh.get("pairing", "given") != "given" else []
    named += [f"weigh.{key}" for key in keys if weigh.get(key) is not None]
    normalised = at(found, "config", "align", "weight_normalization") is not None
    return [*named, *(["align.weight_normalization"] if normalised else [])]


def _provenance(found: Found) -> Table:
    run = found["run"]
    rows = [("output dir", run["output_dir"]), ("made", at(run, "made")), ("device", run["device"])]
    rows = [(name, value) for name, value in [*rows, *run["versions"].items()] if value is not None]
    return Table("Run", ("", "value"), tuple((Cell(str(k)), plain(v)) for k, v in rows))


def _cost(found: Found) -> Drawn | None:
    dots = [
        (at(trial, "by_seed", "device_hours", "mean"), dot(name, mean.cut(0, 1)))
        for name, trial in found["trials"].items()
        for mean in [Mean.of(at(trial, "figures", "accuracy"))]
        if at(trial, "by_seed", "device_hours") is not None and mean is not None
    ]
    return drawn(cost_plot(dots)) if dots else None


def _dots(found: Found, figure: str, words: str) -> Drawn | None:
    """A dot a trial, or None where the figure was not had."""
    dots = [
        dot(name, mean.cut(0, 1))
        for name, trial in found["trials"].items()
        for mean in [Mean.of(at(trial, "figures", figure))]
        if mean is not None
    ]
    return drawn(dots_plot(dots, words, figure)) if dots else None
