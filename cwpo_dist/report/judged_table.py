"""Win rates by people's verdicts in; their table out, if there are any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cwpo_dist.report.cells import NO_PAIRS, Cell, Table, at, interval, written
from cwpo_dist.report.figures import Estimate

_NOTE = (
    "Share of prompts on which the first's answer is better, a tie counted as a half; small: 95 % "
    "intervals, clustered by prompt. People: by their verdicts alone. Gold: by the gold reward on "
    "all prompts; its interval says nothing of how far people and it differ. Both: people's, made "
    "more exact by the gold reward (PPI++), and right however wrong that is; λ is its part. They "
    "hold for the models of these seeds: the spread between seeds is not in them. Prompts that "
    "both answered alike are left out."
)


def judged_tables(found: Mapping[str, Any]) -> list[Table]:
    """The table, where people judged answers."""
    rows = [
        (
            Cell(f"{told['ours']} against {told['theirs']}"),
            Cell(f"{told['judged']:,} of {told['items']:,}"),
            *(_share(told[of]) for of in ("people", "model", "both")),
            Cell(f"{told['weight']:.2f}"),
            NO_PAIRS
            if told["narrower"] is None
            else Cell(f"{written(100 * told['narrower'], '.0f')} %"),
            Cell(", ".join(f"{n:,} {why}" for why, n in told["left_out"].items()) or "–"),
        )
        for told in at(found, "judged") or []
    ]
    columns = ("", "judged", "people", "gold", "both", "λ", "narrower", "rows left out")
    return [Table("Judged by people", columns, tuple(rows), note=_NOTE)] if rows else []


def _share(record: Mapping[str, Any]) -> Cell:
    found = Estimate.of(record)
    if found is None or found.value is None:
        return NO_PAIRS
    text = f"{100 * found.value:.1f} %"
    if found.low is None or found.high is None:
        return Cell(text)
    return Cell(text, (interval(100 * found.low, 100 * found.high, ".1f"),))
