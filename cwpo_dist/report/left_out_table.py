"""What figures of sampled answers leave out, of arms or trials, in; what shows it out, if anything.

Runs that were made before these were counted have no such records, and show none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cwpo_dist.report.cells import NOT_RUN, Cell, Table, at

Record = Mapping[str, Any]
TITLE = "Prompts left out, as a model could not read their answers"
_FIGURES = {"gra_own_sft": "GRA, own SFT", "gra_common": "GRA, common", "kl": "KL"}
_SIDES = {"aligned": "of the policy's answers", "baseline": "of the other model's"}
_NOTE = (
    "Prompts of which a model could not read an answer, so that the figure is of the others alone; "
    "long answers are the first to go, and with them what they would have shown. over_length: with "
    "its prompt an answer is longer than the max_length of the gold model (GRA), or than what the "
    "policy samples (KL): its max_length and evaluate.max_new_tokens, or where it cuts prompts its "
    "max_length. To count them, raise that max_length, or lower evaluate.max_new_tokens. Lengths "
    "of answers are of all."
)


def left_out_of(evaluated: Record) -> dict[str, Record]:
    """What each figure of an arm leaves out, and of how many prompts.

    Args:
        evaluated: what `evaluate` says of the arm.

    Returns:
        By figure a `LeftOut`, with all prompts under `of`; none of what was not run.
    """
    gra, kl = at(evaluated, "gra") or {}, at(evaluated, "kl")
    told = {**{f"gra_{against}": of for against, of in gra.items()}, "kl": kl}
    return {
        figure: {**found, "of": record["n"] + found["prompts"]}
        for figure, record in told.items()
        for found in [at(record, "left_out")]
        if found is not None
    }


def added(runs: Sequence[Record]) -> dict[str, Record]:
    """The same of several seeds, added up."""
    found: dict[str, dict[str, Any]] = {}
    for figure, record in (item for run in runs for item in left_out_of(run).items()):
        sums = found.setdefault(figure, {side: Counter() for side in _SIDES})
        for side in _SIDES:
            sums[side].update(record[side])
        for number in ("prompts", "of"):
            sums[number] = sums.get(number, 0) + record[number]
    return {
        figure: {name: dict(n) if isinstance(n, Counter) else n for name, n in sums.items()}
        for figure, sums in found.items()
    }


def beside(cell: Cell, left_out: Record | None) -> Cell:
    """A figure with the number of prompts that it leaves out, if any; if all, it is of none."""
    prompts = at(left_out, "prompts")
    if not prompts:
        return cell
    text = "of no prompt" if cell == NOT_RUN else cell.text
    return replace(cell, text=text, details=(*cell.details, f"{prompts:,} left out"))


def left_out_tables(found: Record) -> list[Table]:
    """A row for each figure, of a run or comparison, that is not of all prompts."""
    rows = tuple(_rows(found))
    columns = ("", "figure", "prompts left out", *_SIDES.values())
    return [Table(TITLE, columns, rows, _NOTE, 2)] if rows else []


def _rows(found: Record) -> Iterator[tuple[Cell, ...]]:
    of_each = {name: left_out_of(arm) for name, arm in (at(found, "arms") or {}).items()}
    of_each |= {name: at(of, "left_out") or {} for name, of in (at(found, "trials") or {}).items()}
    for name, figures in of_each.items():
        for figure, words in _FIGURES.items():
            record = figures.get(figure)
            if record is not None and record["prompts"]:
                number = Cell(f"{record['prompts']:,} of {record['of']:,}")
                yield Cell(name), Cell(words), number, *(_why(record[side]) for side in _SIDES)


def _why(reasons: Mapping[str, int]) -> Cell:
    return Cell(", ".join(f"{n:,} × {reason}" for reason, n in reasons.items()) or "–")
