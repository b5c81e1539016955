"""What one part of a check found: whether it is right, in words and in figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Finding:
    """The outcome of one part.

    Attributes:
        part: its name.
        right: whether what was computed is what it should be; None: a figure, or not checked.
        said: in a few words.
        figures: the numbers, by name with its unit.
        seconds: how long it took.
    """

    part: str
    right: bool | None
    said: str
    figures: Mapping[str, object] = field(default_factory=dict)
    seconds: float = 0.0


Outcome = tuple[bool | None, str, Mapping[str, object]]


def found(part: str, check: Callable[[], Outcome]) -> Finding:
    """Runs a part; one that fails is a finding, too, and the others go on."""
    started = time.perf_counter()
    try:
        right, said, figures = check()
    except torch.OutOfMemoryError as error:
        right, said, figures = False, f"out of memory: {error}", {}
    except Exception as error:  # noqa: BLE001 (whatever a driver, a kernel or a library may raise)
        lines = str(error).strip().splitlines() or [""]
        right, said, figures = False, f"{type(error).__name__}: {lines[0]}", {}
    return Finding(part, right, said, figures, round(time.perf_counter() - started, 2))
