"""labelled pairs, weak language model → annotator: a one-label Hugging Face reward model."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.fitting import encode_pairs
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.templates import Fault, TokenError
from cwpo_dist.lm.tokens import Asked, Encoder
from cwpo_dist.pairs.records import read_pairs
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages.context import Context
from cwpo_dist.stages.graph import Node
from cwpo_dist.stages.watched import WatchedPairs, watched_pairs
from cwpo_dist.storage import Store
from cwpo_dist.training.tasks import BradleyTerry, TaskError
from cwpo_dist.training.workers import TrainSpec, train

logger = logging.getLogger(__name__)


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `model/`, which `AutoModelForSequenceClassification` loads; returns the counts."""
    weak = context.config.weak
    assert weak is not None, "graph() makes no fit node without a weak model"
    pairs = context.place(node.inputs["prepare"])
    most = context.config.prepare.max_reject_fraction
    spec = TrainSpec(
        name="fit",
        store=context.place(node),
        key=node.key,
        seed=node.settings["seed"],
        config=context.config.fit,
        model=weak,
        head="scores",
        make_task=LabelledPairs(pairs, context.shards(node), weak, most=most),
        make_held_out=LabelledPairs(
            pairs,
            context.shards(node),
            weak,
            watched=watched_pairs(context, node, context.config.fit),
        ),
    )
    return train(spec)


@dataclass(frozen=True)
class LabelledPairs:
    """Loads the labelled pairs in a worker.

    Attributes:
        pairs: the output folder of `prepare`.
        shards: how many pair files it has.
        model: whose lengths and template apply.
        most: the share of them that it may be unable to read (`prepare.max_reject_fraction`).
        watched: the held-out pairs to load instead; None: what is trained on.
    """

    pairs: Store
    shards: int
    model: ModelConfig
    most: float = 1.0
    watched: WatchedPairs | None = None

    def __call__(self, encoder: Encoder) -> BradleyTerry:
        """Tokens of every labelled pair that can be read and fits, the human's choice first.

        Raises:
            TaskError: when more than the share `most` of them cannot be read.
        """
        labelled = self._labelled()
        if labelled and isinstance(labelled[0]["prompt"], str):
            encoder.travel_as_text()
        found = encode_pairs(encoder, self.model, [_chosen_first(pair) for pair in labelled])
        rows = [row for row in found if isinstance(row, Row)]
        names = [
            pair["pair_id"]
            for pair, row in zip(labelled, found, strict=True)
            if isinstance(row, Row)
        ]
        faults = Counter(str(row.fault) for row in found if isinstance(row, TokenError))
        told = ", ".join(f"{number} × {fault}" for fault, number in faults.most_common())
        if told:
            logger.warning("fit: of %d labelled pairs are left out: %s", len(labelled), told)
        unread = faults.total() - faults[Fault.OVER_LENGTH]
        if unread > self.most * len(labelled):
            raise TaskError(
                f"{unread} of {len(labelled)} labelled pairs cannot be read ({told}), more than "
                f"prepare.max_reject_fraction {self.most:g} allows; give a chat_template that "
                "writes them, or raise it"
            )
        return BradleyTerry(rows, names, left_out=faults)

    def _labelled(self) -> list[dict[str, Any]]:
        columns = ["pair_id", "prompt", "response_a", "response_b", "label", "split"]
        tables = [read_pairs(self.pairs, part("pairs", k), columns) for k in range(self.shards)]
        rows = [row for table in tables for row in table.to_pylist()]
        if self.watched is not None:
            watched = self.watched.labels()
            return [row for row in rows if row["pair_id"] in watched]
        return [row for row in rows if row["split"] == "labelled" and row["label"] is not None]


def _chosen_first(pair: dict[str, Any]) -> Asked:
    answers = (pair["response_a"], pair["response_b"])
    return Asked(pair["prompt"], answers if pair["label"] == "a" else answers[::-1])
