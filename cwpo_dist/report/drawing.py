"""What all plots share: one style, colours that the page's stylesheet sets, and inline SVG.

Colours are written as placeholders and then become CSS variables, so that the page's stylesheet
colours the plots, in light and in dark.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

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
WIDTH, HEIGHT = 5.0, 3.1  # inches; a wide plot has twice the width
_LONGEST_NAME = 28  # letters


@dataclass(frozen=True)
class Plot:
    """An SVG element, and in words what it shows."""

    svg: str
    caption: str


def figure_of(*, wide: bool = False) -> tuple[Figure, Axes]:
    """A figure of one plot; a wide one fills the page."""
    width = 2 * WIDTH if wide else WIDTH
    figure = Figure(figsize=(width, HEIGHT), layout="constrained")
    return figure, figure.subplots()


def percent_axis(axis: Axis) -> None:
    """Labels of an axis of shares, in per cent."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))


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
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    return text.strip()
