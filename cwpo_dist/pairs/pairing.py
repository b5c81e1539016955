"""Responses to one prompt, rated or not, in; which two are compared, and pairs of them, out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from cwpo_dist.config import Pairing
from cwpo_dist.pairs.numbers import NO_NUMBERS, Numbers
from cwpo_dist.pairs.parsing import ParsedPair
from cwpo_dist.pairs.rejects import BadRow, Reason

MOST_PAIRS = 100_000  # of one prompt: all two of 447 responses


class Rated(Protocol):
    """A response, as far as it is compared: itself, a hash of it, and how good it is."""

    @property
    def text(self) -> Any:
        """Text or messages."""

    @property
    def hashed(self) -> str:
        """The digits that end its answer's id."""

    @property
    def good(self) -> float | None:
        """The higher, the better; None where nobody said."""


R = TypeVar("R", bound=Rated)


def is_tie(both: tuple[Rated, Rated]) -> bool:
    """Whether two responses are equally good."""
    return both[0].good is not None and both[0].good == both[1].good


def compared(responses: Sequence[R], pairing: Pairing) -> Sequence[tuple[R, R]]:
    """Which two are compared, the better one first.

    Of several that are equally good, a hash decides which comes first.

    Raises:
        BadRow: for more pairs than one prompt may have.
    """
    if pairing == "all" and len(responses) * (len(responses) - 1) > 2 * MOST_PAIRS:
        raise BadRow(
            Reason.TOO_MANY, "responses", f"{len(responses)} responses, all two of them compared"
        )
    ordered = sorted(responses, key=lambda one: (-(one.good or 0.0), one.hashed))
    if pairing == "all":
        return list(itertools.combinations(ordered, 2))
    if pairing == "adjacent":
        return list(itertools.pairwise(ordered))
    return [(ordered[0], ordered[-1])]


def pair_with(some: ParsedPair, better: Rated, worse: Rated, *, scored: bool) -> ParsedPair:
    """A pair of two responses that are no tie; without a label where nobody said.

    Args:
        some: a pair of the same prompt, with all that stands beside the answers.
        better: the better one.
        worse: the other.
        scored: what says so are scores, which the pair then has.
    """
    pair = replace(some, first=better.text, second=worse.text, label=None, numbers=NO_NUMBERS)
    if better.good is None or worse.good is None:
        return pair
    numbers = Numbers(score_first=better.good, score_second=worse.good) if scored else NO_NUMBERS
    return replace(pair, label="first", numbers=numbers)
