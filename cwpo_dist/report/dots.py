"""Figures with their intervals in; plots of them by trial, or against what they cost, out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure

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
    percent_axis,
    short_name,
    svg_of,
)


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


def dots_plot(dots: Sequence[Dot], words: str, salt: str, *, middle: float) -> Plot:
    """One row a dot, with 95 % whiskers and a dashed line at `middle`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2 * WIDTH, 0.9 + 0.34 * len(dots)), layout="constrained")
        ax = figure.subplots()
        for place, dot in enumerate(dots):
            if dot.low is not None and dot.high is not None:
                ax.hlines(place, dot.low, dot.high, color=ACCENT, linewidth=1.6, alpha=0.6)
            ax.scatter(dot.value, place, s=55, color=ACCENT, zorder=3, linewidth=0)
            if len(dot.seeds) > 1:
                ax.scatter(
                    dot.seeds, [place + 0.22] * len(dot.seeds), s=12, color=SECOND, linewidth=0
                )
        ax.axvline(middle, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        ax.set(xlabel=words, ylim=(len(dots) - 0.5, -0.5))
        ax.set_yticks(range(len(dots)), [short_name(dot.name) for dot in dots])
        percent_axis(ax.xaxis)
        ax.grid(axis="y", visible=False)
        line = "no difference" if middle == 0 else "one half"
        small = " Small: each seed." if any(len(dot.seeds) > 1 for dot in dots) else ""
        caption = f"Means over seeds with 95 % intervals.{small} Dashed: {line}."
        return Plot(svg_of(figure, salt), caption)


def arms_cost_plot(metrics: Metrics) -> Plot | None:
    """Preference accuracy of each arm against its device-hours; None where one was not had."""
    found = [
        (sum(hours.values()), Dot(name, record["accuracy"], record["low"], record["high"]))
        for name, arm in arm_items(metrics)
        for hours, record in [(at(arm, "device_hours"), at(arm, "policy", "agreement"))]
        if hours and record is not None and record["accuracy"] is not None
    ]
    return cost_plot(found) if found else None


def cost_plot(found: Sequence[tuple[float, Dot]]) -> Plot:
    """Accuracies against device-hours."""
    with mpl.rc_context(STYLE):
        figure, ax = figure_of(wide=True)
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
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return Plot(
            svg_of(figure, "cost"),
            "Accuracy of the policy's implicit reward, with 95 % intervals, against the "
            "device-hours of every stage that the arm needs; what arms share counts for each. "
            "Dashed: a coin. Devices are GPUs, or CPUs where there are none.",
        )
