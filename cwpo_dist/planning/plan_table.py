"""A plan in; its table on the terminal out."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cwpo_dist.planning.plan import Plan, StagePlan
from cwpo_dist.planning.sampled import ShownRow
from cwpo_dist.terminal_text import harmless


def print_plan(plan: Plan) -> None:
    """Shows a plan on the terminal."""
    console = Console(highlight=False)
    for row in plan.rows:
        console.print(_shown(row), end="\n\n")
    console.print(_table(plan))
    for line in _below(plan):
        console.print(line)


def _below(plan: Plan) -> Iterator[str]:
    """What stands below the table."""
    known = [stage.seconds for stage in plan.stages if stage.seconds is not None]
    if len(known) == len(plan.stages):
        yield f"about {_duration(sum(known)) or 'no time'} in all, {plan.where}"
    yield from plan.fleet_lines()
    details = {(stage.stage, line): None for stage in plan.stages for line in stage.details}
    for name, line in details:  # arms that train alike need alike
        yield f"{name}: {escape(harmless(line))}"
    yield (
        "memory is of one worker, beside Python and its libraries; time and memory are rough, the "
        "checks are not"
    )
    for note in plan.notes:
        yield f"note: {escape(harmless(note))}"


def _table(plan: Plan) -> Table:
    table = Table("stage", "arms", "work", box=None, pad_edge=False)
    for name in ("tokens", "time", "memory"):
        table.add_column(name, justify="right")
    for stage in plan.stages:
        table.add_row(
            stage.stage,
            ", ".join(stage.arms),
            escape(stage.work),
            f"{stage.tokens:,}" if stage.tokens else "",
            "done" if stage.done else _duration(stage.seconds),
            _memory(stage),
        )
    return table


def _shown(row: ShownRow) -> Text:
    """A pair as its model reads it: the prompt dim, each answer in its colour."""
    text = Text(f"{row.model} reads\n", style="bold")
    text.append(harmless(row.prompt), style="dim")
    for name, answer, colour in zip("ab", row.answers, ("green", "yellow"), strict=False):
        text.append(f"\n{name}: ", style="bold")
        text.append(harmless(answer), style=colour)
    for line in row.mask:
        text.append(f"\n  {harmless(line)}", style="cyan")
    return text


def _memory(stage: StagePlan) -> str:
    if not stage.memory:
        return ""
    return f"{'≥ ' if stage.at_least else ''}{stage.memory / 2**30:.1f} GiB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown here"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds else ""
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
