"""The rows that shards set aside, and why; and when they are too many for a stage to go on.

A row that cannot be read must not stop a fleet, and a stage that reads hardly any must not pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pyarrow as pa

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.templates import Fault
from cwpo_dist.pairs.records import REJECT_SCHEMA, Reject, table_of
from cwpo_dist.pairs.rejects import RejectsError
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.scoring.retries import Input, T
from cwpo_dist.storage import Store

_OF_EACH = "rejects: "  # begins the name of a count of rejects for one reason


class SetAside:
    """Collects the rows that a shard sets aside, and why."""

    def __init__(self, index: int) -> None:
        self.source = part("pairs", index)
        self.rows: list[Reject] = []

    def add(self, reason: str, row: Input[T]) -> None:
        """One more row."""
        self.rows.append(Reject(reason, None, self.source, row.position, row.pair_id))

    def table(self) -> pa.Table:
        """They all, as rows of REJECT_SCHEMA."""
        return table_of(self.rows, REJECT_SCHEMA)

    def counts(self) -> dict[str, int]:
        """All of them, and by reason; those over length apart, as good rows of another size."""
        reasons = Counter(_kind(row.reason) for row in self.rows)
        over_length = reasons.pop(Fault.OVER_LENGTH, 0)
        of_each = {f"{_OF_EACH}{reason}": number for reason, number in reasons.items()}
        return {"over_length": over_length, "rejects": sum(reasons.values()), **of_each}


def refuse_past(
    stage: str, field: str, fraction: float, pairs: int, output: Store, counts: Mapping[str, int]
) -> None:
    """Stops a stage that had to set aside too many of its pairs.

    Args:
        stage: its name.
        field: the setting that holds `fraction`.
        fraction: how many may be.
        pairs: how many there are.
        output: the stage's folder.
        counts: of its shards, as `SetAside.counts` gives them.

    Raises:
        RejectsError: naming the reasons, the field and what can be done.
    """
    rejects = counts.get("rejects", 0)
    if rejects <= fraction * pairs:
        return
    found = {k.removeprefix(_OF_EACH): n for k, n in counts.items() if k.startswith(_OF_EACH)}
    reasons = ", ".join(f"{number} × {reason}" for reason, number in Counter(found).most_common(3))
    lasting = any(lasts(reason) for reason in found)
    remedy = "give a chat_template that writes them" if lasting else "mend the model"
    again = "" if lasting or stage != "annotate" else " and give --retry-rejects"
    raise RejectsError(
        f"{stage}: {rejects} of {pairs} pairs were set aside{reasons and f' ({reasons})'}, more "
        f"than {field} {fraction:g} allows; see {output.uri}/rejects, {remedy}{again}, or raise "
        "the fraction"
    )


def refuse_none(stage: str, model: ModelConfig, counts: Mapping[str, int]) -> None:
    """Stops a stage that has made nothing of any pair, and would not on another try either.

    Args:
        stage: its name.
        model: that should have read them.
        counts: of all shards.

    Raises:
        RejectsError: naming the field and what can be done.
    """
    reasons = [k.removeprefix(_OF_EACH) for k in counts if k.startswith(_OF_EACH)]
    if counts.get("rows") or not all(map(lasts, reasons)):
        return
    too_long, rejects = counts.get("over_length", 0), counts.get("rejects", 0)
    if not too_long and not rejects:
        raise RejectsError(f"{stage}: prepare left it no pair to read; see its rejects and splits")
    name = repr(model.model_name_or_path)
    raise RejectsError(
        f"{stage}: no pair is left: {too_long} are longer than max_length {model.max_length} of "
        f"{name} (raise it, or set over_length to truncate), {rejects} are set aside"
    )


def lasts(reason: str) -> bool:
    """Whether another try at a row that was set aside would end the same way."""
    return _kind(reason) in set(Fault)


def _kind(reason: str) -> str:
    return reason.partition(": ")[0]
