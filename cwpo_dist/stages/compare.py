"""Finished run directories in; the terminal's table and one page over all of them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cwpo_dist.report.page import render
from cwpo_dist.report.table import print_summary
from cwpo_dist.storage import Store


class CompareError(ValueError):
    """Runs that cannot be shown together; the message says what to do."""


def compare(runs: Sequence[str], to: str | None = None) -> str:
    """Shows the figures of runs and writes their page; nothing is computed again.

    Args:
        runs: run directories, paths or URIs, each with a finished report.
        to: where the page goes; None: the run's own `report.html` (for one run).

    Returns:
        The page's place.

    Raises:
        CompareError: for a run without a report, or several runs without `to`.
    """
    if to is None and len(runs) > 1:
        raise CompareError("--to: several runs share a page; name its file")
    found = {run: _metrics(run) for run in runs}
    metrics = next(iter(found.values())) if len(found) == 1 else _merged(found)
    print_summary(metrics)
    place = to if to is not None else f"{runs[0].rstrip('/')}/report.html"
    folder, _, name = place.rpartition("/")
    Store(folder or ".").write(name, render(metrics).encode())
    return place


def _metrics(run: str) -> dict[str, Any]:
    try:
        metrics: dict[str, Any] = Store(run).read_json("metrics.json")
        return metrics
    except FileNotFoundError:
        raise CompareError(
            f"{run!r} has no metrics.json: no run ended there; finish it with `cwpo run`"
        ) from None


def _merged(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All arms side by side, named `run/arm`; what belongs to one run alone is left out."""
    names = _short_names(list(found))
    runs = [metrics["run"] for metrics in found.values()]
    return {
        "run": {
            "output_dir": ", ".join(found),
            "seed": ", ".join(str(run["seed"]) for run in runs),
            "simulated_labels": any(run["simulated_labels"] for run in runs),
            "versions": runs[0]["versions"],
            "device": ", ".join(sorted({str(run["device"]) for run in runs})),
        },
        "prepare": None,
        "arms": {
            f"{names[run]}/{arm}": figures
            for run, metrics in found.items()
            for arm, figures in metrics["arms"].items()
        },
        "confidences": None,
        "config": None,
    }


def _short_names(runs: list[str]) -> dict[str, str]:
    """The last folder of each run, or the whole of it where two would be the same."""
    short = {run: run.rstrip("/").rsplit("/", 1)[-1] for run in runs}
    unique = len(set(short.values())) == len(short)
    return short if unique else {run: run for run in runs}
