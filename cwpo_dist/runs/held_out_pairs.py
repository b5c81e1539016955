"""The few pairs with human labels by which a training is followed: never trained on, cheap to read.

They come from `validation` where the run has such a split, else from the split that `evaluate`
judges: those with the smallest ids, one of each prompt before any second one. Ids are hashes, so
that is a random sample of prompts, and the same one at every step, in every arm and after every
restart. Pair files are sorted by id from the first to the last, so they stand in the first files,
and no rank reads the others, unless there are fewer prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

from cwpo_dist.config import Split, TrainingConfig
from cwpo_dist.pairs.chosen import Label
from cwpo_dist.pairs.preferences import Choice
from cwpo_dist.pairs.records import one_a_prompt
from cwpo_dist.pairs.stored import read_judgements
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.storage import Store
from cwpo_dist.training.tasks import TaskError
from cwpo_dist.training.token_file import content


@dataclass(frozen=True)
class HeldOutPairs:
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

    @cached_property
    def labels(self) -> dict[int, dict[str, Label]]:
        """By shard, of those that hold any: each one's human label by pair id.

        Raises:
            TaskError: when the split has no labelled pair.
        """
        found: dict[int, dict[str, Label]] = {}
        for index, pair_id, label in one_a_prompt(self._labelled(), itemgetter(1), self.most):
            found.setdefault(index, {})[pair_id] = label
        if not found:
            raise TaskError(
                f"eval_steps: no pair of split {self.split!r} has a human label to follow training "
                f"by; set it to null, or give a source of labelled pairs with into: {self.split}"
            )
        return found

    def _labelled(self) -> Iterator[tuple[int, str, Label]]:
        for index in range(self.shards):
            for pair in read_judgements(self.pairs, part("pairs", index)):
                if pair.split == self.split and pair.label is not None:
                    yield index, pair.pair_id, pair.label

    def identity(self) -> object:
        """What decides which they are."""
        return [content(self.pairs), self.split, self.most]

    def read(self, index: int) -> list[Choice]:
        """What people chose of those of one shard, with weight 1."""
        labels = self.labels.get(index, {})
        return [Choice(pair_id, label, weight=1.0) for pair_id, label in labels.items()]


def held_out_pairs(
    context: Context, node: Node, training: TrainingConfig, split: Split
) -> HeldOutPairs:
    """Those of a training stage."""
    return HeldOutPairs(context.prepared(node), context.shards(node), split, training.eval_pairs)
