"""A run's metrics and a sample of its pairs in, one self-contained HTML page out, for any browser.

It opens offline and fetches nothing. Every text of the run is escaped by the template; only the
plots, which are made here and escape their own text, and the sample's JSON go in as they are. The
one script that may run is the explorer's, named by its hash.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cwpo_dist.report import annotator_plots, cells, explorer, outputs, plots, summary, verdict
from cwpo_dist.report.cells import Metrics, at
from cwpo_dist.report.drawing import Plot
from cwpo_dist.report.explorer import Sample
from cwpo_dist.report.judged_table import judged_tables
from cwpo_dist.report.left_out_table import left_out_tables
from cwpo_dist.report.outcomes import CHANCE, Verdict
from cwpo_dist.stage_order import LISTED

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
# What is drawn of each annotator.
_QUARTERS = "Accuracy by confidence"
_OF_ANNOTATOR = {
    _QUARTERS: annotator_plots.quarter_plot,
    "Reliability": annotator_plots.reliability_plot,
    "Margin against length": annotator_plots.length_plot,
}
Drawn = dict[str, str]  # a plot's SVG, and its caption
_SECTIONS = {
    "comparison": "Comparison",
    "data": "Data",
    "annotator": "Annotator",
    "weights": "Weights",
    "training": "Training",
    "evaluation": "Evaluation",
    "pairs": "Pairs",
    "cost": "Cost",
    "provenance": "Provenance",
}


def render(metrics: Metrics, sample: Sample | None = None, comparison: str | None = None) -> str:
    """The report of one run; parts that were not run say so.

    Args:
        metrics: the run's `metrics.json`.
        sample: the run's `explorer.json`; None: the page has no explorer, and no script.
        comparison: the page that this one belongs to, a file beside it.
    """
    annotators = summary.annotators(metrics)
    ensemble = summary.ensemble_table(metrics)
    first, others = verdict.of_arms(metrics)
    one = len(annotators) == 1
    quarters = drawn(annotator_plots.quarter_plot(annotators[0][1], "first")) if one else None
    template = TEMPLATES.get_template("page.html.j2")
    page = template.render(
        output_dir=at(metrics, "run", "output_dir") or "",
        seed=at(metrics, "run", "seed"),
        arms=[name for name, _ in cells.arm_items(metrics)],
        simulated=summary.SIMULATED if summary.is_simulated(metrics) else None,
        said=verdict.of_annotators(metrics),
        quarters=(_QUARTERS, quarters),
        verdicts=_differences(first),
        other_verdicts=_differences(others),
        chance=CHANCE,
        sections=[(k, v) for k, v in _SECTIONS.items() if sample or k != "pairs"],
        comparison=comparison,
        arms_table=cells.without_empty(summary.arms_table(metrics)),
        cost_plot=drawn(plots.arms_cost_plot(metrics)),
        gra_table=summary.gra_table(metrics),
        gra_plot=drawn(plots.gra_plot(metrics)),
        answer_tables=[*left_out_tables(metrics), *judged_tables(metrics)],
        weights_table=summary.weights_table(metrics),
        confidence_plots=_confidence_plots(metrics),
        several_runs=_several_runs(metrics),
        annotator_table=summary.annotator_table(metrics),
        one_annotator=len(annotators) <= 1 and ensemble is None,
        ensemble_table=ensemble,
        annotator_plots=_annotator_plots(metrics, annotators),
        curves=_curves(metrics),
        data_tables=outputs.data_tables(metrics),
        cost_table=outputs.cost_table(metrics),
        provenance_tables=[outputs.provenance_table(metrics), outputs.keys_table(metrics)],
        config=_yaml(at(metrics, "config")),
        explorer=_explorer(metrics, sample) if sample else None,
    )
    return page.encode("utf-8", "replace").decode()  # no page can hold a lone surrogate


def _curves(metrics: Metrics) -> list[tuple[str, Drawn | None]]:
    """(title, plot or None) of each training stage."""
    return [
        (stage.curve.title, drawn(plots.curve_plot(metrics, name, stage.curve)))
        for name, stage in LISTED.items()
        if stage.curve is not None
    ]


def _explorer(metrics: Metrics, sample: Sample) -> dict[str, object]:
    """What the template needs to lay out the explorer."""
    pairs, annotators = sample["pairs"], sample["annotators"]
    label = "the simulated label" if summary.is_simulated(metrics) else "the human label"
    shows = [("all", "all pairs")]
    if annotators:
        shows += [
            ("wrong", f"annotator against {label}"),
            ("right", f"annotator with {label}"),
        ]
    if len(annotators) > 1:
        shows.append(("split", "annotators against each other"))
    if any(at(pair, "answers") for pair in pairs):
        shows.append(("answers", "with the model's answers"))
    text, shown = explorer.embedded(sample)
    return {
        "label": label,
        "hash": explorer.hash_of(explorer.SCRIPT),
        "script": Markup(explorer.SCRIPT),  # noqa: S704 (a file of this package)
        "json": Markup(text),  # noqa: S704 (`embedded` spells out what ends a script)
        "shown": f"{shown:,}",
        "total": f"{sample['total']:,}",
        "shows": shows,
        "splits": [("", "all"), *((s, s) for s in sorted({at(pair, "split") for pair in pairs}))],
        "arms": [(arm, arm) for arm in sample["arms"]],
        "orders": [
            ("drawn", "as drawn"),
            ("sure", "most confident first"),
            ("unsure", "least confident first"),
            ("longest", "longest answer first"),
            ("difference", "largest difference in length first"),
        ],
    }


def _several_runs(metrics: Metrics) -> bool:
    return at(metrics, "prepared") is not None


def _differences(told: list[Verdict]) -> list[tuple[Verdict, Drawn | None]]:
    """Each with its plot."""
    return [(each, drawn(plots.dots_plot(each.dots, None, each.title))) for each in told]


def _annotator_plots(
    metrics: Metrics, annotators: list[tuple[str, Metrics]]
) -> list[tuple[str, Drawn | None]]:
    """(title, plot or None) in reading order; titles name the annotator where there are several.

    What stands on top already, of one alone, is left out.
    """
    if not annotators:
        return [(title, None) for title in _OF_ANNOTATOR]
    return [
        (f"{title} ({label})" if len(annotators) > 1 else title, drawn(plot(record, str(k))))
        for k, (label, record) in enumerate(annotators)
        for title, plot in _OF_ANNOTATOR.items()
        if len(annotators) > 1 or title != _QUARTERS
    ]


def _confidence_plots(metrics: Metrics) -> list[tuple[str, Drawn | None]]:
    """(title, plot) of each annotator, or none drawn."""
    found = at(metrics, "confidences") or []
    plots = [
        (
            f"Confidence ({cells.together(each['arms'])})" if len(found) > 1 else "Confidence",
            drawn(annotator_plots.confidence_plot(each["values"], str(k))),
        )
        for k, each in enumerate(found)
    ]
    return plots or [("Confidence", None)]


def drawn(plot: Plot | None) -> Drawn | None:
    """A plot as a template shows it."""
    if plot is None:
        return None
    return {"svg": Markup(plot.svg), "caption": plot.caption}  # noqa: S704 (matplotlib's)


def _yaml(config: object) -> str | None:
    if not config:
        return None
    return str(yaml.safe_dump(config, sort_keys=True, allow_unicode=True))
