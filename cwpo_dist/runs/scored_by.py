"""A sharded job about a model in; its shards done, by actors or by workers that share the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cwpo_dist.config import ModelConfig, PoolConfig, TrainingConfig
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.scoring.driver import run_shards
from cwpo_dist.scoring.pipeline import ShardJob, total_counts
from cwpo_dist.scoring.sharded import Together
from cwpo_dist.training.group import FrozenSpec, apply_frozen

Placed = PoolConfig | TrainingConfig  # a section that says where work is done


@dataclass(frozen=True)
class Scorers:
    """Who applies a model.

    Attributes:
        section: whose actors do it, each with a model of its own.
        training: the section whose workers do it together, where a model exceeds one device.
    """

    section: PoolConfig
    training: TrainingConfig

    @property
    def workers(self) -> TrainingConfig | None:
        """Those that share the model; None: actors do it."""
        return self.training if self.section.sharded else None

    @property
    def place(self) -> Placed:
        """The section that says where."""
        return self.workers or self.section

    @property
    def number(self) -> int:
        """How many of them there are, at most."""
        return self.section.most_actors if self.workers is None else self.workers.max_workers

    def run(
        self,
        job: ShardJob,
        model: ModelConfig,
        load: Callable[[ModelConfig, torch.device], AnswerLogProbs | AnswerScores],
        check: Callable[[Mapping[str, int]], None] | None = None,
    ) -> dict[str, Any]:
        """Does the missing shards and returns the counts of all, as `run_shards`.

        Args:
            job: whose worker can be made around ranks.
            model: that it is about.
            load: makes the module that ranks share.
            check: of what actors have counted so far.

        Raises:
            ConfigError, ShardError: as `run_shards`; and as `apply_frozen`.
        """
        if self.workers is None:
            return run_shards(job, self.section.one_gpu_an_actor(), check)
        if job.missing():
            work = Together(job)
            apply_frozen(FrozenSpec(job.name, job.output, self.workers, model, load, work))
        return dict(total_counts(job))
