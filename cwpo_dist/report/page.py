"""A run's metrics in, one self-contained HTML page out: it opens offline and runs no script.

Every text of the run is escaped by the template; only the plots, which are made here and escape
their own text, go in as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cwpo_dist.report import cells, outputs, plots, summary
from cwpo_dist.report.cells import Metrics, at
from cwpo_dist.report.plots import Plot

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_CURVES = {
    "fit": "Annotator (fit)",
    "sft": "Supervised fine-tuning (sft)",
    "align": "Preference optimisation (align)",
}


def render(metrics: Metrics) -> str:
    """The report of one run; parts that were not run say so."""
    annotators = summary.annotators(metrics)
    ensemble = summary.ensemble_table(metrics)
    template = _TEMPLATES.get_template("page.html.j2")
    return template.render(
        output_dir=at(metrics, "run", "output_dir") or "",
        seed=at(metrics, "run", "seed"),
        arms=[name for name, _ in cells.arm_items(metrics)],
        simulated=summary.SIMULATED if summary.is_simulated(metrics) else None,
        tiles=_tiles(metrics),
        arms_table=summary.arms_table(metrics),
        gra_table=summary.gra_table(metrics),
        gra_plot=_drawn(plots.gra_plot(metrics)),
        annotator_table=summary.annotator_table(metrics),
        one_annotator=len(annotators) <= 1 and ensemble is None,
        ensemble_table=ensemble,
        annotator_plots=_annotator_plots(metrics, annotators),
        curves=[
            (title, _drawn(plots.curve_plot(metrics, stage)), stage == "align")
            for stage, title in _CURVES.items()
        ],
        data_tables=[
            outputs.prepare_table(metrics),
            outputs.splits_table(metrics),
            outputs.rejects_table(metrics),
        ],
        cost_table=outputs.cost_table(metrics),
        provenance_tables=[outputs.provenance_table(metrics), outputs.keys_table(metrics)],
        config=_yaml(at(metrics, "config")),
    )


def _tiles(metrics: Metrics) -> list[tuple[str, cells.Cell]]:
    """The few figures that a reader looks for first."""
    found = summary.annotators(metrics)
    record = found[0][1] if len(found) == 1 else None
    tiles = [("pairs prepared", cells.count(at(metrics, "prepare", "pairs")))]
    if len(found) > 1:  # one number would hide which annotator it is
        return tiles
    return [
        *tiles,
        ("annotator accuracy", cells.share(at(record, "agreement"))),
        ("longer answer wins", cells.share(at(record, "length_baseline"))),
        ("calibration error", cells.percent(record, "expected_calibration_error")),
        ("mean confidence", cells.inner(record, "mean_confidence")),
    ]


def _annotator_plots(
    metrics: Metrics, annotators: list[tuple[str, Metrics]]
) -> list[tuple[str, Any]]:
    """(title, plot or None) in reading order; titles name the annotator where there are several."""
    named: list[tuple[str, Plot | None]] = [("Confidence", plots.confidence_plot(metrics))]
    for k, (label, record) in enumerate(annotators):
        suffix = f" ({label})" if len(annotators) > 1 else ""
        named.append((f"Accuracy by confidence{suffix}", plots.quarter_plot(record, str(k))))
        named.append((f"Reliability{suffix}", plots.reliability_plot(record, str(k))))
        named.append((f"Margin against length{suffix}", plots.length_plot(record, str(k))))
    if not annotators:
        names = ("Accuracy by confidence", "Reliability", "Margin against length")
        named += [(name, None) for name in names]
    return [(title, _drawn(plot)) for title, plot in named]


def _drawn(plot: Plot | None) -> dict[str, Any] | None:
    if plot is None:
        return None
    return {"svg": Markup(plot.svg), "caption": plot.caption}


def _yaml(config: Any) -> str | None:
    if not config:
        return None
    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
