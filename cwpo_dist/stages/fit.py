"""labelled pairs, weak language model → annotator: a Hugging Face reward model of its heads."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import tokenizers
import transformers

from cwpo_dist.config import BatchBy, ConfigError, FitConfig, Split
from cwpo_dist.evaluation.calibration import people_share
from cwpo_dist.lm.encoder import Asked, Encoder
from cwpo_dist.lm.fitting import encode_pairs
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.templates import Fault, TokenError
from cwpo_dist.pairs.chosen import chosen_first
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.splits import Fold
from cwpo_dist.pairs.stored import Pair, read_pairs
from cwpo_dist.runs.arms import ArmRun, held_out_split
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.given_model import GivenModel
from cwpo_dist.runs.held_out_pairs import HeldOutPairs, held_out_pairs
from cwpo_dist.runs.output_key import BESIDE_KEY, Node, Nodes, Settings
from cwpo_dist.runs.stage import Stage, Training, by_prompt
from cwpo_dist.storage import Store
from cwpo_dist.training.checkpoint import clear
from cwpo_dist.training.group import TrainSpec, train
from cwpo_dist.training.heads import ManyHeads
from cwpo_dist.training.tasks import BradleyTerry, TaskError
from cwpo_dist.training.token_file import Example, content, token_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitSettings(Settings):
    """What `fit` is told.

    Attributes:
        config: its section.
        model: the weak model.
        seed: of the order and of the new head.
        most: the share of pairs that it may be unable to read (`prepare.max_reject_fraction`).
        followed_on: the split by which the training is followed.
        fold: the pairs that it does not see; None: it sees all.
    """

    stage = "fit"
    trains = True

    config: FitConfig
    model: GivenModel
    seed: int
    most: float = field(metadata=BESIDE_KEY)
    followed_on: Split = field(metadata=BESIDE_KEY)
    fold: Fold | None = None

    @property
    def place(self) -> FitConfig:
        """Its own section."""
        return self.config


def nodes(run: ArmRun, given: Nodes) -> Nodes:
    """One for each seed and fold, numbered where there are several; none where they are given.

    Raises:
        ConfigError: when neither `weak` nor `annotate.model` is given.
    """
    config = run.config
    if not run.annotates or config.annotate.ready():
        return {}
    weak, most = run.weak, config.prepare.max_reject_fraction
    if weak is None:
        raise ConfigError(
            "weak: an annotator is needed; give weak.model_name_or_path to fit one, or "
            "annotate.model.model_name_or_path for a ready one-label reward model"
        )
    followed, read = held_out_split(config), {"prepare": given["prepare"]}
    told = [
        FitSettings(config.fit, weak, seed, most, followed, fold)
        for seed in config.fit.seeds or [config.seed]
        for fold in run.folds
    ]
    return {f"fit_{k}" if len(told) > 1 else "fit": Node(each, read) for k, each in enumerate(told)}


def make(context: Context, node: Node[FitSettings]) -> Mapping[str, object]:
    """Writes `model/`, which `AutoModelForSequenceClassification` loads; returns the counts."""
    told = node.settings
    task = LabelledPairs(
        context.prepared(node),
        context.shards(node),
        told.model,
        by_votes=told.config.labels == "votes",
        most=told.most,
        batch_by=told.config.batch_by,
        fold=told.fold,
        heads=told.config.heads,
        seed=told.seed,
    )
    held_out = held_out_pairs(context, node, told.config, told.followed_on)
    spec = TrainSpec(
        name="fit",
        store=context.place(node),
        key=node.key,
        seed=told.seed,
        config=told.config,
        model=told.model.config,
        head="scores",
        heads=told.config.heads,
        make_task=task,
        make_held_out=replace(task, most=1.0, held_out=held_out),
    )
    return train(spec)


def work(context: Context, node: Node[FitSettings], counted: Census) -> Training:
    """A training on the labelled pairs."""
    told = node.settings
    seen = 1.0 if told.fold is None else 1 - 1 / told.fold.of
    pairs = round(counted.pairs("labelled") * seen)
    training = Training("", model=told.model.field, pairs=pairs, training=told.config)
    training = by_prompt(training, counted, "labelled")
    prompts, answers = round(training.prompts * seen), round(training.answers * seen)
    return replace(training, prompts=prompts, answers=answers)


@dataclass(frozen=True)
class LabelledPairs:
    """Loads the labelled pairs in a worker.

    Attributes:
        pairs: the output folder of `prepare`.
        shards: how many pair files it has.
        model: whose lengths and template apply.
        by_votes: learn the share of people that chose an answer, where there are votes; ties, too.
        most: the share of them that it may be unable to read (`prepare.max_reject_fraction`).
        batch_by: what is shuffled.
        fold: those of them that are left out.
        held_out: the pairs to load instead; None: what is trained on.
        heads: of the annotator.
        seed: of the weights that each of several heads has of the pairs that it is trained on.
    """

    pairs: Store
    shards: int
    model: GivenModel
    by_votes: bool = False
    most: float = 1.0
    batch_by: BatchBy = "pair"
    fold: Fold | None = None
    held_out: HeldOutPairs | None = None
    heads: int = 1
    seed: int = 0

    def __call__(self, encoder: Encoder) -> BradleyTerry:
        """Tokens of every labelled pair that can be read and fits, the human's choice first.

        Raises:
            TaskError: when more than the share `most` of them cannot be read.
        """
        every = itertools.chain.from_iterable(map(self._shard, range(self.shards)))
        if (first := next(every, None)) is not None and isinstance(first.prompt, str):
            encoder.travel_as_text()
        fields = [("share", "f8")] if self.by_votes else []
        found = token_file(self._identity(), 2, fields, partial(self._encoded, encoder))
        self._tell(len(found.rows), Counter(found.left_out))
        shares = found.numbers("share") if self.by_votes else None
        if shares is not None:
            soft = np.count_nonzero((shares != 0) & (shares != 1))
            logger.info("fit: of %d pairs %d are learned as a share of votes", len(shares), soft)
        how: dict[str, Any] = {"left_out": found.left_out, "batch_by": self.batch_by}
        if self.heads == 1:
            return BradleyTerry(found.rows, found.pair_ids, shares, **how)
        seed = self.seed if self.held_out is None else None
        return ManyHeads(found.rows, found.pair_ids, shares, self.heads, seed, **how)

    def _identity(self) -> list[object]:
        chosen = None if self.held_out is None else self.held_out.identity()
        made_by = transformers.__version__, tokenizers.__version__
        told = [self.by_votes, made_by, repr(self.fold), chosen]
        return [content(self.pairs), self.model.identity(), *told]

    def _encoded(self, encoder: Encoder, left_out: Counter[str]) -> Iterator[list[Example]]:
        """What is learned of each pair file; of what cannot be read, the faults."""
        for index in range(self.shards) if self.held_out is None else self.held_out.labels:
            pairs = list(filter(self._is_learned, self._shard(index)))
            rows = encode_pairs(encoder, self.model.config, list(map(_chosen_first, pairs)))
            left_out.update(str(row.fault) for row in rows if isinstance(row, TokenError))
            yield [
                Example(pair.pair_id, row, (_first_share(pair),) if self.by_votes else ())
                for pair, row in zip(pairs, rows, strict=True)
                if isinstance(row, Row)
            ]

    def _tell(self, read: int, faults: Counter[str]) -> None:
        """Says what cannot be read, and stops where that is too much."""
        pairs = read + faults.total()
        told = ", ".join(f"{number} × {fault}" for fault, number in faults.most_common())
        if told:
            logger.warning("fit: of %d labelled pairs are left out: %s", pairs, told)
        unread = faults.total() - faults[Fault.OVER_LENGTH]
        if unread > self.most * pairs:
            raise TaskError(
                f"{unread} of {pairs} labelled pairs cannot be read ({told}), more than "
                f"prepare.max_reject_fraction {self.most:g} allows; give a chat_template that "
                "writes them, or raise it"
            )

    def _is_learned(self, pair: Pair) -> bool:
        if self.held_out is not None:
            return pair.pair_id in self._followed
        if self.fold is not None and pair.pair_id in self.fold:
            return False
        return pair.split == "labelled" and (
            pair.label is not None or (self.by_votes and bool(pair.tie))
        )

    @cached_property
    def _followed(self) -> frozenset[str]:
        assert self.held_out is not None
        return frozenset(itertools.chain.from_iterable(self.held_out.labels.values()))

    def _shard(self, index: int) -> list[Pair]:
        return read_pairs(self.pairs, index)


def _chosen_first(pair: Pair) -> Asked:
    """The answers, people's choice first; of a tie in their own order."""
    return Asked(pair.prompt, chosen_first(pair.label, *pair.answers), pair.tools)


def _first_share(pair: Pair) -> float:
    """The share of people that prefer the answer that is put first; half in a tie without votes."""
    share = people_share(pair.told)
    if share is None:  # without a label only ties are in the labelled part
        return 0.5
    return chosen_first(pair.label, share, 1 - share)[0]


STAGE = Stage(FitSettings, nodes, make, work, clear)
