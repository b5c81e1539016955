"""tokens, chosen answers → a policy that has seen good answers: where `align` starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from cwpo_dist.config import SftConfig, Split
from cwpo_dist.lm.encoder import Encoder
from cwpo_dist.lm.rows import Row
from cwpo_dist.pairs.chosen import Label, chosen_first
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.labels import LabelSource, decide
from cwpo_dist.runs.annotations import Annotated, annotated, decided_pairs, label_source
from cwpo_dist.runs.arms import ArmRun, Chooser, held_out_split, weighting
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.given_model import GivenModel
from cwpo_dist.runs.held_out_pairs import HeldOutPairs, held_out_pairs
from cwpo_dist.runs.joined import ScoresIn, pair_rows
from cwpo_dist.runs.output_key import BESIDE_KEY, Node, Nodes, Settings, scored
from cwpo_dist.runs.stage import Stage, Training
from cwpo_dist.storage import Store
from cwpo_dist.training.checkpoint import clear
from cwpo_dist.training.group import TrainSpec, train
from cwpo_dist.training.tasks import Sft
from cwpo_dist.training.token_file import Example, Shards, content, token_file


@dataclass(frozen=True)
class SftSettings(Settings):
    """What `sft` is told.

    Attributes:
        config: its section.
        model: the policy as it was given.
        chooser: who says which answer is the better one; a temperature only where it decides.
        seed: of the order and of adapters.
        followed_on: the split by which the training is followed.
    """

    stage = "sft"
    trains = True

    config: SftConfig
    model: GivenModel
    chooser: Chooser
    seed: int
    followed_on: Split = field(metadata=BESIDE_KEY)

    @property
    def place(self) -> SftConfig:
        """Its own section."""
        return self.config


def nodes(run: ArmRun, given: Nodes) -> Nodes:
    """The policy that has seen what the arm's labels say is good; none with `sft: none`."""
    config, read = run.config, scored(given)
    if run.policy is None or config.sft is None:
        return {}
    chooser = weighting(config, run.arm).chooser
    # Of one opinion no scale changes the side; of several, those fitted to each do.
    joint = len(read) + (chooser.own == "beside") > 1 and chooser.temperature == "fitted"
    if not joint:
        chooser = replace(chooser, temperature=None, calibration_split=None)
    told = SftSettings(config.sft, run.policy, chooser, config.seed, held_out_split(config))
    prepared = {name: given[name] for name in ("prepare", "tokens")}
    return {"sft": Node(told, prepared | read)}


def work(context: Context, node: Node[SftSettings], counted: Census) -> Training:
    """A training on the better answers."""
    told = node.settings
    pairs = decided_pairs(told.chooser, counted)
    return Training(
        "", model=told.model.field, pairs=pairs, training=told.config, chosen_alone=True
    )


def make(context: Context, node: Node[SftSettings]) -> Mapping[str, object]:
    """Writes `model/`, the merged policy, and `adapter/` under LoRA; returns the counts."""
    told = node.settings
    chosen = ChosenAnswers(
        annotated=annotated(context, node, told.chooser),
        tokens=context.place(node.inputs["tokens"]),
        labels=label_source(context, node, told.chooser),
        splits=told.chooser.splits,
    )
    spec = TrainSpec(
        name="sft",
        store=context.place(node),
        key=node.key,
        seed=told.seed,
        config=told.config,
        model=told.model.config,
        head="logps",
        make_task=chosen,
        make_held_out=HeldOutAnswers(
            context.place(node.inputs["tokens"]),
            held_out_pairs(context, node, told.config, told.followed_on),
        ),
    )
    return train(spec)


@dataclass(frozen=True)
class ChosenAnswers:
    """Loads prompts and chosen answers in a worker; weights and selection do not reach it.

    Attributes:
        annotated: the pairs and what the annotators say of them.
        tokens: the output folder of `tokens`.
        labels: whose choice counts.
        splits: the splits to train on.
    """

    annotated: Annotated
    tokens: Store
    labels: LabelSource
    splits: tuple[str, ...]

    def __call__(self, encoder: Encoder) -> Sft:
        """Tokens of every decided pair that fits the policy."""
        return _sft(self._identity(), self._shards)

    def _identity(self) -> list[object]:
        given = self.annotated
        read = [each for each in given.scores if isinstance(each, ScoresIn)]
        scores = [one.store for each in read for one in (each, *each.others)]
        return [repr(self), *map(content, [given.pairs, self.tokens, *scores])]

    def _shards(self, _: Counter[str]) -> Iterator[Iterator[Example]]:
        return map(self._shard, range(self.annotated.shards))

    def _shard(self, index: int) -> Iterator[Example]:
        pairs = self.annotated.judgements(index)
        opinions, _ = self.annotated.opinions(index)
        rows = pair_rows(self.tokens, self.annotated.pairs, index)
        for pair_id, decision in decide(pairs, opinions, self.labels, self.splits).items():
            if pair_id in rows:
                yield Example(pair_id, _chosen(rows[pair_id], decision.label))


@dataclass(frozen=True)
class HeldOutAnswers:
    """Loads the answers that people chose of the pairs by which training is followed.

    Attributes:
        tokens: the output folder of `tokens`.
        held_out: which pairs they are.
    """

    tokens: Store
    held_out: HeldOutPairs

    def __call__(self, encoder: Encoder) -> Sft:
        """Tokens of those that fit the policy."""
        return _sft([self.held_out.identity(), content(self.tokens)], self._shards)

    def _shards(self, _: Counter[str]) -> Iterator[list[Example]]:
        for index, labels in self.held_out.labels.items():
            yield [
                Example(pair_id, _chosen(row, labels[pair_id]))
                for pair_id, row in pair_rows(self.tokens, self.held_out.pairs, index).items()
                if pair_id in labels
            ]


def _sft(identity: object, shards: Shards) -> Sft:
    found = token_file(identity, 1, [], shards)
    return Sft(found.rows, found.pair_ids)


def _chosen(row: Row, label: Label) -> Row:
    """A pair's prompt with the chosen answer alone."""
    return row.picked(chosen_first(label, 0, 1)[:1])


STAGE = Stage(SftSettings, nodes, make, work, clear)
