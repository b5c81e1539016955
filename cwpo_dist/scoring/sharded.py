"""A sharded job and a model that several ranks hold in; every missing shard committed out."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from cwpo_dist.scoring.forward import Ranks
from cwpo_dist.scoring.pipeline import ShardJob, commit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Together:
    """All ranks do one shard after another, as an actor would; rank 0 commits it. Picklable.

    A row that makes the model fail ends the run, unlike in an actor: its rank fails alone, while
    the others wait for it.

    Attributes:
        job: what is to be done.
    """

    job: ShardJob

    def __call__(self, ranks: Ranks) -> None:
        """Called on all ranks."""
        worker = self.job.make_worker(ranks)
        missing = ranks.agreed(self.job.missing() if ranks.rank == 0 else [])
        for done, index in enumerate(missing):
            ranks.check_stop()
            output = worker(index, worker.read(index))
            if ranks.rank == 0:
                commit(self.job, index, output)
                logger.info("%s: %d of %d shards", self.job.name, done + 1, len(missing))
