"""Tasks that workers of test_workers.py load, and mishaps that befall them in mid-step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import zero_ranks
from torch import Tensor

from cwpo_dist.lm.tokens import Encoder
from cwpo_dist.training.tasks import Preference, Task, TaskError
from cwpo_dist.training.worker import told_to_stop


@dataclass(frozen=True)
class Mishap:
    """Befalls one rank once, within its forward pass over a given pair of a given step.

    Attributes:
        kind: the name of a signal, or 'hang'.
        rank: whom.
        step: the first step of a process, from 0, in which it can happen.
        folder: where a mark says that it has.
    """

    kind: str
    rank: int
    step: int
    folder: Path

    def befall(self, step: int) -> None:
        mark = self.folder / f"{self.kind}-{self.rank}-{self.step}"
        if dist.get_rank() != self.rank or step < self.step or mark.exists():
            return
        mark.write_text(str(step))
        if self.kind == "hang":
            time.sleep(3600)
        os.kill(os.getpid(), getattr(signal, self.kind))
        # Python hears of a signal when its main thread, Ray's, next runs: at the controller's poll.
        told_to_stop.wait(30)


@dataclass(frozen=True)
class Unlucky(Preference):
    """Preferences with mishaps; its losses are those of `Preference`."""

    mishaps: tuple[Mishap, ...] = ()

    def denominator(self, indices: Sequence[int]) -> float:
        """Called once a step, before its forward passes."""
        self.__dict__["steps"] = self.__dict__.get("steps", -1) + 1
        return super().denominator(indices)

    def losses(self, outputs_PK: Tensor, indices: Sequence[int]) -> Tensor:
        """In the middle of a step: forward done, backward not."""
        if outputs_PK.requires_grad:
            for mishap in self.mishaps:
                mishap.befall(self.__dict__["steps"])
        return super().losses(outputs_PK, indices)


def preferences(encoder: Encoder, mishaps: tuple[Mishap, ...] = ()) -> Task:
    plain: Any = zero_ranks.make_task("none")
    fields = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    return Unlucky(**fields, mishaps=mishaps)


def nothing(encoder: Encoder) -> Task:
    raise TaskError("no pairs to train on: the test wants it so")


@dataclass(frozen=True)
class Poisoned(Preference):
    """Its loss is not finite from the start."""

    def losses(self, outputs_PK: Tensor, indices: Sequence[int]) -> Tensor:
        return super().losses(outputs_PK, indices) * float("nan")


def poisoned(encoder: Encoder) -> Task:
    plain: Any = zero_ranks.make_task("none")
    return Poisoned(**{name: getattr(plain, name) for name in plain.__dataclass_fields__})
