"""Figures of a run, or of several, in; plots as inline SVG out: no scripts, no fonts, no links."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cwpo_dist.report.cells import Metrics, arm_items, at, written
from cwpo_dist.report.drawing import (
    ACCENT,
    INK,
    MUTED,
    SECOND,
    SERIES,
    STYLE,
    WIDTH,
    Plot,
    figure_of,
    legend_below,
    named_rows,
    percent_axis,
    points_axis,
    short_name,
    svg_of,
)
from cwpo_dist.report.outputs import numbered, shared_outputs
from cwpo_dist.report.summary import COMPARISONS

_LONGEST_CURVE = 500  # points; longer curves are averaged in equal stretches
# What the curve of each stage shows.
_CURVES = {
    "fit": "Bradley–Terry loss of the annotator. Dashed: ln 2, a coin.",
    "sft": "Negative log-likelihood of the chosen answers, per answer token.",
    "align": "Weighted preference loss. Arms of different weights or normalisation start at "
    "different levels: read each line for its shape, and compare arms by held-out figures.",
}
_ROW = 0.46  # inches: a name, and under it its line
_WINDOW = 21  # stretches of the running mean


@dataclass(frozen=True)
class Dot:
    """A figure with its interval; without one where `low` is None.

    Attributes:
        name: of the trial or arm.
        value: its mean.
        low: lower end.
        high: upper end.
        seeds: the value of each seed, where it is a mean over several.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    seeds: tuple[float, ...] = ()


def gra_plot(metrics: Metrics) -> Plot | None:
    """GRA of each arm with its interval, one panel a comparison; None where none was run."""
    names = [name for name, arm in arm_items(metrics) if at(arm, "gra")]
    if not names:
        return None
    with mpl.rc_context(STYLE):
        height = 0.9 + _ROW * len(names)
        figure = Figure(figsize=(WIDTH, 2 * height), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True)
        for ax, (key, words) in zip(axes, COMPARISONS.items(), strict=True):
            found = [at(metrics, "arms", name, "gra", key) for name in names]
            _intervals(ax, found, horizontal=True)
            ax.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
            ax.set_title(f"against {words}", loc="left")
            percent_axis(ax.xaxis)
            ax.tick_params(labelbottom=True)
            named_rows(ax, names)
        return Plot(
            svg_of(figure, "gra"),
            "Share of prompts won, ties counted as losses, with 95 % intervals. Hollow: with "
            "ties halved. Dashed: one half.",
        )


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


def quarter_plot(record: Mapping[str, Any], salt: str) -> Plot | None:
    """Accuracy of each quarter by confidence; None where there were too few pairs."""
    quarters = record.get("by_quarter")
    if not quarters:
        return None
    with mpl.rc_context(STYLE):
        figure, ax = figure_of()
        _intervals(ax, quarters, horizontal=False)
        _level(ax, at(record, "agreement", "accuracy"), "all pairs", ACCENT)
        _level(ax, at(record, "length_baseline", "accuracy"), "longer answer wins", SECOND)
        labels = [f"{q['lower']:.2f} – {q['upper']:.2f}" for q in quarters]
        ax.set_xticks(range(len(quarters)), labels)
        ax.set(xlabel="confidence C, by quarter", ylabel="accuracy", xlim=(-0.5, 3.5))
        percent_axis(ax.yaxis)
        ax.grid(axis="x", visible=False)
        ax.legend(loc="upper left", bbox_to_anchor=(0, 1.18), ncols=2)
        sizes = ", ".join(f"{q['n']:,}" for q in quarters)
        return Plot(
            svg_of(figure, f"quarters-{salt}"),
            f"Decided held-out pairs in four equal parts ({sizes}), with 95 % intervals.",
        )


