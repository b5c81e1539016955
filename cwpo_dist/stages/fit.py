"""labelled pairs, weak language model → annotator: a one-label Hugging Face reward model."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cwpo_dist.config import ConfigError, FitConfig, ModelConfig, Split
from cwpo_dist.evaluation.calibration import people_share
from cwpo_dist.lm.encoder import Asked, Encoder
from cwpo_dist.lm.fitting import encode_pairs
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.templates import Fault, TokenError
from cwpo_dist.pairs.chosen import chosen_first
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.stored import Pair, read_pairs
from cwpo_dist.runs.arms import ArmRun, held_out_split
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.given_model import GivenModel
from cwpo_dist.runs.held_out_pairs import HeldOutPairs, held_out_pairs
from cwpo_dist.runs.output_key import BESIDE_KEY, Node, Nodes, Settings
from cwpo_dist.runs.stage import Stage, Training
from cwpo_dist.storage import Store
from cwpo_dist.training.checkpoint import clear
from cwpo_dist.training.group import TrainSpec, train
from cwpo_dist.training.tasks import BradleyTerry, TaskError

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
    """

    stage = "fit"
    trains = True

    config: FitConfig
    model: GivenModel
    seed: int
    most: float = field(metadata=BESIDE_KEY)
    followed_on: Split = field(metadata=BESIDE_KEY)

    @property
    def place(self) -> FitConfig:
        """Its own section."""
        return self.config


def nodes(run: ArmRun, given: Nodes) -> Nodes:
    """One for each seed, numbered where there are several; none where annotators are given.

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
    seeds = config.fit.seeds or [config.seed]
    return {
        f"fit_{k}" if len(seeds) > 1 else "fit": Node(
            FitSettings(config.fit, weak, seed, most, followed), read
        )
        for k, seed in enumerate(seeds)
    }


def make(context: Context, node: Node[FitSettings]) -> Mapping[str, object]:
    """Writes `model/`, which `AutoModelForSequenceClassification` loads; returns the counts."""
    told, weak = node.settings, node.settings.model.config
    task = LabelledPairs(
        context.prepared(node),
        context.shards(node),
        weak,
        by_votes=told.config.labels == "votes",
        most=told.most,
    )
    held_out = held_out_pairs(context, node, told.config, told.followed_on)
    spec = TrainSpec(
        name="fit",
        store=context.place(node),
        key=node.key,
        seed=told.seed,
        config=told.config,
        model=weak,
        head="scores",
        make_task=task,
        make_held_out=replace(task, most=1.0, held_out=held_out),
    )
    return train(spec)


def work(context: Context, node: Node[FitSettings], counted: Census) -> Training:
    """A training on the labelled pairs."""
    pairs = counted.pairs("labelled")
    return Training("", pairs, None, node.settings.model.field, training=node.settings.config)


@dataclass(frozen=True)
class LabelledPairs:
    """Loads the labelled pairs in a worker.

    Attributes:
        pairs: the output folder of `prepare`.
        shards: how many pair files it has.
        model: whose lengths and template apply.
        by_votes: learn the share of people that chose an answer, where there are votes; ties, too.
        most: the share of them that it may be unable to read (`prepare.max_reject_fraction`).
        held_out: the pairs to load instead; None: what is trained on.
    """

    pairs: Store
    shards: int
    model: ModelConfig
    by_votes: bool = False
    most: float = 1.0
    held_out: HeldOutPairs | None = None

    def __call__(self, encoder: Encoder) -> BradleyTerry:
        """Tokens of every labelled pair that can be read and fits, the human's choice first.

        Raises:
            TaskError: when more than the share `most` of them cannot be read.
        """
        labelled = self._labelled()
        if labelled and isinstance(labelled[0].prompt, str):
            encoder.travel_as_text()
        found = encode_pairs(encoder, self.model, [_chosen_first(pair) for pair in labelled])
        left_out = self._left_out(found)
        both = zip(labelled, found, strict=True)
        read = [(pair, row) for pair, row in both if isinstance(row, Row)]
        shares = self._shares([pair for pair, _ in read])
        rows, names = [row for _, row in read], [pair.pair_id for pair, _ in read]
        return BradleyTerry(rows, names, shares, left_out=left_out)

    def _shares(self, pairs: list[Pair]) -> list[float] | None:
        """Of people that prefer the answer that is put first; None: labels are learned."""
        if not self.by_votes:
            return None
        shares = [_first_share(pair) for pair in pairs]
        soft = sum(share not in (0.0, 1.0) for share in shares)
        logger.info("fit: of %d pairs %d are learned as a share of votes", len(pairs), soft)
        return shares

    def _left_out(self, found: Sequence[Row | TokenError]) -> Counter[str]:
        """Counts, and says, what cannot be read or does not fit; stops where that is too much."""
        faults = Counter(str(row.fault) for row in found if isinstance(row, TokenError))
        pairs = len(found)
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
        return faults

    def _labelled(self) -> list[Pair]:
        if self.held_out is not None:
            labels = self.held_out.labels
            pairs = itertools.chain.from_iterable(map(self._shard, labels))
            names = {pair_id for of_shard in labels.values() for pair_id in of_shard}
            return [pair for pair in pairs if pair.pair_id in names]
        return [
            pair
            for index in range(self.shards)
            for pair in self._shard(index)
            if pair.split == "labelled" and self._is_learned(pair)
        ]

    def _is_learned(self, pair: Pair) -> bool:
        return pair.label is not None or (self.by_votes and bool(pair.tie))

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
