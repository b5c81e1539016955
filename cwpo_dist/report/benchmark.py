"""What a reward model is worth on a labelled set in; the terminal's table out."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from cwpo_dist.report.cells import (
    Cell,
    Metrics,
    Table,
    calibration_error,
    count,
    estimate,
    percent,
    share,
)
from cwpo_dist.report.table import print_table

_NOTE = (
    "Right: of decided pairs, the chosen answer has the higher score; ties of scores apart. ECE, "
    "Brier score and negative log-likelihood are of σ(|margin|); a coin has 0.25 and 0.693. Longer "
    "wins: the chosen answer is the longer one. Chosen longer, chosen shorter: right where it is. "
    "Small: 95 % intervals, by prompt."
)
_OF_LISTS = (
    " Pairs are each chosen with each rejected answer of a row. Best: rows whose chosen answers "
    "have higher scores than all others. Score: the same, one of k highest as 1/k."
)


def print_benchmark(figures: Metrics, console: Console) -> None:
    """Prints what came out, and what was left out and why."""
    print_table(_table(figures), console, simulated=False)
    console.print(Text("\n".join(["", *_lines(figures)])), soft_wrap=True)


def _table(figures: Metrics) -> Table:
    lists = "mean_score" in figures
    columns = ["pairs", "right", "ECE", "Brier score", "NLL, nats"]
    columns += ["longer wins", "chosen longer", "chosen shorter"]
    rows = [
        (
            Cell(name),
            count(record["agreement"]["n"]),
            share(record["agreement"], with_ties=True),
            calibration_error(record),
            *(estimate(record[key]) for key in ("brier", "nll")),
            *(share(record[k]) for k in ("length_baseline", "chosen_longer", "chosen_shorter")),
            *([share(record["best"], with_ties=True), percent(record, "score")] if lists else []),
        )
        for name, record in figures["domains"].items()
    ]
    return Table(
        f"{figures['model']} on {', '.join(figures['data'])}",
        (figures["by"] or "", *columns, *(["best", "score"] if lists else [])),
        tuple(rows),
        note=_NOTE + (_OF_LISTS if lists else ""),
    )


def _lines(figures: Metrics) -> Iterator[str]:
    if "mean_score" in figures:
        ties = figures["ties"]
        cell = share(ties | {"accuracy": ties["score"]})
        tied, ref = (percent(ties, kind).text for kind in ("tied", "ref"))
        yield f"Ties: score {' '.join([cell.text, *cell.details])}; right {tied} tied, {ref} ref"
        yield f"mean score of subsets: {percent(figures, 'mean_score').text}"
    yield f"{figures['rows']:,} rows, {figures['compared']:,} compared on {figures['device']}"
    yield from (f"left out: {n:,} × {reason}" for reason, n in figures["left_out"].items())
