"""Tasks that workers of tests load, and mishaps that befall them in mid-step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import zero_cases
from torch import Tensor

from cwpo_dist.lm.encoder import Encoder
from cwpo_dist.training.process_group import told_to_stop
from cwpo_dist.training.tasks import Preference, Task, TaskError


@dataclass(frozen=True)
class Mishap:
    """Befalls one rank once, within its forward pass over a given pair of a given step.

    Attributes:
        kind: the name of a signal.
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
    return Unlucky(**_plain_fields(), mishaps=mishaps)


def nothing(encoder: Encoder) -> Task:
    raise TaskError("no pairs to train on: the test wants it so")


@dataclass(frozen=True)
class Poisoned(Unlucky):
    """Its loss is not finite from the fourth step on."""

    def losses(self, outputs_PK: Tensor, indices: Sequence[int]) -> Tensor:
        poison = float("nan") if self.__dict__["steps"] >= 3 else 1.0
        return super().losses(outputs_PK, indices) * poison


def poisoned(encoder: Encoder) -> Task:
    return Poisoned(**_plain_fields())


@dataclass(frozen=True)
class Watched(Preference):
    """Says in the folder which world does which step; takes its time until told to hurry."""

    folder: Path = Path()

    def denominator(self, indices: Sequence[int]) -> float:
        """Called once a step, before its forward passes."""
        if dist.get_rank() == 0:
            marks = len(list(self.folder.glob("world-*")))
            (self.folder / f"world-{dist.get_world_size()}-{marks}").touch()
        if not (self.folder / "hurry").exists():
            time.sleep(0.3)
        return super().denominator(indices)


def watched(encoder: Encoder, folder: Path) -> Task:
    return Watched(**_plain_fields(), folder=folder)


def _plain_fields() -> dict[str, Any]:
    plain: Any = zero_cases.make_task("none")
    return {name: getattr(plain, name) for name in plain.__dataclass_fields__}
