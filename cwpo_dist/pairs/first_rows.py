"""The first rows of a source, its names and values: what decides how all its rows are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from cwpo_dist.pairs.layout import EACH, cell, not_null
from cwpo_dist.pairs.looks import Rest
from cwpo_dist.pairs.written import listed

_NONE = Rest()


@dataclass(frozen=True)
class FirstRows:
    """The first rows of a source.

    Attributes:
        field: where the configuration has the source.
        path: the source as the configuration spells it.
        rows: those that are objects, and some that lie behind, spread over all of it.
        rest: what was not looked at.
    """

    field: str
    path: str
    rows: tuple[Mapping[str, object], ...]
    rest: Rest = _NONE

    @cached_property
    def names(self) -> list[str]:
        """Its columns."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def values(self, path: str) -> list[object]:
        """What stands in a column, or at a path into a nested one, without nulls."""
        found = (not_null(cell(row, path)) for row in self.rows)
        each = EACH in path.split(".")  # into objects of which none has it
        return [value for value in found if value is not None and not (each and _is_void(value))]

    def items(self, path: str) -> list[object]:
        """What stands in the lists of a column, without nulls."""
        found = (item for value in self.values(path) for item in listed(value) or ())
        return [item for item in found if not_null(item) is not None]

    def texts(self, ours: str, path: str) -> list[object]:
        """The prompts or answers of a field, each by itself."""
        return self.items(path) if ours == "responses" else self.values(path)

    def has(self, path: str) -> bool:
        """Whether there is such a column, or a value at such a path."""
        return path in self.names or ("." in path and bool(self.values(path)))

    def may_have(self, path: str) -> bool:
        """Whether there is such a column, or may be one where nobody looked."""
        return self.has(path) or self.rest.may_have(path)

    def named(self, *names: str) -> list[str]:
        """The columns of these names, in their order, whatever their case, spaces and hyphens."""
        mine = {plain(name): name for name in reversed(self.names)}
        return [mine[name] for name in names if name in mine]


def _is_void(value: object) -> bool:
    return isinstance(value, list) and all(item is None for item in value)


def plain(name: str) -> str:
    """A column's name in small letters, with underscores."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")
