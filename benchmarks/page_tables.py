"""Figures in; lines of a table, as the pages have it, out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def lines(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown; the first row is its head."""
    for k, row in enumerate(rows):
        yield f"| {' | '.join(row)} |"
        if k == 0:
            yield "|---" * len(row) + "|"


def cell(mean: Mapping[str, Any], scale: int, form: str, unit: str = "") -> str:
    """A mean with its interval; a difference is bold where that leaves zero out."""
    value = f"{scale * mean['mean']:{form}}{unit}"
    low, high = mean["low"], mean["high"]
    if low is None:
        return value.replace("-", "−")
    if form.startswith("+") and not low <= 0 <= high:
        value = f"**{value}**"
    return f"{value} [{scale * low:{form}}, {scale * high:{form}}]".replace("-", "−")
