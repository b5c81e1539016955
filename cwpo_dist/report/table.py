"""A run's metrics in, its tables on the terminal out."""

from __future__ import annotations

import shlex
from dataclasses import replace

from rich.console import Console, JustifyMethod
from rich.table import Table as RichTable
from rich.text import Text

from cwpo_dist.report.cells import Cell, Metrics, Table, without_empty
from cwpo_dist.report.left_out_table import left_out_tables
from cwpo_dist.report.summary import SIMULATED, arms_table, is_simulated, tables
from cwpo_dist.report.verdict import of_annotators, of_arms

_NOTE_WIDTH = 100


def print_summary(metrics: Metrics, console: Console | None = None) -> None:
    """Prints every table; text of the run is never read as markup."""
    console = console or Console()
    simulated = is_simulated(metrics)
    if simulated:
        console.print(Text(SIMULATED, style="bold reverse"))
    for table in tables(metrics):
        print_table(table, console, simulated=simulated)


def print_short(metrics: Metrics, place: str, console: Console | None = None) -> None:
    """Prints what a run ends with: its arms, what is said of them, and where the rest is.

    Args:
        metrics: of the run.
        place: its directory.
        console: where it is printed.
    """
    console = console or Console()
    if is_simulated(metrics):
        console.print(Text(SIMULATED, style="bold reverse"))
    arms = replace(without_empty(arms_table(metrics)), note="")
    for table in [arms, *left_out_tables(metrics)]:
        print_table(table, console, simulated=False)
    for line in of_annotators(metrics):
        console.print(Text(line), soft_wrap=True)
    for verdict in of_arms(metrics)[0][:1]:
        console.print(Text(verdict.title, style="bold"), soft_wrap=True)
        for line in verdict.lines:
            console.print(Text(line), soft_wrap=True)
    run = shlex.quote(place)
    rest = f"all figures: cwpo report {run}; whether arms differ, over seeds: cwpo compare"
    console.print(Text(rest, style="dim"), soft_wrap=True)


def print_table(table: Table, console: Console, *, simulated: bool) -> None:
    """Prints one table with its title and note."""
    title = f"{table.title} (simulated labels)" if simulated else table.title
    console.print(Text(f"\n{title}", style="bold"))
    console.print(_rich(table))
    if table.note:
        console.print(Text(table.note, style="dim"), width=min(console.width, _NOTE_WIDTH))


def _rich(table: Table) -> RichTable:
    drawn = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, column in enumerate(table.columns):
        justify: JustifyMethod = "left" if place < table.n_names else "right"
        drawn.add_column(Text(column, style="dim"), justify=justify)
    for row in table.rows:
        drawn.add_row(*(_text(cell) for cell in row))
    return drawn


def _text(cell: Cell) -> Text:
    text = Text(cell.text, style="dim" if cell.missing else "")
    for detail in cell.details:
        text.append(f"\n{detail}", style="dim")
    return text
