"""What numbers the data have of their own in; which of them act, and whether they can, out.

`plan` asks with what it reads of the sources, the stages with what `prepare` counted: one answer
for both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from cwpo_dist.pairs.numbers import COLUMNS, Own

NAMES = {own: " and ".join(columns) for own, columns in COLUMNS.items()}


class OwnNumbersError(ValueError):
    """The data's own numbers cannot be used; the message names column, count and remedy."""


def chosen(column: Own | None, there: Collection[Own]) -> Own:
    """The kind of numbers that acts.

    Args:
        column: `weigh.column`.
        there: what the sources have columns for.

    Raises:
        OwnNumbersError: where they lack it, or have several and none is named.
    """
    kinds = [own for own in COLUMNS if own in there]
    have = " and ".join(NAMES[own] for own in kinds) or "no numbers of their own"
    if column is None and len(kinds) == 1:
        return kinds[0]
    if column is None:
        names = " or ".join(kinds) or "map one under `columns`"
        raise OwnNumbersError(f"weigh.column: the data have {have}; say which acts: {names}")
    if column not in there:
        raise OwnNumbersError(f"weigh.column: {column!r}, but the data have {have}")
    return column


def void_of(own: Own, void: Mapping[str, int]) -> dict[str, int]:
    """How many numbers of a kind cannot be used, by field and why."""
    fields = {own} if own != "scores" else {"score_a", "score_b", "score_chosen", "score_rejected"}
    return {why: count for why, count in void.items() if why.partition(":")[0] in fields}


def void_fault(own: Own, void: Mapping[str, int], rows: int, most: float) -> str | None:
    """Too many numbers that cannot be used, in words; None where they are few."""
    bad = void_of(own, void)
    if sum(bad.values()) <= most * rows:
        return None
    named = ", ".join(f"{why} ({count:,})" for why, count in bad.items())
    return (
        f"weigh: of {rows:,} rows' own numbers too many cannot be used: {named}; more than "
        f"prepare.max_reject_fraction={most:g} of them. A weight is 0 or more, a confidence from 0 "
        "to 1, a score finite, none is null; correct them"
    )
