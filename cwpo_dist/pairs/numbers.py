"""A raw row in; the numbers that it brings along (a weight, a confidence, two scores) out.

They stand beside the pair whatever the run makes of them, so one that cannot be used takes no row
out: it is void, null in the record, and counted by its field and what is wrong with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from cwpo_dist.pairs.stored import Told

Own = Literal["weight", "confidence", "scores"]

# What a pair's own numbers say, and the columns of the pair record that say it.
COLUMNS: dict[Own, tuple[str, ...]] = {
    "weight": ("weight",),
    "confidence": ("confidence",),
    "scores": ("score_a", "score_b"),
}
RECORD = tuple(name for names in COLUMNS.values() for name in names)
NUMBER_FIELDS = (*RECORD, "score_chosen", "score_rejected")  # of a source's row
_LARGEST = 3.4e38  # about what single precision holds, in which training computes
_MOST = {"weight": _LARGEST, "confidence": 1.0}


@dataclass(frozen=True)
class Numbers:
    """A pair's own numbers, in its source's order of the answers.

    Attributes:
        weight: what multiplies its loss, 0 or more.
        confidence: C of its label, from 0 to 1 (a probability p of the better answer is 2p − 1).
        score_first: a score of the first answer, on a scale on which differences are log-odds.
        score_second: of the second.
        void: what could not be used, `field: why`.
    """

    weight: float | None = None
    confidence: float | None = None
    score_first: float | None = None
    score_second: float | None = None
    void: tuple[str, ...] = ()


NO_NUMBERS = Numbers()


def number_fields(answers: Sequence[str]) -> tuple[str, ...]:
    """The fields of numbers beside two answers: a score is named after its answer."""
    scores = (f"score_{name.removeprefix('response_')}" for name in answers)
    return ("weight", "confidence", *scores)


def own_numbers(value_of: Callable[[str], object], answers: Sequence[str]) -> Numbers:
    """Reads a row's numbers; null, and what CSV writes for it, is none and nothing wrong.

    Args:
        value_of: what stands in a field of the row; None where the source has no such field.
        answers: the fields of the two answers.
    """
    found: dict[str, float | None] = {}
    void: dict[str, str] = {}
    names = number_fields(answers)
    for name in names:
        try:
            found[name] = number(value_of(name), _MOST.get(name))
        except ValueError as why:
            found[name], void[name] = None, str(why)
    for one, other in (names[2:], names[:1:-1]):  # a score alone says nothing
        if found[one] is not None and found[other] is None:
            found[one] = None
            void.setdefault(other, "missing")
    weight, confidence, first, second = (found[name] for name in names)
    return Numbers(weight, confidence, first, second, tuple(map(": ".join, void.items())))


def number(value: object, most: float | None = None) -> float | None:
    """The value as a float; `most` also says that it must not be negative.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if value is None or value == "":
        return None
    found = _float(value)
    if not math.isfinite(found):
        raise ValueError("not finite")
    if abs(found) > _LARGEST:
        raise ValueError("too large")
    if most is not None and found < 0:
        raise ValueError("below 0")
    if most is not None and found > most:
        raise ValueError(f"above {most:g}")
    return found


def _float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        raise ValueError("no number")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError("no number") from None


def kinds(fields: Iterable[str]) -> Iterator[Own]:
    """What the numbers of these fields say; of two scores both must be there."""
    there = {"scores" if name == "score" else name for name in fields}  # of one response a row
    for own, names in COLUMNS.items():
        chosen = {"score_chosen", "score_rejected"} if own == "scores" else set(names)
        if set(names) <= there or chosen <= there or own in there:
            yield own


def usable(told: Told) -> Iterator[Own]:
    """What a pair can be weighed by: a weight or confidence is about its label."""
    if told.weight is not None and told.label is not None:
        yield "weight"
    if told.confidence is not None and told.label is not None:
        yield "confidence"
    if told.score_a is not None:
        yield "scores"


def agreed(copies: Sequence[Told]) -> tuple[Told, bool]:
    """The numbers of one pair from its copies: those that any has, where none has others.

    Returns:
        The first copy with these, and whether copies had different ones (then they are None).
    """
    weights = {told.weight for told in copies} - {None}
    confidences = {told.confidence for told in copies} - {None}
    scores = {(told.score_a, told.score_b) for told in copies} - {(None, None)}
    score_a, score_b = scores.pop() if len(scores) == 1 else (None, None)
    merged = copies[0]._replace(
        weight=weights.pop() if len(weights) == 1 else None,
        confidence=confidences.pop() if len(confidences) == 1 else None,
        score_a=score_a,
        score_b=score_b,
    )
    return merged, bool(weights or confidences or scores)
