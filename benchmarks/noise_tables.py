"""What noise.py found in; the tables of BENCHMARKS.md and a chart out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from noise_cases import ABLATIONS, FLIPPED, METHODS, QUALITY, SHARES, Case

Found = dict[str, Any]  # the JSON


def tables(found: Found, which: str) -> Iterator[str]:
    """As BENCHMARKS.md has them.

    Args:
        found: the JSON.
        which: noise: methods by flipped labels; all: weighted labels beside all of people's, by
            what the annotator has learned; weights; shares: by the labelled share.
    """
    yield from {"noise": _noise, "all": _all, "weights": _weights, "shares": _shares}[which](found)


def _noise(found: Found) -> Iterator[str]:
    """Methods by flipped labels."""
    yield from _head("labels flipped", [f"{share:.0%}" for share in FLIPPED])
    for name in sorted(METHODS, key=lambda name: name != "human"):
        rows = [_row(found, Case(name, share)) for share in FLIPPED]
        key = "figure" if name == "human" else "less_human"
        yield _line(f"`{name}`", (_cell(row[key], key) for row in rows))


def _all(found: Found) -> Iterator[str]:
    """Weighted labels beside all of people's."""
    yield from _head("labelled; labels flipped", [f"{share:.0%}" for share in FLIPPED])
    for careful in (False, True):
        for share in sorted({case.labelled for case in QUALITY}):
            rows = [_row(found, Case("cw_mean", flip, share, careful)) for flip in FLIPPED]
            cells = (_right(row) + _cell(row["less_human100"], "less") for row in rows)
            yield _line(
                f"{share:.0%}, {'its labels right' if careful else 'its labels, too'}", cells
            )


def _weights(found: Found) -> Iterator[str]:
    """Shares that are kept, and weight functions."""
    yield from _head("weights", ["figure", "less `weak`", "less `human100`"])
    for name in ABLATIONS:
        row = _row(found, Case(name, 0.0))
        keys = ("figure", "less_weak", "less_human100")
        yield _line(name, (_cell(row.get(key), key) for key in keys))


def _shares(found: Found) -> Iterator[str]:
    """Weighted labels by the labelled share."""
    columns = ["labels right", "`weak`", "`cw_mean` less `weak`", "less `human100`"]
    yield from _head("labelled", columns)
    for share in SHARES:
        weak, cw = (_row(found, Case(name, 0.0, share)) for name in ("weak", "cw_mean"))
        less = (_cell(cw[key], key) for key in ("less_weak", "less_human100"))
        right = f"{100 * weak['annotator_right']:.1f} %"
        yield _line(f"{share:.0%}", (right, _cell(weak["figure"], "figure"), *less))


def _head(corner: str, columns: Sequence[str]) -> Iterator[str]:
    yield _line(corner, columns)
    yield "|---" * (len(columns) + 1) + "|"


def _line(name: str, cells: Iterable[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _row(found: Found, case: Case) -> dict[str, Any]:
    wanted = case._asdict()
    return next(row for row in found["rows"] if all(row[key] == wanted[key] for key in wanted))


def _right(row: dict[str, Any]) -> str:
    people, annotator = row["people_right"], row["annotator_right"]
    return f"{100 * people:.0f}, {100 * annotator:.0f} %: "


def _cell(mean: dict[str, Any] | None, key: str) -> str:
    """In percent, or in points with a sign, bold where the interval leaves zero out."""
    if mean is None:
        return ""
    if mean["low"] is None:
        return "the same"
    form = ".1f" if key == "figure" else "+.1f"
    value, low, high = (f"{100 * mean[end]:{form}}" for end in ("mean", "low", "high"))
    bold = "**" if key != "figure" and mean["low"] * mean["high"] > 0 else ""
    return f"{bold}{value}{bold} [{low}, {high}]".replace("-", "−")


def draw(found: Found, to: Path) -> None:
    """How far weighted labels are from all of people's, by the errors of both."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot

    chart, axes = pyplot.subplots(1, 2, figsize=(9.0, 3.4), sharey=True, layout="constrained")
    for careful, panel in zip((False, True), axes, strict=True):
        for number, share in enumerate(sorted({case.labelled for case in QUALITY})):
            of = [
                row
                for row in found["rows"]
                if (row["method"], row["labelled"], row["careful"]) == ("cw_mean", share, careful)
            ]
            points = {
                row["flipped"]: row["less_human100"] for row in of if row["flipped"] in FLIPPED
            }
            at = [100 * flipped + 0.5 * (number - 1) for flipped in points]
            means, lows, highs = (
                100 * np.array([each[key] for each in points.values()])
                for key in ("mean", "low", "high")
            )
            bars, label = (means - lows, highs - means), f"{100 * share:g} %"
            panel.errorbar(at, means, bars, label=label, capsize=2)
        panel.axhline(0, color="gray", linewidth=0.8)
        whose = "right, as careful people gave them" if careful else "flipped, too"
        panel.set(xlabel="training labels flipped, %", title=f"the annotator's labels are {whose}")
        panel.title.set_fontsize(9)
    axes[0].set_ylabel("GRA of cw_mean less human100, points")
    axes[0].legend(title="labelled", fontsize=8)
    chart.savefig(to)
