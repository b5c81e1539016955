"""Why a model read no sampled answers in; how many prompts that leaves out of a figure, out.

Long answers are the first to be left out, so that a figure of the others is no figure of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cwpo_dist.evaluation.shares import AsDict

Reasons = tuple[str | None, str | None]  # of the aligned answer, of the baseline's; None: none


@dataclass(frozen=True)
class LeftOut(AsDict):
    """Prompts that a figure of sampled answers is not of, and why.

    Attributes:
        prompts: how many.
        aligned: what kept an answer of the aligned policy out, and of how many: `over_length`, or
            a reason as in rejects/.
        baseline: the same of the baseline's; a prompt may lack both.
    """

    prompts: int = 0
    aligned: Mapping[str, int] = field(default_factory=dict)
    baseline: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, reasons: Iterable[Reasons]) -> LeftOut:
        """Counts prompts, by the reasons of each."""
        told = list(reasons)
        aligned, baseline = (Counter(each[side] for each in told) for side in (0, 1))
        return cls(len(told), _known(aligned), _known(baseline))


def _known(counted: Counter[str | None]) -> dict[str, int]:
    """Reasons in an order of their own, so that equal counts are equal bytes."""
    return {reason: counted[reason] for reason in sorted(filter(None, counted))}


def in_words(found: LeftOut) -> str:
    """Whose answers lack what: `aligned: 3 × over_length; baseline: 1 × over_length`."""
    sides = {"aligned": found.aligned, "baseline": found.baseline}
    return "; ".join(
        f"{side}: {', '.join(f'{n:,} × {reason}' for reason, n in told.items())}"
        for side, told in sides.items()
        if told
    )
