"""Finished runs, or a comparison, in; the terminal's tables and one page over all of it out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from cwpo_dist.manifest import Manifest
from cwpo_dist.report.cells import Metrics
from cwpo_dist.report.comparison_page import FIGURES, PAGE, print_comparison, render_comparison
from cwpo_dist.report.explorer import EXPLORER, Sample
from cwpo_dist.report.outputs import data_tables
from cwpo_dist.report.page import render
from cwpo_dist.report.summary import weights_table
from cwpo_dist.report.table import print_summary, print_table
from cwpo_dist.storage import MANIFEST, Store


class ShowError(ValueError):
    """Runs that cannot be shown together; the message says what to do."""


def show(runs: Sequence[str], to: str | None = None) -> str:
    """Shows the figures of runs and writes their page; nothing is computed again.

    Args:
        runs: run directories, paths or URIs, each with a finished report; one alone may have ended
            before it, and shows what `prepare` and `weigh` made.
        to: where the page goes; None: the run's own `report.html` (for one run).

    Returns:
        The page's place.

    Raises:
        ShowError: for a run without a report, or several runs without `to`.
    """
    if to is None and len(runs) > 1:
        raise ShowError("--to: several runs share a page; name its file")
    try:
        return _shown(runs, to)
    # What is read was left by a run, but whoever hands it on may have changed it: a figure that is
    # missing, or of another kind, fails wherever a table is made of it.
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        files = ", ".join(f"{run}/{_figures(run)}" for run in runs)
        said = f"{type(error).__name__}: {error}"
        raise ShowError(
            f"{files}: not as `cwpo` writes it ({said}); run the same configuration again, which "
            "makes it anew, or copy the directory whole"
        ) from error


def _writable(held: object) -> Any:
    """The same without halves of surrogate pairs, which JSON can spell and no page can hold."""
    return json.loads(json.dumps(held, ensure_ascii=False).encode("utf-8", "replace"))


def _figures(run: str) -> str:
    return FIGURES if _is_comparison(Store(run)) else "metrics.json"


def _shown(runs: Sequence[str], to: str | None) -> str:
    if len(runs) == 1 and _is_comparison(Store(runs[0])):
        return show_comparison(Store(runs[0]), to)
    if len(runs) == 1 and (prepared := _without_report(Store(runs[0]))):
        return _show_prepared(runs[0], prepared, to)
    found = {run: _metrics(run) for run in runs}
    metrics, sample = (
        _sampled(runs[0], found[runs[0]]) if len(found) == 1 else (_merged(found), None)
    )
    print_summary(metrics)
    return _written(render(metrics, sample), to or f"{runs[0].rstrip('/')}/report.html")


def _sampled(run: str, metrics: Metrics) -> tuple[Metrics, Sample | None]:
    """The figures of a run with its sample of pairs, which knows the order of its arms."""
    root = Store(run)
    sample: Sample | None = root.read_json(EXPLORER) if root.exists(EXPLORER) else None
    if sample is None:
        return metrics, None
    # JSON keeps no order of arms: its keys are sorted.
    return {**metrics, "arms": {arm: metrics["arms"][arm] for arm in sample["arms"]}}, sample


def _is_comparison(root: Store) -> bool:
    return root.exists(FIGURES) and not root.exists("metrics.json")


def _without_report(root: Store) -> dict[str, Manifest]:
    """The manifests of what `prepare` made, by its key, of a run that has no report yet."""
    if root.exists("metrics.json") or root.exists(FIGURES):
        return {}
    return _manifests(root, "prepare")


def _manifests(root: Store, stage: str) -> dict[str, Manifest]:
    """Those of a stage's committed outputs, by their keys."""
    made = [name for name in root.names(stage) if name.endswith(f"/{MANIFEST}")]
    return {name.split("/")[1]: Manifest.read(root, name) for name in made}


def _show_prepared(run: str, prepared: dict[str, Manifest], to: str | None) -> str:
    """What became of the rows, and of the pairs that were weighed.

    Where sources or settings changed between, each `prepare` has a column; each `weigh` has a row,
    named by the folder that holds its preferences.
    """
    counts = {key: manifest.counts for key, manifest in prepared.items()}
    (first, *others) = prepared.values()
    weighed = {
        f"weigh/{key}": {"weigh": manifest.counts}
        for key, manifest in _manifests(Store(run), "weigh").items()
    }
    metrics: Metrics = {
        "run": {"output_dir": run} | {"versions": first.versions, "device": first.device},
        "arms": weighed,
        **({"prepared": counts} if others else {"prepare": first.counts}),
    }
    weights = [weights_table(metrics)] if weighed else []
    for table in [*data_tables(metrics), *weights]:
        print_table(table, Console(), simulated=False)
    for place in weighed:
        told = Text(f"weighed pairs: {run.rstrip('/')}/{place}/preferences")
        Console().print(told, soft_wrap=True)  # in one line, to be copied
    return _written(render(metrics), to or f"{run.rstrip('/')}/report.html")


def show_comparison(root: Store, to: str | None = None) -> str:
    """The page of what `cwpo compare` left, made anew."""
    found = _writable(root.read_json(FIGURES))
    print_comparison(found)
    return _written(render_comparison(found), to or f"{root.uri.rstrip('/')}/{PAGE}")


def _written(page: str, place: str) -> str:
    folder, _, name = place.rpartition("/")
    Store(folder or ".").write(name, page.encode())
    return place


def _metrics(run: str) -> Metrics:
    try:
        metrics = _writable(Store(run).read_json("metrics.json"))
        if not (isinstance(metrics, dict) and isinstance(metrics.get("arms"), dict)):
            raise TypeError("it has no arms")
        return metrics
    except FileNotFoundError:
        why = "no run ended there; finish it with `cwpo run`"
        if Store(run).exists(FIGURES):
            why = "it holds a comparison, whose page is its own; give it alone"
        elif refused := [name for name in Store(run).names("prepare") if "/rejects/" in name]:
            folder = refused[0].rpartition("/")[0]
            why = f"`prepare` set too many rows aside, or was cut off; {run}/{folder} has them"
        raise ShowError(f"{run!r} has no metrics.json: {why}") from None


def _merged(found: Mapping[str, Metrics]) -> Metrics:
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
        "prepared": {names[run]: metrics["prepare"] for run, metrics in found.items()},
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
