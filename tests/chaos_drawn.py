"""A seed in, blows at random to jobs on a cluster out; what became of them in, a table out."""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FAULTS = ("worker", "raylet", "cut", "driver", "head")
STAGES = ("annotate", "reference", "fit", "align")
DRAWN = {
    "worker": "a worker killed",
    "many": "30 % of the workers killed at once",
    "stop": "a worker stopped for 20 s",
    "raylet": "a raylet killed",
    "cut": "network cut, back after 20 s",
    "driver": "the driver killed",
    "head": "the head killed, started again",
}
OUTCOMES = ("finished", "resumed", "failed")
LATEST = 0.9  # later the stage may be over before the blow falls


@dataclass(frozen=True)
class Blow:
    """What befalls which stage, and when.

    Attributes:
        fault, stage: which.
        moment: the share of the stage's commits that are there; None: the first few are.
        number: of a drawn one.
    """

    fault: str
    stage: str
    moment: float | None = None
    number: int = 0

    @property
    def actors(self) -> int:
        """That score; of a drawn one so many that 30 % are two. Ranks of a training are two."""
        return 2 if self.moment is None else 4

    @property
    def name(self) -> str:
        """Of its run directory."""
        return f"{self.fault}-{self.stage}" + (f"-{self.number}" if self.number else "")


def drawn(blows: int, seed: int) -> list[Blow]:
    """So many blows; the same seed gives the same ones."""
    draw = random.Random(seed)
    return [
        Blow(draw.choice(list(DRAWN)), draw.choice(STAGES), draw.uniform(0, LATEST), number)
        for number in range(1, blows + 1)
    ]


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each fault and stage."""
    head = "blow | stage | blows | lost | there twice | finished by itself | resumed | failed | "
    head += "recovery, median and slowest, s"
    by_kind: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for cell in cells:
        if cell["outcome"] != "too late":
            by_kind[cell["fault"], cell["stage"]].append(cell)
    rows = [f"| {head} |", "|" + "---|" * 9]
    for (fault, stage), fell in sorted(by_kind.items()):
        sums = [sum(len(cell.get(what, ())) for cell in fell) for what in ("lost", "twice")]
        ends = [sum(cell["outcome"] == how for cell in fell) for how in OUTCOMES]
        took = [cell["recovery_s"] for cell in fell if "recovery_s" in cell]
        slow = f"{statistics.median(took):.1f}, {max(took):.1f}" if took else "–"
        told = [DRAWN[fault], f"`{stage}`", len(fell), *sums, *ends, slow]
        rows.append(f"| {' | '.join(map(str, told))} |")
    return "\n".join(rows) + "\n"
