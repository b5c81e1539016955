"""Values of a run's metrics in, the cells and tables that show them out.

What a run did not do reads "not run"; what it did on no pairs reads "no pairs". Neither is a zero.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

from cwpo_dist.report.figures import Estimate, Share, Temperature

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One value; `details` stand smaller beside it; `missing` is greyed."""

    text: str
    details: tuple[str, ...] = ()
    missing: bool = False


@dataclass(frozen=True)
class Table:
    """A titled table: its first `n_names` columns name the row, the others hold values."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    n_names: int = 1

    @property
    def csv(self) -> str:
        """The table as a spreadsheet reads it; what stands smaller in a cell follows in it."""
        rows = [[" ".join((cell.text, *cell.details)) for cell in row] for row in self.rows]
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows([self.columns, *rows])
        return lines.getvalue()


def without_empty(table: Table) -> Table:
    """The table without the columns that nobody had; its note names them."""
    ran = [any(row[k] != NOT_RUN for row in table.rows) for k in range(len(table.columns))]
    if all(ran) or not any(ran):
        return table
    left_out = [name for name, there in zip(table.columns, ran, strict=True) if not there]
    rows = tuple(tuple(compress(row, ran)) for row in table.rows)
    note = f"{table.note} Not run: {'; '.join(dict.fromkeys(left_out))}."
    return replace(table, columns=tuple(compress(table.columns, ran)), rows=rows, note=note)


NOT_RUN = Cell("not run", missing=True)
NO_PAIRS = Cell("no pairs", missing=True)
AS_GIVEN = Cell("as given", missing=True)


def at(metrics: object, *path: str) -> Any:
    """The value at a path of keys; None where a part is missing."""
    for key in path:
        if not isinstance(metrics, Mapping):
            return None
        metrics = metrics.get(key)
    return metrics


def arm_items(metrics: Metrics) -> list[tuple[str, Metrics]]:
    """The arms, in the order of the run."""
    return list((at(metrics, "arms") or {}).items())


def written(value: float, form: str) -> str:
    """A number by a format: with a real minus, and a zero without a sign."""
    text = format(value, form)
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def interval(low: float, high: float, form: str) -> str:
    """From … to …; a dash would stand between two minus signs where the form asks for signs."""
    between = " to " if form.startswith("+") else " – "
    return f"{written(low, form)}{between}{written(high, form)}"


def together(names: Sequence[str]) -> str:
    """Several names in a row, told apart where they have commas of their own."""
    return ("; " if any("," in name for name in names) else ", ").join(names)


def share(record: Metrics | None, *, with_ties: bool = False) -> Cell:
    """An accuracy with its interval and, if asked, its ties."""
    found = Share.of(record)
    if found is None:
        return NOT_RUN
    tied = (ties(at(record, "ties")),) if with_ties else ()
    if found.accuracy is None or found.low is None or found.high is None:
        return Cell("no pairs", tied, missing=True)
    bounds = interval(100 * found.low, 100 * found.high, ".1f")
    return Cell(f"{100 * found.accuracy:.1f} %", (bounds, *tied))


def percent(record: Metrics | None, key: str) -> Cell:
    """A share of a record, in per cent."""
    if record is None:
        return NOT_RUN
    value = record.get(key)
    return NO_PAIRS if value is None else Cell(f"{100 * value:.1f} %")


def calibration_error(record: Metrics | None) -> Cell:
    """ECE, in per cent, with its interval."""
    cell, ends = percent(record, "expected_calibration_error"), at(record, "ece_interval")
    if ends is None:
        return cell
    return replace(cell, details=(interval(100 * ends[0], 100 * ends[1], ".1f"),))


def estimate(record: Metrics | None) -> Cell:
    """A number with its interval."""
    found = Estimate.of(record)
    if found is None:
        return NOT_RUN
    if found.value is None:
        return NO_PAIRS
    cell = Cell(written(found.value, ".3f"))
    if found.low is None or found.high is None:
        return cell
    return replace(cell, details=(interval(found.low, found.high, ".3f"),))


def inner(record: Metrics | None, key: str) -> Cell:
    """A number of a record."""
    if record is None:
        return NOT_RUN
    value = record.get(key)
    return NO_PAIRS if value is None else Cell(written(value, ".3f"))


def number(value: float | None, digits: int) -> Cell:
    """A number that a stage makes."""
    return NOT_RUN if value is None else Cell(written(value, f".{digits}f"))


def count(value: int | None) -> Cell:
    """A count that a stage makes."""
    return NOT_RUN if value is None else Cell(written(value, ","))


def plain(value: object) -> Cell:
    """Any recorded value, in words."""
    if value is None:
        return NOT_RUN
    return Cell({True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value))


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def ties(n: int) -> str:
    """A number of ties in words."""
    return f"{n:,} tie" if n == 1 else f"{n:,} ties"


def temperature(record: Metrics | None) -> Cell:
    """A fitted temperature with its interval."""
    if record is None or "temperature" not in record:
        return NOT_RUN
    found = Temperature.of(at(record, "temperature"))
    if found is None:
        return Cell("not fitted", missing=True)
    text = f"{found.value:.2f}"
    if found.low is None or found.high is None:
        return Cell(text)
    return Cell(text, (interval(found.low, found.high, ".2f"),))


def correlation(record: Metrics | None) -> Cell:
    """Pearson's coefficient, with Spearman's beside it."""
    if record is None:
        return NOT_RUN
    pearson, spearman = at(record, "pearson"), at(record, "spearman")
    if pearson is None:
        return NO_PAIRS
    return Cell(written(pearson, "+.2f"), (written(spearman, "+.2f"),))