def reliability_plot(record: Mapping[str, Any], salt: str) -> Plot | None:
    """Accuracy against the probability claimed; None where nothing was decided."""
    bins = [b for b in record.get("reliability") or [] if b["n"]]
    if not bins:
        return None
    total, after = sum(b["n"] for b in bins), record.get("calibrated")
    with mpl.rc_context(STYLE):
        figure, ax = figure_of()
        ax.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        _bins(ax, bins, ACCENT, "as scored")
        if after is not None:
            _bins(ax, [b for b in after["reliability"] if b["n"]], SECOND, "calibrated")
            ax.legend(loc="upper left")
        ax.set(xlabel="probability claimed, σ(|margin|)", ylabel="accuracy", xlim=(0.49, 1.01))
        for axis in (ax.xaxis, ax.yaxis):
            percent_axis(axis)
        error = record["expected_calibration_error"]  # a number wherever a bin has pairs
        words = f"ECE {100 * error:.1f} %."
        if after is not None:
            fitted, left = record["temperature"], after["expected_calibration_error"]
            words = (
                f"ECE {100 * error:.1f} % as scored, {100 * left:.1f} % with margins divided by "
                f"{fitted['value']:.2f}, a temperature fitted to "
                f"{fitted['n']:,} pairs of another split."
            )
        return Plot(
            svg_of(figure, f"reliability-{salt}"),
            f"Ten bins of {total:,} decided held-out pairs; a dot's area is its share, whiskers "
            f"are 95 % intervals, the dashed line is perfect calibration. {words}"
            " Below the line: overconfident.",
        )


def length_plot(record: Mapping[str, Any], salt: str) -> Plot | None:
    """Margin against length difference; None where there were too few pairs."""
    parts = record.get("margin_by_length")
    if not parts:
        return None
    with mpl.rc_context(STYLE):
        figure, ax = figure_of()
        lengths = [part["length"] for part in parts]
        _whiskers(ax, lengths, parts, horizontal=False)
        ax.scatter(lengths, [part["median"] for part in parts], s=45, color=ACCENT, zorder=3)
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


