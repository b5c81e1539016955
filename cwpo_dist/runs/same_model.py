"""Outputs of a stage in; what the same model said in other ones of the run directory out.

A score, or a log-prob, is of an answer and a model, whatever pairs, splits or seed it was made for.
So each output says which model it is of before its first number, and what lies in the others of
that model is copied.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray

from cwpo_dist.config import ModelConfig, TrainingConfig
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.splits import Fold
from cwpo_dist.placement import alive_machines, gpus, this_machine, uses_gpu
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node
from cwpo_dist.runs.scored_by import Placed
from cwpo_dist.runs.stage import Scoring
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.earlier_scores import EarlierScores, NewAnswersWorker, ranged_files
from cwpo_dist.scoring.pipeline import ShardJob
from cwpo_dist.storage import Store

logger = logging.getLogger(__name__)

_READ_AT_ONCE = 32


@dataclass(frozen=True)
class SameModel:
    """How a stage knows its outputs of one model.

    Attributes:
        file: of an output, that says which model it is of.
        folder: its files of numbers.
        did: what the model did with the answers, in a word for people.
        who: what `file` says: a digest of all that decides an answer's number.
    """

    file: str
    folder: str
    did: str
    who: Callable[[Context, Node[Any]], str]

    def only_new(
        self, context: Context, node: Node[Any], job: ShardJob, answers: AnswersIn
    ) -> ShardJob:
        """The job without what the same model said in other outputs: that is copied.

        Args:
            context: the run.
            node: whose job it is; from now on it says which model it is of.
            job: all of it.
            answers: that it reads.
        """
        self.say(context, node)
        earlier = self.earlier(context, node)
        if not earlier.files:
            return job
        worker = partial(NewAnswersWorker, earlier, answers, job.make_worker)
        return replace(job, make_worker=worker)

    def say(self, context: Context, node: Node[Any]) -> None:
        """Writes down whose numbers an output has; one that was begun by another one has both's."""
        place, who = context.place(node), self.who(context, node)
        if place.create_json(self.file, who) or place.read_json(self.file) == who:
            return
        place.create_json(self._mixed, who)
        logger.warning(
            "%s: begun in another precision (on other devices), with other weights or by another "
            "version of cwpo_dist; to have all numbers of one kind, remove it and run again",
            place.uri,
        )

    @property
    def _mixed(self) -> str:
        """The file of an output that has numbers of two models, and that nobody copies from."""
        return f"mixed.{self.file}"

    def less_earlier(
        self,
        context: Context,
        node: Node[Any],
        work: Scoring,
        counted: Census,
        fold: Fold | None = None,
    ) -> Scoring:
        """The work that is left of a pass, about, by a look-up of some answers.

        Outputs that were planned before this one in the same context count as made, so each is
        planned once.

        Args:
            context: the run.
            node: whose work it is, on its splits.
            work: on all answers.
            counted: what the sources hold.
            fold: whose answers they are; None: of all.
        """
        if context.done(node):
            return work
        earlier, splits = self.earlier(context, node), node.settings.splits
        foreseen: set[str] = set()
        if not _trainings(node):  # one that is trained is mostly asked once, and known by reading
            foreseen = context.foreseen.setdefault(self.who(context, node), foreseen)
        share = share_in(earlier, counted, splits, fold, foreseen)
        foreseen.update(*_sampled(counted, splits, fold).values())
        if not (before := round(work.answers * share)):
            return work
        left = work.answers - before
        return replace(
            work,
            text=f"{work.text}, about {before:,} of them {self.did} before",
            prompts=round(work.prompts * left / work.answers),  # of new answers mostly new, too
            answers=left,
        )

    def earlier(self, context: Context, node: Node[Any]) -> EarlierScores:
        """What the same model said in other outputs; one that is to be trained has said nothing."""
        if not all(map(context.done, _trainings(node))):
            return EarlierScores(())
        return EarlierScores(ranged_files(self._others(context, node), self.folder))

    def _others(self, context: Context, node: Node[Any]) -> list[Store]:
        """The other outputs in this run directory that are of the same model.

        They may be unfinished: a file of numbers is final once it is there. The largest come first,
        as they are likely to hold most.
        """
        stage = context.root.child(node.stage)
        names = [name.split("/") for name in stage.names()]
        files = Counter(key for key, *below in names if below[:1] == [self.folder])
        say = {key for key, *below in names if below == [self.file]} - {node.key}
        say -= {key for key, *below in names if below == [self._mixed]}
        keys = sorted(files.keys() & say, key=lambda key: (-files[key], key))
        if not keys:
            return []
        stores, who = [stage.child(key) for key in keys], self.who(context, node)
        with ThreadPoolExecutor(_READ_AT_ONCE) as threads:  # each is a wait for storage
            said = threads.map(lambda store: store.read_json(self.file), stores)
            return [store for store, one in zip(stores, said, strict=True) if one == who]


def _trainings(node: Node[Any]) -> list[Node[Any]]:
    """What leaves the model; empty: it was given."""
    return [given for given in node.inputs.values() if given.settings.trains]


def _sampled(counted: Census, splits: Sequence[str], fold: Fold | None) -> dict[str, set[str]]:
    """Some answers of splits, or of a fold of them."""
    return {
        split: {name for name in counted.sampled_ids.get(split, ()) if fold is None or name in fold}
        for split in splits
    }


def share_in(
    earlier: EarlierScores,
    counted: Census,
    splits: Sequence[str],
    fold: Fold | None = None,
    foreseen: Collection[str] = (),
) -> float:
    """About which share of the answers of splits, or of a fold of them, was found earlier.

    That of those that stand in pairs, where there are any; of the others the same is taken.

    Args:
        earlier: what was said.
        counted: what the sources hold.
        splits: whose answers they are.
        fold: a part of these; None: all.
        foreseen: answers of which something will have been said by then.
    """
    if not earlier.files and not foreseen:
        return 0.0
    sampled = _sampled(counted, splits, fold)
    said = earlier.of(sorted(set().union(*sampled.values())))["answer_id"].to_pylist()
    known = {*said, *foreseen}
    shares = {split: len(known & ids) / max(1, len(ids)) for split, ids in sampled.items()}
    answers = {k: counted.answers_of(k) or counted.alone_of(k)[0] for k in splits}
    return sum(answers[k] * shares[k] for k in splits) / max(1, sum(answers.values()))


def precision(model: ModelConfig, place: Placed) -> str:
    """What a model computes in where `place` puts it, in the cluster as it is.

    `auto` is bf16 on GPUs and fp32 elsewhere, and no policy says the same in both.
    """
    if model.torch_dtype != "auto":
        return model.torch_dtype
    if isinstance(place, TrainingConfig):
        machines = alive_machines() if ray.is_initialized() else [this_machine()]
        return "bfloat16" if uses_gpu(place, gpus(machines)) else "float32"
    kinds = {"bfloat16" if pool.gpus_per_actor else "float32" for pool in place.actor_pools()}
    return " and ".join(sorted(kinds))
