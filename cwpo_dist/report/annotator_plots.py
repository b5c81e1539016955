"""Figures of an annotator in; plots of its confidence, calibration and leaning to length out."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from cwpo_dist.report.cells import Metrics, at, written
from cwpo_dist.report.drawing import (
    ACCENT,
    INK,
    MUTED,
    SECOND,
    STYLE,
    Plot,
    figure_of,
    intervals,
    percent_axis,
    svg_of,
    whiskers,
)
from cwpo_dist.report.figures import Bin, Stretch, Temperature


def confidence_plot(confidences: Sequence[float], salt: str) -> Plot:
    """Histogram of an annotator's confidences."""
    values = np.asarray(confidences, dtype=float)
    with mpl.rc_context(STYLE):
        figure, ax = figure_of()
        weights = np.full(len(values), 1 / len(values))
        ax.hist(
            values, bins=np.linspace(0, 1, 26).tolist(), weights=weights, color=ACCENT, rwidth=0.92
        )
        ax.axvline(values.mean(), color=INK, linewidth=1.2, linestyle=(0, (3, 3)))
        ax.annotate(
            f"mean {values.mean():.2f}",
            (values.mean(), 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -4),
            textcoords="offset points",
            va="top",
        )
        ax.set(xlabel="confidence C", ylabel="share of pairs", xlim=(0, 1))
        percent_axis(ax.yaxis)
        ax.grid(axis="x", visible=False)
        return Plot(
            svg_of(figure, f"confidence-{salt}"),
            f"C = tanh(margin / 2) of {len(values):,} annotated pairs.",
        )


def quarter_plot(record: Metrics, salt: str) -> Plot | None:
    """Accuracy of each quarter by confidence; None where there were too few pairs."""
    quarters = Bin.each(at(record, "by_quarter"))
    if not quarters:
        return None
    with mpl.rc_context(STYLE):
        figure, ax = figure_of()
        intervals(ax, quarters, horizontal=False)
        _level(ax, at(record, "agreement", "accuracy"), "all pairs", ACCENT)
        _level(ax, at(record, "length_baseline", "accuracy"), "longer answer wins", SECOND)
        labels = [f"{quarter.lower:.2f} – {quarter.upper:.2f}" for quarter in quarters]
        ax.set_xticks(range(len(quarters)), labels)
        ax.set(xlabel="confidence C, by quarter", ylabel="accuracy", xlim=(-0.5, 3.5))
        percent_axis(ax.yaxis)
        ax.grid(axis="x", visible=False)
        ax.legend(loc="upper left", bbox_to_anchor=(0, 1.18), ncols=2)
        sizes = ", ".join(f"{quarter.n:,}" for quarter in quarters)
        return Plot(
            svg_of(figure, f"quarters-{salt}"),
            f"Decided held-out pairs in four equal parts ({sizes}), with 95 % intervals.",
        )


def reliability_plot(record: Metrics, salt: str) -> Plot | None:
    """Accuracy against the probability claimed; None where nothing was decided."""
    bins = _filled(record)
    if not bins:
        return None
    after, words = at(record, "calibrated"), _calibration(record)
    with mpl.rc_context(STYLE):
        figure, ax = figure_of()
        ax.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        _bins(ax, bins, ACCENT, "as scored")
        if after is not None:
            _bins(ax, _filled(after), SECOND, "calibrated")
            ax.legend(loc="upper left")
        ax.set(xlabel="probability claimed, σ(|margin|)", ylabel="accuracy", xlim=(0.49, 1.01))
        for axis in (ax.xaxis, ax.yaxis):
            percent_axis(axis)
        return Plot(
            svg_of(figure, f"reliability-{salt}"),
            f"Ten bins of {sum(each.n for each in bins):,} decided held-out pairs; a dot's area is "
            "its share, whiskers are 95 % intervals, the dashed line is perfect calibration. "
            f"{words} Below the line: overconfident.",
        )


def _filled(record: Metrics) -> list[Bin]:
    """The bins of a reliability diagram that hold pairs."""
    return [each for each in Bin.each(at(record, "reliability")) if each.n]


def _calibration(record: Metrics) -> str:
    """The calibration error in words; it is a number wherever a bin has pairs."""
    error, left = (
        at(each, "expected_calibration_error") for each in (record, at(record, "calibrated"))
    )
    fitted = Temperature.of(at(record, "temperature"))
    if left is None or fitted is None:
        return f"ECE {100 * error:.1f} %."
    return (
        f"ECE {100 * error:.1f} % as scored, {100 * left:.1f} % with margins divided by "
        f"{fitted.value:.2f}, a temperature fitted to {fitted.n:,} pairs of another split."
    )


def length_plot(record: Metrics, salt: str) -> Plot | None:
    """Margin against length difference; None where there were too few pairs."""
    stretches = Stretch.each(at(record, "margin_by_length"))
    if not stretches:
        return None
    with mpl.rc_context(STYLE):
        figure, ax = figure_of()
        lengths = [each.length for each in stretches]
        whiskers(ax, lengths, stretches, horizontal=False)
        ax.scatter(lengths, [each.median for each in stretches], s=45, color=ACCENT, zorder=3)
        for draw in (ax.axhline, ax.axvline):
            draw(0, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        ax.set(xlabel="length difference a − b, characters", ylabel="margin a − b")
        found = at(record, "margin_length", "pearson")
        words = "" if found is None else f" Correlation over all pairs: {written(found, '+.2f')}."
        return Plot(
            svg_of(figure, f"length-{salt}"),
            "Median margin, with its 10–90 % range, of held-out pairs in ten equal parts by "
            f"length difference.{words} A slope says that length is part of the score.",
        )


def _bins(ax: Axes, bins: Sequence[Bin], colour: str, label: str) -> None:
    """A dot a bin of a reliability diagram, its area the bin's share."""
    total, means = sum(each.n for each in bins), np.array([each.mean for each in bins], float)
    whiskers(ax, means, bins, horizontal=False, colour=colour)
    sizes = [30 + 400 * each.n / total for each in bins]
    shares = np.array([each.accuracy for each in bins], dtype=float)
    ax.scatter(means, shares, s=sizes, color=colour, zorder=3, alpha=0.75, linewidth=0)
    ax.scatter([], [], s=45, color=colour, linewidth=0, label=label)  # one size in the legend


def _level(ax: Axes, value: float | None, label: str, colour: str) -> None:
    if value is not None:
        ax.axhline(value, color=colour, linewidth=1.2, linestyle=(0, (4, 3)), label=label)
