"""Figures that are committed as JSON in; the tables of BENCHMARKS.md and REPRODUCTION.md out.

    python benchmarks/pages.py [--check]
    python benchmarks/pages.py keep RUN/comparison.json benchmarks/comparisons/NAME.json

A page names whose table stands where, of which file, by which figure:

    <!-- figures: asking benchmarks/asking.json accuracy -->
    <!-- end of figures -->
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import asking
import comparisons
import intervals
import noise_tables
import typer

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("BENCHMARKS.md", "REPRODUCTION.md")
START, END = "<!-- figures: ", "<!-- end of figures -->"
TABLES: dict[str, Callable[[dict[str, Any], str], Iterator[str]]] = {
    "asking": asking.tables,
    "comparison": comparisons.tables,
    "by_seed": comparisons.by_seed,
    "intervals": intervals.tables,
    "noise": noise_tables.tables,
}
app = typer.Typer(add_completion=False)


class PageError(ValueError):
    """What is wrong with a marker or its file."""


def renewed(text: str) -> str:
    """A page with all its tables written anew."""
    text, *blocks = text.split(START)
    for block in blocks:
        marker, _, rest = block.partition("\n")
        _, end, after = rest.partition(END)
        if not end:
            raise PageError(f"`{START}{marker}` has no `{END}` before the next")
        text += f"{START}{marker}\n\n{_table(marker)}\n\n{END}{after}"
    if text.count(END) > len(blocks):
        raise PageError(f"a `{END}` has no `{START}… -->` before it")
    return text


def _table(marker: str) -> str:
    try:
        name, file, figure, _ = marker.split()
    except ValueError as error:
        raise PageError(f"`{START}{marker}` must name a table, a file and a figure") from error
    if name not in TABLES:
        raise PageError(f"`{name}` makes no tables, but {', '.join(TABLES)} do")
    try:
        return "\n".join(TABLES[name](_read(ROOT / file), figure))
    except KeyError as error:
        raise PageError(f"`{START}{marker}` finds no {error}") from error


def _read(place: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(place.read_text())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", error)  # of files without the place again
        raise PageError(f"{place} cannot be read: {why}") from error
    return found


@app.callback(invoke_without_command=True)
def renew(
    context: typer.Context,
    check: Annotated[bool, typer.Option("--check", help="only says which are not current")] = False,
) -> None:
    """Writes the tables of the pages anew."""
    if context.invoked_subcommand is not None:
        return
    stale = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        try:
            new = renewed(text)
        except PageError as error:
            ended(f"{page}: {error}", 2)
        if new != text:
            stale.append(page)
            if not check:
                (ROOT / page).write_text(new)
    if check and stale:
        ended(f"{' and '.join(stale)}: not current; `make figures` writes the tables anew", 1)


@app.command()
def keep(found: Path, to: Path) -> None:
    """Keeps what tables read of a comparison."""
    try:
        told = comparisons.kept(_read(found))
    except KeyError as error:
        ended(f"{found} is no comparison: it has no {error}", 2)
    except PageError as error:
        ended(str(error), 2)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(told, indent=1) + "\n")


def ended(why: str, code: int) -> NoReturn:
    """Ends with one sentence."""
    print(why, file=sys.stderr)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
