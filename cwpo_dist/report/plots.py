"""Figures of a run, or of several, in; plots as inline SVG out: no scripts, no fonts, no links."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cwpo_dist.report.cells import Metrics, arm_items, at
from cwpo_dist.report.drawing import (
    ACCENT,
    MUTED,
    SECOND,
    SERIES,
    STYLE,
    WIDTH,
    Plot,
    figure_of,
    intervals,
    legend_below,
    named_rows,
    percent_axis,
    points_axis,
    short_name,
    svg_of,
    whiskers,
)
from cwpo_dist.report.figures import Mean, Share
from cwpo_dist.report.outputs import numbered, shared_outputs
from cwpo_dist.report.summary import COMPARISONS
from cwpo_dist.stage_order import Curve

_LONGEST_CURVE = 500  # points; longer curves are averaged in equal stretches
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
            found = [Share.of(at(metrics, "arms", name, "gra", key)) for name in names]
            intervals(ax, found, horizontal=True)
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


def curve_plot(metrics: Metrics, stage: str, shown: Curve) -> Plot | None:
    """Training loss of a stage by step, one line an output; None where none was trained."""
    curves = list(_curves(metrics, stage))
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
        if shown.level is not None:
            ax.axhline(shown.level, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        ax.set(xlabel="step", ylabel="loss")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(curves) > 1 or curves[0][0] != "all arms":
            legend_below(figure, ax)
        return Plot(svg_of(figure, f"curve-{stage}"), shown.caption)


def _curves(metrics: Metrics, stage: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Of each output of a stage its name, its steps and their losses."""
    roles = numbered(metrics, stage, "curves")
    for role in roles:
        for output in shared_outputs(metrics, role, having="curves"):
            steps, losses = _points(at(metrics, "arms", output.arms[0], "curves", role))
            if len(steps):
                yield short_name(output.label if len(roles) == 1 else role), steps, losses


def _points(points: Sequence[Metrics]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite losses, averaged in equal stretches where there are too many to draw."""
    found = [(at(point, "step"), at(point, "loss")) for point in points]
    known = [(step, loss) for step, loss in found if loss is not None and math.isfinite(loss)]
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
            _dot(ax, place, dot)
        named_rows(ax, [dot.name for dot in dots])
        middle, line = (0.0, "no difference") if words is None else (0.5, "one half")
        ax.axvline(middle, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        ax.set_xlabel(words or "difference, percentage points")
        (percent_axis if words else points_axis)(ax.xaxis)
        several = any(len(dot.seeds) > 1 for dot in dots)
        means = "Means over seeds (small: each seed), with" if several else "With"
        caption = f"{means} 95 % intervals. Dashed: {line}."
        return Plot(svg_of(figure, salt), caption)


def _dot(ax: Axes, place: int, dot: Dot) -> None:
    """A mean with its whiskers, and each seed's value a little below."""
    if dot.low is not None and dot.high is not None:
        ax.hlines(place, dot.low, dot.high, color=ACCENT, linewidth=1.6, alpha=0.6)
    ax.scatter(dot.value, place, s=55, color=ACCENT, zorder=3, linewidth=0)
    if len(dot.seeds) > 1:
        below = [place + 0.22] * len(dot.seeds)
        ax.scatter(dot.seeds, below, s=12, color=SECOND, linewidth=0)


def arms_cost_plot(metrics: Metrics) -> Plot | None:
    """Preference accuracy of each arm against its device-hours; None where one was not had."""
    found = [
        # fsum: the same in whatever order a file has the stages
        (math.fsum(hours.values()), Dot(name, right.accuracy, right.low, right.high))
        for name, arm in arm_items(metrics)
        for hours, right in [(at(arm, "device_hours"), Share.of(at(arm, "policy", "agreement")))]
        if hours and right is not None and right.accuracy is not None
    ]
    return cost_plot(found) if found else None


def asked_plot(rows: Sequence[Metrics]) -> Plot | None:
    """Annotators' accuracy by the labels that strategies asked for; None where none was compared.

    Args:
        rows: of the comparison; the first of no label that was asked for, where all lines begin.
    """
    if not rows:
        return None
    with mpl.rc_context(STYLE):
        figure, ax = figure_of()
        for k, strategy in enumerate(dict.fromkeys(row["strategy"] for row in rows[1:])):
            of = [rows[0], *(row for row in rows[1:] if row["strategy"] == strategy)]
            places, means = _by_labels(of)
            colour, marker = SERIES[k % len(SERIES)], "osD^"[k % 4]
            ax.plot(places, [m.mean for m in means], color=colour, marker=marker, label=strategy)
            whiskers(ax, places, means, horizontal=False, colour=colour)
        ax.set(xlabel="labels", ylabel="accuracy")
        percent_axis(ax.yaxis)
        legend_below(figure, ax)
        return Plot(
            svg_of(figure, "asked"),
            "Means over seeds, with 95 % intervals. All lines begin with the labelled part.",
        )


def _by_labels(rows: Sequence[Metrics]) -> tuple[list[float], list[Mean]]:
    """How many labels were given, from few to many, and the accuracies that came of them."""
    found = [(row["labels"], m.cut(0, 1)) for row in rows if (m := Mean.of(row["accuracy"]))]
    found.sort(key=lambda each: each[0])
    return [labels for labels, _ in found], [mean for _, mean in found]


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
