"""The first rows of a source and its label columns in; what the values of labels mean out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cwpo_dist.config import ConfigError, LabelColumn
from cwpo_dist.pairs import refusals
from cwpo_dist.pairs.first_rows import FirstRows
from cwpo_dist.pairs.layout import EITHER
from cwpo_dist.pairs.rejects import printable
from cwpo_dist.pairs.verdicts import ValueMap, counts_otherwise, found_in, mapped, spelled


def label_values(
    first: FirstRows,
    columns: Mapping[str, str],
    labels: Sequence[str],
    label: str | LabelColumn | None,
    most_unknown: float,
) -> ValueMap:
    """What the values of the label columns mean.

    Args:
        first: the source's first rows.
        columns: our field → their column.
        labels: the label columns.
        label: what the configuration says of them.
        most_unknown: the share of labels that may have a value of no known meaning.

    Raises:
        ConfigError: for more of such values, and for a map that says two things of one.
    """
    seen = Counter(spelled(value) for name in labels for value in first.values(name))
    values = _meanings(first, columns, seen, label)
    unknown = {value: count for value, count in seen.items() if value not in values.meanings}
    share = sum(unknown.values()) / max(seen.total(), 1)
    if share == 1 or share > most_unknown or (not values.given and counts_otherwise(seen, values)):
        raise refusals.unknown_values(first, labels, seen, values)
    counted = {printable(str(value)): count for value, count in seen.most_common()}
    blank = len(first.rows) * len(labels) - seen.total()
    return replace(values, seen=counted, blank=blank)


def _meanings(
    first: FirstRows,
    columns: Mapping[str, str],
    seen: Counter[str | None],
    label: str | LabelColumn | None,
) -> ValueMap:
    """The map of a label's values: the one given, else what leaves no doubt."""
    given = label.values() if isinstance(label, LabelColumn) else {}
    if not given:
        return found_in(seen, *(columns[name] for name in EITHER))
    try:
        return mapped(given)
    except ValueError as error:
        raise ConfigError(f"{first.field}.columns.label: {error}; give each value once") from None
