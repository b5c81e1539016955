"""What a reward model is worth on a labelled set in; the terminal's tables out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

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

_Columns = Mapping[str, Callable[[Metrics], Cell]]
_OF_PAIRS: _Columns = {
    "pairs": lambda of: count(of["agreement"]["n"]),
    "right": lambda of: share(of["agreement"], with_ties=True),
    "ECE": calibration_error,
    "Brier score": lambda of: estimate(of["brier"]),
    "NLL, nats": lambda of: estimate(of["nll"]),
    "longer wins": lambda of: share(of["length_baseline"]),
    "chosen longer": lambda of: share(of["chosen_longer"]),
    "chosen shorter": lambda of: share(of["chosen_shorter"]),
}
_OF_ROWS: _Columns = {
    "rows": lambda of: count(of["best"]["n"]),
    "right": lambda of: share(of["best"], with_ties=True),
    "score": lambda of: percent(of, "score"),
}
_NOTES = (
    "Right: of decided pairs, the chosen answer has the higher score; ties of scores apart. ECE, "
    "Brier score and negative log-likelihood are of σ(|margin|); a coin has 0.25 and 0.693. Longer "
    "wins: the chosen answer is the longer one. Chosen longer, chosen shorter: right where it is. "
    "Small: 95 % intervals, by prompt.",
    "Right: all chosen answers of a row have higher scores than its others. Score: the same, one "
    "of k highest as 1/k. The pairs above are each chosen with each rejected answer of a row.",
)


def print_benchmark(figures: Metrics, console: Console) -> None:
    """Prints what came out, and what was left out and why."""
    title = f"{figures['model']} on {', '.join(figures['data'])}"
    tables = [_table(figures, title, _OF_PAIRS, _NOTES[0])]
    if "mean_score" in figures:
        tables.append(_table(figures, "Best of each row", _OF_ROWS, _NOTES[1]))
    for table in tables:
        print_table(table, console, simulated=False)
    console.print(Text("\n".join(["", *_lines(figures)])), soft_wrap=True)


def _table(figures: Metrics, title: str, columns: _Columns, note: str) -> Table:
    rows = tuple(
        (Cell(name), *(cell(of_domain) for cell in columns.values()))
        for name, of_domain in figures["domains"].items()
    )
    return Table(title, (figures["by"] or "", *columns), rows, note)


def _lines(figures: Metrics) -> Iterator[str]:
    if "mean_score" in figures:
        ties = figures["ties"]
        cell = share(ties | {"accuracy": ties["score"]})
        tied, ref = (percent(ties, kind).text for kind in ("tied", "ref"))
        if ties["score"] is not None:
            told = " ".join([cell.text, *cell.details])
            yield f"Ties: score {told}; right {tied} tied, {ref} ref"
        yield f"mean score of subsets: {percent(figures, 'mean_score').text}"
    yield f"{figures['rows']:,} rows, {figures['compared']:,} compared on {figures['device']}"
    yield from (f"left out: {n:,} × {reason}" for reason, n in figures["left_out"].items())