def curve_plot(metrics: Metrics, stage: str) -> Plot | None:
    """Training loss of a stage by step, one line an output; None where none was trained."""
    curves = []
    roles = numbered(metrics, stage, "curves")
    for role in roles:
        for output in shared_outputs(metrics, role, having="curves"):
            steps, losses = _points(at(metrics, "arms", output.arms[0], "curves", role))
            if len(steps):
                label = output.label if len(roles) == 1 else role
                curves.append((short_name(label), steps, losses))
    if not curves:
        return None
    with mpl.rc_context(STYLE):
        figure, ax = figure_of()
        for k, (label, steps, losses) in enumerate(curves):
            colour = SERIES[k % len(SERIES)]
            dash = "-" if k < len(SERIES) else "--"
            smooth = _running_mean(losses)
            ax.plot(steps, losses, color=colour, linewidth=0.8, alpha=0.3)
            ax.plot(steps, smooth, dash, color=colour, label=label, marker=_marker(steps), ms=4)
        if stage == "fit":
            ax.axhline(math.log(2), color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        ax.set(xlabel="step", ylabel="loss")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(curves) > 1 or curves[0][0] != "all arms":
            legend_below(figure, ax)
        return Plot(svg_of(figure, f"curve-{stage}"), _CURVES[stage])


def _intervals(ax: Axes, found: Sequence[Mapping[str, Any] | None], *, horizontal: bool) -> None:
    """Dots with 95 % whiskers at 0, 1, 2, …; a record without figures leaves its place empty."""
    known = [(k, r) for k, r in enumerate(found) if r is not None and r["accuracy"] is not None]
    places = [k for k, _ in known]
    records = [r for _, r in known]
    shares = [r["accuracy"] for r in records]
    halved = [r["accuracy_ties_halved"] for r in records if "accuracy_ties_halved" in r]
    _whiskers(ax, places, records, horizontal=horizontal)
    if halved:
        ax.scatter(halved, places, s=40, facecolor="none", edgecolor=ACCENT, zorder=3)
    x, y = (shares, places) if horizontal else (places, shares)
    ax.scatter(x, y, s=55, color=ACCENT, zorder=4, linewidth=0)


def _bins(ax: Axes, bins: Sequence[Mapping[str, Any]], colour: str, label: str) -> None:
    """A dot a bin of a reliability diagram, its area the bin's share."""
    total, means = sum(b["n"] for b in bins), [b["mean"] for b in bins]
    _whiskers(ax, means, bins, horizontal=False, colour=colour)
    sizes = [30 + 400 * b["n"] / total for b in bins]
    shares = [b["accuracy"] for b in bins]
    ax.scatter(means, shares, s=sizes, color=colour, zorder=3, alpha=0.75, linewidth=0)
    ax.scatter([], [], s=45, color=colour, linewidth=0, label=label)  # one size in the legend


def _whiskers(
    ax: Axes,
    places: Sequence[float],
    records: Sequence[Mapping[str, Any]],
    *,
    horizontal: bool,
    colour: str = ACCENT,
) -> None:
    draw = ax.hlines if horizontal else ax.vlines
    lows, highs = [r["low"] for r in records], [r["high"] for r in records]
    draw(places, lows, highs, color=colour, linewidth=1.6, alpha=0.6, zorder=2)


def _level(ax: Axes, value: float | None, label: str, colour: str) -> None:
    if value is not None:
        ax.axhline(value, color=colour, linewidth=1.2, linestyle=(0, (4, 3)), label=label)


def _points(points: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite losses, averaged in equal stretches where there are too many to draw."""
    known = [
        (p["step"], p["loss"])
        for p in points
        if p.get("loss") is not None and math.isfinite(p["loss"])
    ]
    if not known:
        return np.empty(0), np.empty(0)
    stretch = math.ceil(len(known) / _LONGEST_CURVE)
    array = np.asarray(known, dtype=float)
    means = np.array([array[i : i + stretch].mean(axis=0) for i in range(0, len(known), stretch)])
    return means[:, 0], means[:, 1]


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window that shrinks at both ends."""
    half = min(_WINDOW, len(values) // 8) // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _marker(steps: np.ndarray) -> str | None:
    return "o" if len(steps) < 3 else None


def dots_plot(dots: Sequence[Dot], words: str | None, salt: str) -> Plot:
    """One row a dot, with 95 % whiskers.

    Args:
        dots: shares, or differences between shares.
        words: what the shares are of, with a dashed line at one half; None: differences, at zero.
        salt: what tells the plot from others of its page.
    """
    with mpl.rc_context(STYLE):
        figure, ax = figure_of(0.9 + _ROW * len(dots))
        for place, dot in enumerate(dots):
            if dot.low is not None and dot.high is not None:
                ax.hlines(place, dot.low, dot.high, color=ACCENT, linewidth=1.6, alpha=0.6)
            ax.scatter(dot.value, place, s=55, color=ACCENT, zorder=3, linewidth=0)
            if len(dot.seeds) > 1:
                ax.scatter(
                    dot.seeds, [place + 0.22] * len(dot.seeds), s=12, color=SECOND, linewidth=0
                )
        named_rows(ax, [dot.name for dot in dots])
        middle, line = (0.0, "no difference") if words is None else (0.5, "one half")
        ax.axvline(middle, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        ax.set_xlabel(words or "difference, percentage points")
        (percent_axis if words else points_axis)(ax.xaxis)
        small = " Small: each seed." if any(len(dot.seeds) > 1 for dot in dots) else ""
        caption = f"Means over seeds with 95 % intervals.{small} Dashed: {line}."
        return Plot(svg_of(figure, salt), caption)


def arms_cost_plot(metrics: Metrics) -> Plot | None:
    """Preference accuracy of each arm against its device-hours; None where one was not had."""
    found = [
        # fsum: the same in whatever order a file has the stages
        (math.fsum(hours.values()), Dot(name, record["accuracy"], record["low"], record["high"]))
        for name, arm in arm_items(metrics)
        for hours, record in [(at(arm, "device_hours"), at(arm, "policy", "agreement"))]
        if hours and record is not None and record["accuracy"] is not None
    ]
    return cost_plot(found) if found else None


def cost_plot(found: Sequence[tuple[float, Dot]]) -> Plot:
    """Accuracies against device-hours."""
    with mpl.rc_context(STYLE):
        figure, ax = figure_of()
        for k, (hours, dot) in enumerate(found):
            colour, marker = SERIES[k % len(SERIES)], "osD^vP"[k // len(SERIES) % 6]
            if dot.low is not None and dot.high is not None:
                ax.vlines(hours, dot.low, dot.high, color=colour, linewidth=1.6, alpha=0.6)
            drawn = ax.scatter(hours, dot.value, s=60, color=colour, marker=marker)
            drawn.set(label=short_name(dot.name), zorder=3, linewidth=0)
        ax.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        ax.set(xlabel="device-hours of the whole arm", ylabel="accuracy")
        ax.set_xlim(left=0)
        percent_axis(ax.yaxis)
        legend_below(figure, ax)
        return Plot(
            svg_of(figure, "cost"),
            "Accuracy of the policy's implicit reward, with 95 % intervals, against the "
            "device-hours of every stage that the arm needs; what arms share counts for each. "
            "Dashed: a coin. Devices are GPUs, or CPUs where there are none.",
        )
