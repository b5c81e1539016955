"""The rows that shards set aside, and why; and when they are too many for a stage to go on.

A row that cannot be read must not stop a fleet, and a stage that reads hardly any must not pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.templates import Fault
from cwpo_dist.pairs.records import REJECT_SCHEMA, Reject, table_of
from cwpo_dist.pairs.rejects import RejectsError
from cwpo_dist.scoring.pipeline import committed_rejects, part
from cwpo_dist.scoring.retries import OF_EACH, Input, T, kind_of
from cwpo_dist.storage import Store

ALIKE = "alike"  # the count of pairs whose answers are the same to the model
ALIKE_WHEN_CUT = "alike_when_cut"  # … as what they differ by is beyond `max_length`
_PAIRS = "pairs/"  # begins the source of a reject that is a pair
_TEMPLATE = "give a chat_template that writes them"
# Where it is not the template that helps.
_REMEDIES: dict[str, str] = {
    Fault.BEYOND: "resize the model's embeddings to its tokenizer",
    Fault.UNREAD: "give a model whose tokenizer reads them",
}


class SetAside:
    """Collects the answers that a shard sets aside, and the pairs of answers that are alike."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.answers: list[Reject] = []
        self.alike: list[Reject] = []

    def add(self, reason: str, row: Input[T]) -> None:
        """One more answer."""
        self.answers.append(_reject(reason, part("answers", self.index), row))

    def add_alike(self, reason: str, row: Input[T]) -> None:
        """One more pair whose answers are the same to the model."""
        self.alike.append(_reject(reason, part("pairs", self.index), row))

    def table(self) -> pa.Table:
        """They all, as rows of REJECT_SCHEMA."""
        return table_of([*self.answers, *self.alike], REJECT_SCHEMA)

    def counts(self) -> dict[str, int]:
        """All answers, and by reason; those over length apart, as good ones of another size.

        Pairs are counted apart: both answers of one that are alike may have a number.
        """
        reasons = Counter(kind_of(row.reason) for row in self.answers)
        over_length = reasons.pop(Fault.OVER_LENGTH, 0)
        of_each = {f"{OF_EACH}{reason}": number for reason, number in reasons.items()}
        told = {"over_length": over_length, "rejects": sum(reasons.values()), **of_each}
        pairs = Counter(kind_of(row.reason) for row in self.alike)
        return told | {ALIKE: pairs[Fault.IDENTICAL], ALIKE_WHEN_CUT: pairs[Fault.OVER_LENGTH]}


def _reject(reason: str, source: str, row: Input[T]) -> Reject:
    return Reject(reason, None, source, row.position, row.name)


def without_pairs(rejects: pa.Table) -> pa.Table:
    """Those rows of REJECT_SCHEMA that are answers."""
    return rejects.filter(pc.invert(pc.starts_with(rejects["source"], _PAIRS)))


def reasons(store: Store, name: str, shards: Iterable[int]) -> dict[str, str]:
    """Why the committed shards of a job set answers aside, by the answers' ids.

    Args:
        store: its output folder.
        name: that of its files.
        shards: which.
    """
    return {
        row.row: kind_of(row.reason)
        for index in shards
        for row in committed_rejects(store, part(name, index))
        if not row.source.startswith(_PAIRS)
    }


@dataclass(frozen=True)
class Limit:
    """How much a stage may set aside.

    Attributes:
        stage: its name.
        field: the setting that holds `fraction`.
        fraction: of its answers, and of its pairs.
        answers: how many different ones there are.
        pairs: how many there are.
        output: the stage's folder.
    """

    stage: str
    field: str
    fraction: float
    answers: int
    pairs: int
    output: Store

    def check(self, counts: Mapping[str, int], *, whole: bool = False) -> None:
        """Stops the stage where it set aside too many.

        Args:
            counts: of its shards, as `SetAside.counts` gives them, with `rows_in`.
            whole: of all of them, and not of the first alone.

        Raises:
            RejectsError: naming the reasons, the field and what can be done.
        """
        found = {k.removeprefix(OF_EACH): n for k, n in counts.items() if k.startswith(OF_EACH)}
        alike = {str(Fault.IDENTICAL): counts.get(ALIKE, 0)}
        # An answer of several shards, or splits, is read in each, or counted in each.
        read = counts["rows_in"] if whole else max(self.answers, counts.get("rows_in", 0))
        self._check("answers", counts.get("rejects", 0), read, found)
        self._check("pairs", alike[Fault.IDENTICAL], self.pairs, alike)

    def _check(self, what: str, rejects: int, of: int, found: Mapping[str, int]) -> None:
        if rejects <= self.fraction * of and not (what == "pairs" and rejects == of > 0):
            return
        most = Counter(found).most_common(3)
        reasons = ", ".join(f"{n} × {reason}" for reason, n in most)
        lasting = bool(most) and lasts(most[0][0])
        remedy = _REMEDIES.get(most[0][0], _TEMPLATE) if lasting else "mend the model"
        again = "" if lasting or self.stage != "annotate" else " and give --retry-rejects"
        raise RejectsError(
            f"{self.stage}: {rejects} of {of} {what} were set aside{reasons and f' ({reasons})'}, "
            f"more than {self.field} {self.fraction:g} allows; see {self.output.uri}/rejects, "
            f"{remedy}{again}, or raise the fraction"
        )


def refuse_none(stage: str, model: ModelConfig, counts: Mapping[str, int]) -> None:
    """Stops a stage that has made nothing of any answer, and would not on another try either.

    Args:
        stage: its name.
        model: that should have read them.
        counts: of all shards.

    Raises:
        RejectsError: naming the field and what can be done.
    """
    reasons = [k.removeprefix(OF_EACH) for k in counts if k.startswith(OF_EACH)]
    if counts.get("rows") or not all(map(lasts, reasons)):
        return
    too_long, rejects = counts.get("over_length", 0), counts.get("rejects", 0)
    if not too_long and not rejects:
        raise RejectsError(
            f"{stage}: prepare left it no answer to read; see its rejects and splits"
        )
    name = repr(model.model_name_or_path)
    raise RejectsError(
        f"{stage}: no answer is left: {too_long} are longer than max_length {model.max_length} of "
        f"{name} (raise it, or set over_length to truncate), {rejects} are set aside"
    )


def passing(counts: Mapping[str, int]) -> dict[str, int]:
    """Of counts those of one reason that another try may end."""
    of_each = {name: n for name, n in counts.items() if name.startswith(OF_EACH)}
    return {name: n for name, n in of_each.items() if not lasts(name.removeprefix(OF_EACH))}


def lasts(reason: str) -> bool:
    """Whether another try at a row that was set aside would end the same way."""
    return kind_of(reason) in set(Fault)
