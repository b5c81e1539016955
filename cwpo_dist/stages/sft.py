"""tokens, chosen answers → a policy that has seen good answers: where `align` starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cwpo_dist.lm.encoder import Encoder
from cwpo_dist.lm.rows import Row
from cwpo_dist.pairs.chosen import Label, chosen_first
from cwpo_dist.pairs.labels import LabelSource, decide
from cwpo_dist.runs.annotations import Annotated, annotated, label_source
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.graph import Node
from cwpo_dist.runs.held_out_pairs import HeldOutPairs, held_out_pairs
from cwpo_dist.scoring.scorers import read_tokens
from cwpo_dist.storage import Store
from cwpo_dist.training.group import TrainSpec, train
from cwpo_dist.training.tasks import Sft


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `model/`, the merged policy, and `adapter/` under LoRA; returns the counts."""
    policy, config = context.config.policy, context.config.sft
    assert policy is not None, "graph() makes no sft node without a policy"
    assert config is not None, "graph() makes no sft node for `sft: none`"
    chosen = ChosenAnswers(
        annotated=annotated(context, node),
        tokens=context.place(node.inputs["tokens"]),
        labels=label_source(context, node),
        splits=tuple(node.settings["splits"]),
    )
    spec = TrainSpec(
        name="sft",
        store=context.place(node),
        key=node.key,
        seed=context.config.seed,
        config=config,
        model=policy,
        head="logps",
        make_task=chosen,
        make_held_out=HeldOutAnswers(
            context.place(node.inputs["tokens"]), held_out_pairs(context, node, config)
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
