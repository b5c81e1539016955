"""What noise.py found in; the tables of REPRODUCTION.md and a chart out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from noise_cases import ABLATIONS, FLIPPED, LEARNED, METHODS, RIVALS, SHARES, Case
from page_tables import cell, lines

Found = dict[str, Any]  # the JSON


def tables(found: Found, which: str) -> Iterator[str]:
    """As REPRODUCTION.md has them.

    Args:
        found: the JSON.
        which: noise: methods by flipped labels; confidence: of annotators' labels, what weights
            are worth then; all: weighted labels beside all of people's, by what the annotator has
            learned; rivals: what else a labelled part is good for; weights; shares: by the
            labelled share.
    """
    made = {
        "noise": _noise,
        "confidence": _confidence,
        "all": _all,
        "rivals": _rivals,
        "weights": _weights,
        "shares": _shares,
    }
    return lines(made[which](found))


def _noise(found: Found) -> Iterator[list[str]]:
    yield ["labels flipped", *(f"{100 * share:.0f} %" for share in FLIPPED)]
    for name in sorted(METHODS, key=lambda name: name != "human"):
        rows = [_row(found, Case(name, share)) for share in FLIPPED]
        key = "figure" if name == "human" else "less_human"
        yield [f"`{name}`", *(_cell(row, key) for row in rows)]


def _all(found: Found) -> Iterator[list[str]]:
    yield ["labelled; all labels flipped", *(f"{100 * share:.0f} %" for share in FLIPPED)]
    for careful in (False, True):
        for share in LEARNED:
            rows = [_row(found, Case("cw_mean", flip, share, careful)) for flip in FLIPPED]
            told = f"{100 * share:.0f} %, {'but not these' if careful else 'these too'}"
            yield [told, *(f"{_right(row)}: {_cell(row, 'less_human100')}" for row in rows)]


def _rivals(found: Found) -> Iterator[list[str]]:
    yield ["labelled 20 %", *(f"{100 * share:.0f} %" for share in FLIPPED)]
    for careful, name in product((False, True), RIVALS):
        if name != "human100":
            rows = [_row(found, Case(name, flip, 0.2, careful)) for flip in FLIPPED]
            told = f"`{name}`, {'not flipped' if careful else 'flipped too'}"
            yield [told, *(_cell(row, "less_human100") for row in rows)]


def _weights(found: Found) -> Iterator[list[str]]:
    yield ["weights", "figure", "less `weak`", "less `cw_mean`"]
    for name in ABLATIONS:
        row = _row(found, Case(name, 0.0))
        yield [name, *(_cell(row, key) for key in ("figure", "less_weak", "less_cw_mean"))]


def _shares(found: Found) -> Iterator[list[str]]:
    yield ["labelled", "labels right", "`weak`", "`cw_mean` less `weak`", "less `human100`"]
    for share in SHARES:
        weak, cw = (_row(found, Case(name, 0.0, share)) for name in ("weak", "cw_mean"))
        right = f"{100 * weak['annotator_right']:.1f} %"
        less = (_cell(cw, key) for key in ("less_weak", "less_human100"))
        yield [f"{100 * share:.0f} %", right, _cell(weak, "figure"), *less]


def _confidence(found: Found) -> Iterator[list[str]]:
    yield ["labels flipped", *(f"{100 * share:.0f} %" for share in FLIPPED)]
    for name in ("cw_mean", "cw_calibrated", "ensemble", "ensemble, C"):
        rows = [_row(found, Case(name, share)) for share in FLIPPED]
        key = "less_weak" if name == "cw_mean" else "less_cw_mean"
        told = f"`{name}` less `{key.removeprefix('less_')}`"
        yield [told, *(_cell(row, key) for row in rows)]


def _row(found: Found, case: Case) -> dict[str, Any]:
    wanted = case._asdict()
    return next(row for row in found["rows"] if all(row[key] == wanted[key] for key in wanted))


def _right(row: dict[str, Any]) -> str:
    return f"{100 * row['people_right']:.0f}, {100 * row['annotator_right']:.0f} %"


def _cell(row: dict[str, Any], key: str) -> str:
    """In percent, or in points with a sign."""
    if key not in row:
        return ""
    return cell(row[key], 100, ".1f", " %") if key == "figure" else cell(row[key], 100, "+.1f")


def draw(found: Found, to: Path) -> None:
    """How far weighted labels are from all of people's, by the errors of both."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot

    chart, axes = pyplot.subplots(1, 2, figsize=(9.0, 3.4), sharey=True, layout="constrained")
    for careful, panel in zip((False, True), axes, strict=True):
        for number, share in enumerate(LEARNED):
            rows = [_row(found, Case("cw_mean", flip, share, careful)) for flip in FLIPPED]
            less = [row["less_human100"] for row in rows]
            at = 100 * np.array(FLIPPED) + 0.5 * (number - 1)  # beside each other
            means, lows, highs = (
                100 * np.array([each[end] for each in less]) for end in ("mean", "low", "high")
            )
            bars, label = (means - lows, highs - means), f"{100 * share:g} %"
            panel.errorbar(at, means, bars, label=label, capsize=2)
        panel.axhline(0, color="gray", linewidth=0.8)
        whose = "none of its labels" if careful else "its labels, too"
        panel.set(xlabel="training labels flipped, %", title=f"the annotator: {whose}")
        panel.title.set_fontsize(9)
    axes[0].set_ylabel("GRA of cw_mean less human100, points")
    axes[0].legend(title="labelled", fontsize=8)
    chart.savefig(to)
