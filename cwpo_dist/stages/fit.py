"""labelled pairs, weak language model → annotator: a one-label Hugging Face reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.tokens import Encoder, fit_length
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages.context import Context
from cwpo_dist.stages.graph import Node
from cwpo_dist.storage import Store
from cwpo_dist.training.tasks import BradleyTerry
from cwpo_dist.training.workers import TrainSpec, train


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `model/`, which `AutoModelForSequenceClassification` loads; returns the counts."""
    weak = context.config.weak
    assert weak is not None, "graph() makes no fit node without a weak model"
    pairs = context.place(node.inputs["prepare"])
    spec = TrainSpec(
        name="fit",
        store=context.place(node),
        key=node.key,
        seed=context.config.seed,
        config=context.config.fit,
        model=weak,
        head="scores",
        make_task=LabelledPairs(pairs, context.shards(node), weak),
    )
    return train(spec)


@dataclass(frozen=True)
class LabelledPairs:
    """Loads the labelled pairs in a worker.

    Attributes:
        pairs: the output folder of `prepare`.
        shards: how many pair files it has.
        model: whose lengths and template apply.
    """

    pairs: Store
    shards: int
    model: ModelConfig

    def __call__(self, encoder: Encoder) -> BradleyTerry:
        """Tokens of every labelled pair that fits, the human's choice first."""
        rows: list[Row] = []
        names: list[str] = []
        for pair in self._labelled():
            answers = (pair["response_a"], pair["response_b"])
            chosen_first = answers if pair["label"] == "a" else answers[::-1]
            row = fit_length(
                encoder.encode(pair["prompt"], chosen_first),
                self.model.max_length,
                self.model.over_length,
                bos_id=encoder.bos_id,
            )
            if row is not None:
                rows.append(row)
                names.append(pair["pair_id"])
        return BradleyTerry(rows, names)

    def _labelled(self) -> list[dict[str, Any]]:
        columns = ["pair_id", "prompt", "response_a", "response_b", "label", "split"]
        tables = [self.pairs.read_table(part("pairs", k), columns) for k in range(self.shards)]
        rows = [row for table in tables for row in table.to_pylist()]
        return [row for row in rows if row["split"] == "labelled" and row["label"] is not None]
