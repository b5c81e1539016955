"""The one place where answers a and b become the chosen and the rejected one.

A label spelled out twice is a label that gets turned round once. Whatever belongs to the two
answers of a pair (texts, tokens, scores, votes) is put in order here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Label = Literal["a", "b"]  # which answer of a pair is the better one
T = TypeVar("T")

OTHER: dict[Label, Label] = {"a": "b", "b": "a"}


def chosen_first(label: Label | None, a: T, b: T) -> tuple[T, T]:
    """What belongs to the chosen answer, then what belongs to the other; (a, b) without a label.

    It is its own inverse: given (chosen, rejected) it returns (a, b).
    """
    return (b, a) if label == "b" else (a, b)


def signs(labels: Sequence[Label | None]) -> NDArray[np.float64]:
    """1 for label a, −1 for b, 0 for none: a difference a − b times it is chosen − rejected.

    Raises:
        ValueError: for another label.
    """
    for label in labels:
        if label not in ("a", "b", None):
            raise ValueError(f"label: {label!r} is unknown; use 'a', 'b' or null")
    found = [0.0 if label is None else chosen_first(label, 1.0, -1.0)[0] for label in labels]
    return np.array(found, dtype=np.float64)
