"""A frozen model that all ranks of a group apply together (ZeRO-3), as it exceeds one device.

Each forward pass gathers the model layer by layer, so every rank runs the same number of them, and
what the work decides, rank 0 decides for all: a rank that ran one pass less would leave the others
waiting in a gather for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cwpo_dist.config import ModelConfig, TrainingConfig
from cwpo_dist.lm.load_settings import dtype_of
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.lm.rows import RowBatch
from cwpo_dist.stop_signals import Preempted
from cwpo_dist.storage import Store
from cwpo_dist.training.lease import LeaseToken
from cwpo_dist.training.process_group import told_to_stop
from cwpo_dist.training.rank import Watchdog

Decided = TypeVar("Decided")


@dataclass(frozen=True)
class FrozenSpec:
    """What a group of ranks does with a frozen model; picklable.

    Attributes:
        name: of the stage, for progress lines.
        store: the stage's folder, where all nodes can reach it.
        config: of the ranks; its ZeRO stage counts as 3.
        model: a policy, or a reward model.
        load: makes the module that is applied.
        work: called once on each rank.
    """

    name: str
    store: Store
    config: TrainingConfig
    model: ModelConfig
    load: Callable[[ModelConfig, torch.device], AnswerLogProbs | AnswerScores]
    work: Callable[[Frozen], None]

    def run(self, token: LeaseToken, device: torch.device, watchdog: Watchdog) -> dict[str, object]:
        """One rank's part; the process group is there already.

        Args:
            token: of this group.
            device: this rank's.
            watchdog: told of every forward pass.

        Raises:
            Preempted: on all ranks alike, once they were told to stop.
        """
        self.work(Frozen(self, token, device, watchdog))
        return {}


class Frozen:
    """A model whose weights are spread over all ranks of the process group.

    Attributes:
        module: rows in, one number an answer out; to be called through `forward`.
        device: where batches go.
        rank: of this process.
        world_size: how many ranks there are.
    """

    def __init__(
        self, spec: FrozenSpec, token: LeaseToken, device: torch.device, watchdog: Watchdog
    ) -> None:
        from cwpo_dist.training import deepspeed_engine as engine  # not above: it imports deepspeed

        self._name, self._token, self._watchdog = spec.name, token, watchdog
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        settings = engine.frozen_config(spec.config, dtype_of(spec.model, device))
        with engine.sharded_loading(settings):
            self.module = spec.load(spec.model, device).requires_grad_(False).eval()
        self._engine = engine.wrap_frozen(self.module, settings)
        self.device = torch.device(self._engine.device)

    def forward(self, batch: RowBatch) -> Tensor:
        """One number an answer [A] of this rank's batch; a collective, and a sign of life."""
        self._watchdog.beat()
        with torch.no_grad():
            output_A: Tensor = self._engine(batch.to(self.device))
        return output_A.float()

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over ranks."""
        dist.all_reduce(numbers)
        return numbers

    def agreed(self, value: Decided) -> Decided:
        """What rank 0 has, on all ranks."""
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def check_stop(self) -> None:
        """Returns unless a rank, or the driver, was told to stop; called on all ranks together.

        Raises:
            Preempted: on all ranks alike.
        """
        if self.rank == 0 and self._token.asked_to_stop():
            told_to_stop.set()
        wanted = torch.tensor([float(told_to_stop.is_set())], device=self.device)
        if self.total(wanted):
            raise Preempted(f"{self._name}: told to stop; a rerun does what is left")
