"""preferences, reference (where the loss has one), SFT policy → aligned policy (paper eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from cwpo_dist.config import AlignConfig
from cwpo_dist.lm.encoder import Encoder
from cwpo_dist.lm.identity import Identity
from cwpo_dist.lm.rows import Row
from cwpo_dist.objectives import objective
from cwpo_dist.pairs.records import preference_schema, read_records
from cwpo_dist.runs.context import Context, policy_of, read_log_probs
from cwpo_dist.runs.graph import Node
from cwpo_dist.runs.held_out_pairs import WatchedPairs, watched_pairs
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.scoring.scorers import read_tokens
from cwpo_dist.storage import Store
from cwpo_dist.training.group import TrainSpec, train
from cwpo_dist.training.tasks import Normalization, Preference, Sampling


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `model/`, the merged policy, and `adapter/` under LoRA; returns the counts."""
    sft = node.inputs.get("model")
    spec = TrainSpec(
        name="align",
        store=context.place(node),
        key=node.key,
        seed=context.config.seed,
        config=context.config.align,
        model=policy_of(context, node),
        head="logps",
        make_task=weighted_pairs(context, node),
        make_held_out=HeldOutPairs.of(context, node),
        known=None if sft is None else Identity(f"{sft.path}/model", on_hub=False),
    )
    return train(spec)


def weighted_pairs(context: Context, node: Node) -> WeightedPairs:
    """What loads the data set of an `align` node, wherever it is called."""
    reference = node.inputs.get("reference")
    return WeightedPairs(
        preferences=context.place(node.inputs["weigh"]),
        tokens=context.place(node.inputs["tokens"]),
        reference=None if reference is None else context.place(reference),
        shards=context.shards(node),
        config=context.config.align,
        normalization=node.settings["weight_normalization"],
        sampling=node.settings["sampling"],
        soft_labels=node.settings["soft_labels"],
    )


@dataclass(frozen=True)
class WeightedPairs:
    """Loads weighted pairs with their reference log-probs in a worker.

    Attributes:
        preferences: the output folder of `weigh`.
        tokens: that of `tokens`.
        reference: that of `reference`; None for an objective without one.
        shards: how many pair files there are.
        config: loss, β, ε.
        normalization: what the summed loss is divided by.
        sampling: how the weights act.
        soft_labels: whether the annotator's probabilities take the place of hard labels.
    """

    preferences: Store
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
        pairs: list[dict[str, Any]] = []
        references: list[tuple[float, float]] = []
        for index in range(self.shards):
            log_probs = None if self.reference is None else read_log_probs(self.reference, index)
            tokens = read_tokens(self.tokens, index)
            for pair in self._preferences(index):
                pair_id, order = pair["pair_id"], 1 if pair["label"] == "a" else -1
                if pair_id not in tokens or (log_probs is not None and pair_id not in log_probs):
                    continue  # over length for the policy: counted where it was tokenised
                row = tokens[pair_id]
                rows.append(Row(row.prompt, row.answers[::order]))
                pairs.append(pair)
                if log_probs is not None:
                    chosen, rejected = log_probs[pair_id][::order]
                    references.append((chosen, rejected))
        _, settings = objective(self.config, soft_labels=self.soft_labels)
        return Preference(
            rows,
            [pair["pair_id"] for pair in pairs],
            weights=[pair["weight"] for pair in pairs],
            references=None if self.reference is None else references,
            loss_type=self.config.loss_type,
            beta=settings.beta,
            label_smoothing=float(settings.label_smoothing),
            normalization=self.normalization,
            sampling=self.sampling,
            probabilities=[pair["probability"] for pair in pairs] if self.soft_labels else None,
            simpo_gamma=settings.simpo_gamma,
        )

    def _preferences(self, index: int) -> list[dict[str, Any]]:
        """What `weigh` says of the pairs of one shard."""
        name, schema = part("preferences", index), preference_schema("text")
        columns = ["pair_id", "label", "weight", "probability"]
        rows: list[dict[str, Any]] = read_records(
            self.preferences, name, schema, columns
        ).to_pylist()
        return rows


@dataclass(frozen=True)
class HeldOutPairs(WeightedPairs):
    """Loads the pairs by which training is followed: people's choices, weight 1.

    Attributes:
        watched: which they are.
    """

    watched: WatchedPairs | None = None

    @classmethod
    def of(cls, context: Context, node: Node) -> HeldOutPairs:
        """Those of an `align` node."""
        trained = weighted_pairs(context, node)
        plain = replace(trained, normalization="none", sampling=None, soft_labels=False)
        given = {field.name: getattr(plain, field.name) for field in fields(plain)}
        return cls(**given, watched=watched_pairs(context, node, context.config.align))

    @cached_property
    def _labels(self) -> dict[str, str]:
        assert self.watched is not None, "made by `of`"
        return self.watched.labels()

    def _preferences(self, index: int) -> list[dict[str, Any]]:
        """What people said of all watched pairs; those of other shards have no tokens here."""
        return [
            {"pair_id": pair_id, "label": label, "weight": 1.0}
            for pair_id, label in self._labels.items()
        ]
