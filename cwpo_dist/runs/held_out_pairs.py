"""A run's pairs in; the few with human labels by which its training is followed out.

They come from `validation` where the run has such a split, else from the split that `evaluate`
judges, and no training reads them. They are the ones with the smallest ids, which are hashes: a
random sample, and the same one at every step, in every arm and after every restart.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from cwpo_dist.config import Split, TrainingConfig
from cwpo_dist.pairs.records import read_pairs
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.graph import Node, watched_split
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.storage import Store
from cwpo_dist.training.tasks import TaskError


@dataclass(frozen=True)
class WatchedPairs:
    """Finds them in a worker.

    Attributes:
        pairs: the output folder of `prepare`.
        shards: how many pair files it has.
        split: where they come from.
        most: how many at most.
    """

    pairs: Store
    shards: int
    split: Split
    most: int

    def labels(self) -> dict[str, str]:
        """Each one's human label, `a` or `b`, by pair id.

        Raises:
            TaskError: when the split has no labelled pair.
        """
        labels = dict(heapq.nsmallest(self.most, self._labelled()))
        if not labels:
            raise TaskError(
                f"eval_steps: no pair of split {self.split!r} has a human label to watch; set it "
                "to null, or raise prepare.validation_fraction"
            )
        return labels

    def _labelled(self) -> Iterator[tuple[str, str]]:
        for index in range(self.shards):
            rows = read_pairs(self.pairs, part("pairs", index), ["pair_id", "label", "split"])
            for row in rows.to_pylist():
                if row["split"] == self.split and row["label"] is not None:
                    yield row["pair_id"], row["label"]


def watched_pairs(context: Context, node: Node, training: TrainingConfig) -> WatchedPairs:
    """Those of a training stage."""
    split = watched_split(context.config)
    return WatchedPairs(context.prepared(node), context.shards(node), split, training.eval_pairs)
