"""tokens, chosen answers → a policy that has seen good answers: where `align` starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.tokens import Encoder
from cwpo_dist.pairs.labels import LabelSource, decide
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.scoring.scorers import read_tokens
from cwpo_dist.stages.context import Context, read_scores
from cwpo_dist.stages.graph import Node
from cwpo_dist.storage import Store
from cwpo_dist.training.tasks import Sft
from cwpo_dist.training.workers import TrainSpec, train


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `model/`, the merged policy, and `adapter/` under LoRA; returns the counts."""
    policy, config = context.config.policy, context.config.sft
    assert policy is not None, "graph() makes no sft node without a policy"
    assert config is not None, "graph() makes no sft node for `sft: none`"
    scored = node.inputs.get("annotate")
    chosen = ChosenAnswers(
        pairs=context.place(node.inputs["prepare"]),
        tokens=context.place(node.inputs["tokens"]),
        scores=None if scored is None else context.place(scored),
        retries=0 if scored is None else scored.retries,
        shards=context.shards(node),
        labels=node.settings["labels"],
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
    )
    return train(spec)


@dataclass(frozen=True)
class ChosenAnswers:
    """Loads prompts and chosen answers in a worker; weights and selection do not reach it.

    Attributes:
        pairs: the output folder of `prepare`.
        tokens: that of `tokens`.
        scores: that of `annotate`; None in a run without annotator.
        retries: how many retries of its rejects count.
        shards: how many pair files there are.
        labels: whose choice counts.
        splits: the splits to train on.
    """

    pairs: Store
    tokens: Store
    scores: Store | None
    retries: int
    shards: int
    labels: LabelSource
    splits: tuple[str, ...]

    def __call__(self, encoder: Encoder) -> Sft:
        """Tokens of every decided pair that fits the policy."""
        rows: list[Row] = []
        names: list[str] = []
        for index in range(self.shards):
            columns = ["pair_id", "label", "split"]
            pairs = self.pairs.read_table(part("pairs", index), columns).to_pylist()
            scores = None
            if self.scores is not None:
                scores = read_scores(self.scores, index, self.retries)
            tokens = read_tokens(self.tokens, index)
            for pair_id, decision in decide(pairs, scores, self.labels, self.splits).items():
                if pair_id in tokens:
                    row = tokens[pair_id]
                    chosen = row.answers["ab".index(decision.label)]
                    rows.append(Row(row.prompt, (chosen,)))
                    names.append(pair_id)
        return Sft(rows, names)
