"""preferences, reference (where the loss has one), SFT policy → aligned policy (paper eq. 7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cwpo_dist.config import AlignConfig, Split
from cwpo_dist.lm.encoder import Encoder
from cwpo_dist.lm.identity import Identity
from cwpo_dist.pairs.chosen import chosen_first
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.kept_columns import is_above_zero
from cwpo_dist.pairs.preferences import Choice, read_choices
from cwpo_dist.pairs.records import read_columns
from cwpo_dist.runs.annotations import kept_pairs
from cwpo_dist.runs.arms import ArmRun, Weighting, held_out_split, normalization, weighting
from cwpo_dist.runs.context import Context, policy_of
from cwpo_dist.runs.given_model import GivenModel
from cwpo_dist.runs.held_out_pairs import HeldOutPairs, held_out_pairs
from cwpo_dist.runs.joined import pair_log_probs, pair_rows
from cwpo_dist.runs.named_loss import objective
from cwpo_dist.runs.output_key import BESIDE_KEY, Node, Nodes, Settings
from cwpo_dist.runs.stage import Stage, Training, by_prompt
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.storage import Store
from cwpo_dist.training.checkpoint import clear
from cwpo_dist.training.group import TrainSpec, train
from cwpo_dist.training.tasks import Normalization, Preference, Sampling, TaskError
from cwpo_dist.training.token_file import Example, content, token_file


@dataclass(frozen=True)
class AlignSettings(Settings):
    """What `align` is told.

    Attributes:
        config: its section.
        model: the policy as it was given; an input may have trained it.
        seed: of the order and of adapters.
        weight_normalization: what the summed loss is divided by.
        sampling: how the weights act.
        soft_labels: whether the annotator's probabilities take the place of hard labels.
        weighting: how its input `weigh` weighs, for the number of pairs.
        followed_on: the split by which the training is followed.
    """

    stage = "align"
    trains = True

    config: AlignConfig
    model: GivenModel
    seed: int
    weight_normalization: Normalization
    sampling: Sampling
    soft_labels: bool
    weighting: Weighting = field(metadata=BESIDE_KEY)
    followed_on: Split = field(metadata=BESIDE_KEY)

    @property
    def place(self) -> AlignConfig:
        """Its own section."""
        return self.config


def nodes(run: ArmRun, given: Nodes) -> Nodes:
    """The policy that the arm is about."""
    policy, config, arm = run.policy, run.config, run.arm
    if policy is None:
        return {}
    # By the data set's mean: that is in the weights.
    by_batch = normalization(config, arm) == "batch"
    told = AlignSettings(
        config.align,
        policy,
        config.seed,
        "batch" if by_batch else "none",
        arm.sampling,
        arm.soft_labels,
        weighting(config, arm),
        held_out_split(config),
    )
    read = {"tokens": given["tokens"], "weigh": given["weigh"]}
    read |= {"reference": given["reference"]} if "reference" in given else {}
    return {"align": Node(told, read | ({"model": given["sft"]} if "sft" in given else {}))}


def work(context: Context, node: Node[AlignSettings], counted: Census) -> Training:
    """A training on the preferences."""
    told = node.settings
    training = Training(
        "",
        model=told.model.field,
        pairs=kept_pairs(told.weighting, counted),
        training=told.config,
        kept=told.weighting.top_fraction or 1.0,
        sampled=told.sampling is not None,
    )
    return by_prompt(training, counted, *told.weighting.chooser.splits)


def make(context: Context, node: Node[AlignSettings]) -> Mapping[str, object]:
    """Writes `model/`, the merged policy, and `adapter/` under LoRA; returns the counts."""
    told, sft = node.settings, node.inputs.get("model")
    task = weighted_pairs(context, node)
    choices = held_out_pairs(context, node, told.config, told.followed_on)
    spec = TrainSpec(
        name="align",
        store=context.place(node),
        key=node.key,
        seed=told.seed,
        config=told.config,
        model=policy_of(context, node, told.model.config),
        head="logps",
        make_task=task,
        make_held_out=replace(
            task, choices=choices, normalization="none", sampling=None, soft_labels=False
        ),
        known=None if sft is None else Identity(f"{sft.path}/model", on_hub=False),
    )
    return train(spec)


def weighted_pairs(context: Context, node: Node[AlignSettings]) -> WeightedPairs:
    """What loads the data set of an `align` node, wherever it is called."""
    told, reference = node.settings, node.inputs.get("reference")
    return WeightedPairs(
        choices=Weighed(context.place(node.inputs["weigh"])),
        pairs=context.prepared(node),
        tokens=context.place(node.inputs["tokens"]),
        reference=None if reference is None else context.place(reference),
        shards=context.shards(node),
        config=told.config,
        normalization=told.weight_normalization,
        sampling=told.sampling,
        soft_labels=told.soft_labels,
    )


@dataclass(frozen=True)
class Weighed:
    """What `weigh` says of the pairs.

    Attributes:
        preferences: its output folder.
    """

    preferences: Store

    def identity(self) -> object:
        """What decides them."""
        return content(self.preferences)

    def read(self, index: int) -> list[Choice]:
        """Of those of one shard."""
        return read_choices(self.preferences, part("preferences", index))


@dataclass(frozen=True)
class WeightedPairs:
    """Loads weighted pairs with their reference log-probs in a worker.

    Attributes:
        choices: which answers are the chosen ones, and their weights.
        pairs: the output folder of `prepare`.
        tokens: that of `tokens`.
        reference: that of `reference`; None for an objective without one.
        shards: how many pair files there are.
        config: loss, β and what has each pair's own, ε.
        normalization: what the summed loss is divided by.
        sampling: how the weights act.
        soft_labels: whether the annotator's probabilities take the place of hard labels.
    """

    choices: Weighed | HeldOutPairs
    pairs: Store
    tokens: Store
    reference: Store | None
    shards: int
    config: AlignConfig
    normalization: Normalization
    sampling: Sampling = None
    soft_labels: bool = False

    def __call__(self, encoder: Encoder) -> Preference:
        """Tokens of every preference that fits the policy, chosen first."""
        fields: list[tuple[Any, ...]] = [("weight", "f8")]
        fields += [] if self.reference is None else [("reference", "f4", (2,))]
        fields += [("probability", "f4")] if self.soft_labels else []
        own_beta = self.config.beta_column is not None
        fields += [("factor", "f8")] if own_beta else []
        found = token_file(self._identity(), 2, fields, self._shards)
        _, settings = objective(self.config, soft_labels=self.soft_labels)
        return Preference(
            found.rows,
            found.pair_ids,
            weights=found.numbers("weight"),
            references=None if self.reference is None else found.numbers("reference"),
            loss_type=self.config.loss_type,
            beta=self.config.beta * (found.numbers("factor") if own_beta else 1.0),
            label_smoothing=float(settings.label_smoothing),
            normalization=self.normalization,
            sampling=self.sampling,
            probabilities=found.numbers("probability") if self.soft_labels else None,
            simpo_gamma=settings.simpo_gamma,
            sft_coefficient=settings.sft_coefficient,
            ropo_alpha=settings.ropo_alpha,
            dr_dpo_beta=settings.dr_dpo_beta,
            batch_by=self.config.batch_by,
        )

    def _identity(self) -> list[object]:
        reference = None if self.reference is None else content(self.reference)
        given = [self.choices.identity(), content(self.pairs), content(self.tokens), reference]
        return given if self.config.beta_column is None else [*given, self.config.beta_column]

    def _shards(self, _: Counter[str]) -> Iterator[Iterator[Example]]:
        """What is over length for the policy is counted where it was tokenised."""
        return map(self._shard, range(self.shards))

    def _shard(self, index: int) -> Iterator[Example]:
        if not (read := self.choices.read(index)):
            return
        log_probs = None
        if self.reference is not None:
            log_probs = pair_log_probs(self.reference, self.pairs, index)
        rows = pair_rows(self.tokens, self.pairs, index)
        factors = _factors(self.pairs, index, self.config.beta_column)
        for choice in read:
            name, label = choice.pair_id, choice.label
            if name not in rows or (log_probs is not None and name not in log_probs):
                continue
            numbers: list[object] = [choice.weight]
            if log_probs is not None:
                numbers.append(chosen_first(label, *log_probs[name].sums))
            if self.soft_labels:
                numbers.append(_probability(choice))
            numbers += [_above_zero(name, factors[name])] if factors else []
            yield Example(name, rows[name].picked(chosen_first(label, 0, 1)), tuple(numbers))


def _probability(choice: Choice) -> float:
    assert choice.probability is not None, "soft labels are an annotator's"
    return choice.probability


def _factors(pairs: Store, index: int, column: str | None) -> dict[str, object]:
    """What multiplies β, of each pair of a shard; of none where no column says it."""
    if column is None:
        return {}
    table = read_columns(pairs, part("pairs", index), ["pair_id", column])
    ids, found = (each.to_pylist() for each in table.columns)
    return dict(zip(ids, found, strict=True))


def _above_zero(pair_id: str, factor: object) -> float:
    """Raises TaskError for a factor of β that is none."""
    if is_above_zero(factor):
        return float(factor)
    raise TaskError(
        f"align.beta_column: pair {pair_id} has {factor!r}, and β is multiplied by a number above "
        "0; correct its row (of copies the one that is read first), or leave it out"
    )


STAGE = Stage(AlignSettings, nodes, make, work, clear)
