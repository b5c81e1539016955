"""preferences, reference, SFT policy → aligned policy: Σ C·ℓ over the pairs (paper eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cwpo_dist.config import AlignConfig
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.tokens import Encoder
from cwpo_dist.pairs.records import preference_schema, read_records
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.scoring.scorers import read_tokens
from cwpo_dist.stages.context import Context, policy_of, read_log_probs
from cwpo_dist.stages.graph import Node
from cwpo_dist.storage import Store
from cwpo_dist.training.tasks import Normalization, Preference
from cwpo_dist.training.workers import TrainSpec, train


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `model/`, the merged policy, and `adapter/` under LoRA; returns the counts."""
    config = context.config.align
    pairs = WeightedPairs(
        preferences=context.place(node.inputs["weigh"]),
        tokens=context.place(node.inputs["tokens"]),
        reference=context.place(node.inputs["reference"]),
        shards=context.shards(node),
        config=config,
        normalization=node.settings["weight_normalization"],
    )
    spec = TrainSpec(
        name="align",
        store=context.place(node),
        key=node.key,
        seed=context.config.seed,
        config=config,
        model=policy_of(context, node),
        head="logps",
        make_task=pairs,
    )
    return train(spec)


@dataclass(frozen=True)
class WeightedPairs:
    """Loads weighted pairs with their reference log-probs in a worker.

    Attributes:
        preferences: the output folder of `weigh`.
        tokens: that of `tokens`.
        reference: that of `reference`.
        shards: how many pair files there are.
        config: loss, β, ε.
        normalization: what the summed loss is divided by.
    """

    preferences: Store
    tokens: Store
    reference: Store
    shards: int
    config: AlignConfig
    normalization: Normalization

    def __call__(self, encoder: Encoder) -> Preference:
        """Tokens of every preference that fits the policy, chosen first."""
        rows: list[Row] = []
        names: list[str] = []
        weights: list[float] = []
        references: list[tuple[float, float]] = []
        for index in range(self.shards):
            columns = ["pair_id", "label", "weight"]
            name, schema = part("preferences", index), preference_schema("text")
            table = read_records(self.preferences, name, schema, columns)
            tokens = read_tokens(self.tokens, index)
            log_probs = read_log_probs(self.reference, index)
            for line in table.to_pylist():
                pair_id, order = line["pair_id"], 1 if line["label"] == "a" else -1
                if pair_id not in tokens or pair_id not in log_probs:
                    continue  # over length for the policy: counted where it was tokenised
                row = tokens[pair_id]
                rows.append(Row(row.prompt, row.answers[::order]))
                names.append(pair_id)
                weights.append(line["weight"])
                chosen, rejected = log_probs[pair_id][::order]
                references.append((chosen, rejected))
        return Preference(
            rows,
            names,
            weights=weights,
            references=references,
            loss_type=self.config.loss_type,
            beta=self.config.beta,
            label_smoothing=self.config.label_smoothing,
            normalization=self.normalization,
        )
