"""What counts of rows have in common: those of two parts add up, those of a part are scaled up."""

from __future__ import annotations

from typing import Self


class Counts:
    """For dataclasses whose fields are whole numbers."""

    def __add__(self, other: Self) -> Self:
        """Both together."""
        theirs = vars(other)
        return type(self)(**{name: n + theirs[name] for name, n in vars(self).items()})

    def scaled(self, scale: float) -> Self:
        """Counts of a part, as they will be of the whole."""
        return type(self)(**{name: round(n * scale) for name, n in vars(self).items()})
