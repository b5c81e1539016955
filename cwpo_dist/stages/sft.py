"""tokens, chosen answers → a policy that has seen good answers: where `align` starts."""

from __future__ import annotations

from collections.abc import Mapping
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
from cwpo_dist.runs.output_key import BESIDE_KEY, Node, Nodes, Settings, scored
from cwpo_dist.runs.stage import Stage, Training
from cwpo_dist.scoring.scorers import read_tokens
from cwpo_dist.storage import Store
from cwpo_dist.training.checkpoint import clear
from cwpo_dist.training.group import TrainSpec, train
from cwpo_dist.training.tasks import Sft


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
    return Training("", pairs, None, told.model.field, training=told.config, chosen_alone=True)


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
        rows: list[Row] = []
        names: list[str] = []
        for index in range(self.annotated.shards):
            pairs = self.annotated.judgements(index)
            opinions, _ = self.annotated.opinions(index)
            tokens = read_tokens(self.tokens, index)
            for pair_id, decision in decide(pairs, opinions, self.labels, self.splits).items():
                if pair_id in tokens:
                    row = tokens[pair_id]
                    rows.append(_chosen(row, decision.label))
                    names.append(pair_id)
        return Sft(rows, names)


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
        found = {
            pair_id: _chosen(row, labels[pair_id])
            for index, labels in self.held_out.labels.items()
            for pair_id, row in read_tokens(self.tokens, index).items()
            if pair_id in labels
        }
        return Sft(list(found.values()), list(found))


def _chosen(row: Row, label: Label) -> Row:
    """A pair's prompt with the chosen answer alone."""
    return Row(row.prompt, chosen_first(label, *row.answers)[:1])


STAGE = Stage(SftSettings, nodes, make, work, clear)
