"""preferences, reference (where the loss has one), SFT policy → aligned policy (paper eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cwpo_dist.config import AlignConfig
from cwpo_dist.lm.encoder import Encoder
from cwpo_dist.lm.identity import Identity
from cwpo_dist.lm.rows import Row
from cwpo_dist.objectives import objective
from cwpo_dist.pairs.chosen import chosen_first
from cwpo_dist.pairs.stored import Choice, read_choices
from cwpo_dist.runs.context import Context, policy_of, read_log_probs
from cwpo_dist.runs.graph import Node
from cwpo_dist.runs.held_out_pairs import HeldOutPairs, held_out_pairs
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.scoring.scorers import read_tokens
from cwpo_dist.storage import Store
from cwpo_dist.training.group import TrainSpec, train
from cwpo_dist.training.tasks import Normalization, Preference, Sampling


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `model/`, the merged policy, and `adapter/` under LoRA; returns the counts."""
    sft = node.inputs.get("model")
    task = weighted_pairs(context, node)
    choices = held_out_pairs(context, node, context.config.align)
    spec = TrainSpec(
        name="align",
        store=context.place(node),
        key=node.key,
        seed=context.config.seed,
        config=context.config.align,
        model=policy_of(context, node),
        head="logps",
        make_task=task,
        make_held_out=replace(
            task, choices=choices, normalization="none", sampling=None, soft_labels=False
        ),
        known=None if sft is None else Identity(f"{sft.path}/model", on_hub=False),
    )
    return train(spec)


def weighted_pairs(context: Context, node: Node) -> WeightedPairs:
    """What loads the data set of an `align` node, wherever it is called."""
    reference = node.inputs.get("reference")
    return WeightedPairs(
        choices=Weighed(context.place(node.inputs["weigh"])),
        tokens=context.place(node.inputs["tokens"]),
        reference=None if reference is None else context.place(reference),
        shards=context.shards(node),
        config=context.config.align,
        normalization=node.settings["weight_normalization"],
        sampling=node.settings["sampling"],
        soft_labels=node.settings["soft_labels"],
    )


@dataclass(frozen=True)
class Weighed:
    """What `weigh` says of the pairs.

    Attributes:
        preferences: its output folder.
    """

    preferences: Store

    def read(self, index: int) -> list[Choice]:
        """Of those of one shard."""
        return read_choices(self.preferences, part("preferences", index))


@dataclass(frozen=True)
class WeightedPairs:
    """Loads weighted pairs with their reference log-probs in a worker.

    Attributes:
        choices: which answers are the chosen ones, and their weights.
        tokens: the output folder of `tokens`.
        reference: that of `reference`; None for an objective without one.
        shards: how many pair files there are.
        config: loss, β, ε.
        normalization: what the summed loss is divided by.
        sampling: how the weights act.
        soft_labels: whether the annotator's probabilities take the place of hard labels.
    """

    choices: Weighed | HeldOutPairs
    tokens: Store
    reference: Store | None
    shards: int
    config: AlignConfig
    normalization: Normalization
    sampling: Sampling = None
    soft_labels: bool = False

    def __call__(self, encoder: Encoder) -> Preference:
        """Tokens of every preference that fits the policy, chosen first."""
        rows: list[Row] = []
        choices: list[Choice] = []
        references: list[tuple[float, float]] = []
        for index in range(self.shards):
            if not (read := self.choices.read(index)):
                continue
            log_probs = None if self.reference is None else read_log_probs(self.reference, index)
            tokens = read_tokens(self.tokens, index)
            for choice in read:
                name, label = choice.pair_id, choice.label
                if name not in tokens or (log_probs is not None and name not in log_probs):
                    continue  # over length for the policy: counted where it was tokenised
                row = tokens[name]
                rows.append(Row(row.prompt, chosen_first(label, *row.answers)))
                choices.append(choice)
                if log_probs is not None:
                    references.append(chosen_first(label, *log_probs[name].sums))
        _, settings = objective(self.config, soft_labels=self.soft_labels)
        return Preference(
            rows,
            [choice.pair_id for choice in choices],
            weights=[choice.weight for choice in choices],
            references=None if self.reference is None else references,
            loss_type=self.config.loss_type,
            beta=settings.beta,
            label_smoothing=float(settings.label_smoothing),
            normalization=self.normalization,
            sampling=self.sampling,
            probabilities=list(map(_probability, choices)) if self.soft_labels else None,
            simpo_gamma=settings.simpo_gamma,
        )


def _probability(choice: Choice) -> float:
    assert choice.probability is not None, "soft labels are an annotator's"
    return choice.probability
