"""What people and a gold reward say together in; tables of it out, if there is any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cwpo_dist.report.cells import NO_PAIRS, Cell, Table, at, interval, together, written
from cwpo_dist.report.figures import Estimate

_NOTE = (
    "Share of prompts on which the first's answer is better, a tie counted as a half; small: 95 % "
    "intervals, clustered by prompt. People: by their verdicts alone. Gold: by the gold reward on "
    "all prompts; its interval says nothing of how far people and it differ. Both: people's, made "
    "more exact by the gold reward (PPI++), and right however wrong that is; λ is its part. They "
    "hold for the models of these seeds: the spread between seeds is not in them. Prompts that "
    "both answered alike are left out."
)


_AGREED = (
    "Share of held-out pairs on which the annotator, or the policy's implicit reward, prefers what "
    "people prefer, a tie on either side counted as a half; small: 95 % intervals, clustered by "
    "prompt. People: on pairs with a label. Gold: what the gold reward prefers in people's place, "
    "on all pairs. Both: people's, made more exact by the gold reward (PPI++), and right however "
    "wrong that is, if it was drawn by lot which pairs have a label, and gold did not learn from "
    "these; λ is its part. Left out: pairs of which gold could not read an answer. The spread "
    "between seeds is not in the intervals."
)
_COLUMNS = ("", "judged", "people", "gold", "both", "λ", "narrower")


def judged_tables(found: Mapping[str, Any]) -> list[Table]:
    """Accuracies and win rates by people, gold and both, of a run or comparison that has any."""
    agreed: dict[tuple[str, tuple[Cell, ...]], list[str]] = {}
    for name, arm in (at(found, "trials") or at(found, "arms") or {}).items():
        for of, told in (at(arm, "with_gold") or {}).items():
            agreed.setdefault((of, _figures(told)), []).append(name)  # trials share annotators
    rows = [(Cell(f"{of}: {together(names)}"), *told) for (of, told), names in agreed.items()]
    won = [
        (
            Cell(f"{told['ours']} against {told['theirs']}"),
            *_figures(told),
            Cell(", ".join(f"{n:,} {why}" for why, n in told["left_out"].items()) or "–"),
        )
        for told in at(found, "judged") or []
    ]
    tables = [
        Table("Accuracy by people and gold", _COLUMNS, tuple(rows), _AGREED),
        Table("Judged by people", (*_COLUMNS, "rows left out"), tuple(won), _NOTE),
    ]
    return [table for table in tables if table.rows]


def _figures(told: Mapping[str, Any]) -> tuple[Cell, ...]:
    narrower = told["narrower"]
    return (
        Cell(f"{told['judged']:,} of {told['items']:,}", _unread(told)),
        *(_share(told[of]) for of in ("people", "model", "both")),
        Cell(f"{told['weight']:.2f}"),
        NO_PAIRS if narrower is None else Cell(f"{written(100 * narrower, '.0f')} %"),
    )


def _unread(told: Mapping[str, Any]) -> tuple[str, ...]:
    """Pairs of which gold could not read an answer; older runs have not counted them."""
    return (f"{told['unread']:,} left out",) if told.get("unread") else ()


def _share(record: Mapping[str, Any]) -> Cell:
    found = Estimate.of(record)
    if found is None or found.value is None:
        return NO_PAIRS
    text = f"{100 * found.value:.1f} %"
    if found.low is None or found.high is None:
        return Cell(text)
    return Cell(text, (interval(100 * found.low, 100 * found.high, ".1f"),))
