"""What all plots share: one style, colours that the page's stylesheet sets, and inline SVG.

Colours are written as placeholders and then become CSS variables, so that the page's stylesheet
colours the plots, in light and in dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import ArrayLike

from cwpo_dist.report.cells import written
from cwpo_dist.report.figures import Interval, Share

INK, MUTED, GRID, ACCENT, SECOND = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05"
SERIES = tuple(f"#0a0c{k:02x}" for k in range(8))
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
    **{colour: f"var(--series-{k})" for k, colour in enumerate(SERIES)},
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: readable, searchable, in the page's own font
    "text.parse_math": False,  # names come from users: a $ is a $
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
WIDTH, HEIGHT = 5.0, 3.1  # inches: as wide as a narrow screen, where letters keep their size
_LONGEST_NAME = 56  # letters, in a row of their own
_IN_TWO_COLUMNS = 20  # letters of a legend's names


@dataclass(frozen=True)
class Plot:
    """An SVG element, and in words what it shows."""

    svg: str
    caption: str


def figure_of(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of one plot."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def legend_below(figure: Figure, ax: Axes) -> None:
    """A legend under the plot, whose figure grows by it."""
    handles, names = ax.get_legend_handles_labels()
    columns = 2 if max(map(len, names), default=0) <= _IN_TWO_COLUMNS else 1
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(names) / columns))
    figure.legend(handles, names, loc="outside lower left", ncols=columns)


def named_rows(ax: Axes, names: Sequence[str]) -> None:
    """Rows 0, 1, 2, … from the top, each with its name above it, so that lines have all width."""
    ax.set(ylim=(len(names) - 0.5, -0.75), yticks=[])
    ax.spines["left"].set_visible(False)
    for row, name in enumerate(names):
        ax.annotate(
            short_name(name),
            (0, row),
            xycoords=("axes fraction", "data"),
            xytext=(0, 6),
            textcoords="offset points",
        )


def percent_axis(axis: Axis) -> None:
    """Labels of an axis of shares, in per cent."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))


def points_axis(axis: Axis) -> None:
    """Labels of an axis of differences between shares, in percentage points."""
    form = FuncFormatter(lambda value, _: written(float(f"{100 * value:.3g}"), "+g"))
    axis.set_major_formatter(form)


def short_name(name: str) -> str:
    """A name that leaves room for the plot."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def svg_of(figure: Figure, salt: str) -> str:
    """The figure as one <svg> element whose ids are its own and whose bytes repeat."""
    figure.patch.set_visible(False)
    for ax in figure.axes:
        ax.patch.set_visible(False)
    buffer = io.StringIO()
    # The salt keeps ids of clip paths apart when several plots stand in one page.
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # Element ids such as "figure_1" would repeat from plot to plot; nothing refers to them.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    return text.strip()


def intervals(ax: Axes, found: Sequence[Share | None], *, horizontal: bool) -> None:
    """Dots with 95 % whiskers at 0, 1, 2, …; a record without figures leaves its place empty."""
    known = {k: share for k, share in enumerate(found) if share and share.accuracy is not None}
    places, shares = list(known), list(known.values())
    whiskers(ax, places, shares, horizontal=horizontal)
    halved = [share.accuracy_ties_halved for share in shares]
    if halved and None not in halved:
        points = np.array(halved, dtype=float)
        ax.scatter(points, places, s=40, facecolor="none", edgecolor=ACCENT, zorder=3)
    values = np.array([share.accuracy for share in shares], dtype=float)
    x, y = (values, places) if horizontal else (places, values)
    ax.scatter(x, y, s=55, color=ACCENT, zorder=4, linewidth=0)


def whiskers(
    ax: Axes,
    places: ArrayLike,
    found: Sequence[Interval],
    *,
    horizontal: bool,
    colour: str = ACCENT,
) -> None:
    """A line from low to high at each place."""
    draw = ax.hlines if horizontal else ax.vlines
    ends = np.array([(each.low, each.high) for each in found], dtype=float).reshape(-1, 2)
    draw(places, ends[:, 0], ends[:, 1], color=colour, linewidth=1.6, alpha=0.6, zorder=2)
