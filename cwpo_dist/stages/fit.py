"""labelled pairs, weak language model → annotator: a one-label Hugging Face reward model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from cwpo_dist.config import ModelConfig
from cwpo_dist.evaluation.calibration import people_share
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.tokens import Asked, Encoder, TokenError, fit_length
from cwpo_dist.pairs.records import TEXTS, read_pairs
from cwpo_dist.pairs.stored import pair_rows
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages.context import Context
from cwpo_dist.stages.graph import Node
from cwpo_dist.stages.watched import WatchedPairs, watched_pairs
from cwpo_dist.storage import Store
from cwpo_dist.training.tasks import BradleyTerry
from cwpo_dist.training.workers import TrainSpec, train

logger = logging.getLogger(__name__)


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `model/`, which `AutoModelForSequenceClassification` loads; returns the counts."""
    weak = context.config.weak
    assert weak is not None, "graph() makes no fit node without a weak model"
    pairs = context.place(node.inputs["prepare"])
    task = LabelledPairs(
        pairs, context.shards(node), weak, by_votes=node.settings["labels"] == "votes"
    )
    spec = TrainSpec(
        name="fit",
        store=context.place(node),
        key=node.key,
        seed=node.settings["seed"],
        config=context.config.fit,
        model=weak,
        head="scores",
        make_task=task,
        make_held_out=replace(task, watched=watched_pairs(context, node, context.config.fit)),
    )
    return train(spec)


@dataclass(frozen=True)
class LabelledPairs:
    """Loads the labelled pairs in a worker.

    Attributes:
        pairs: the output folder of `prepare`.
        shards: how many pair files it has.
        model: whose lengths and template apply.
        by_votes: learn the share of people that chose an answer, where there are votes; ties, too.
        watched: the held-out pairs to load instead; None: what is trained on.
    """

    pairs: Store
    shards: int
    model: ModelConfig
    by_votes: bool = False
    watched: WatchedPairs | None = None

    def __call__(self, encoder: Encoder) -> BradleyTerry:
        """Tokens of every labelled pair that fits, the human's choice first."""
        rows: list[Row] = []
        names: list[str] = []
        shares: list[float] = []
        labelled = self._labelled()
        for pair in labelled:
            answers = (pair["response_a"], pair["response_b"])
            a_first = pair["label"] != "b"
            ordered = answers if a_first else answers[::-1]
            row = self._row(encoder, Asked(pair["prompt"], ordered, pair["tools"]))
            if row is not None:
                rows.append(row)
                names.append(pair["pair_id"])
                shares.append(_share(pair, a_first=a_first))
        if len(rows) < len(labelled):
            logger.warning(
                "fit: %d of %d labelled pairs are left out: longer than max_length %d, or without "
                "tokens of their own",
                *(len(labelled) - len(rows), len(labelled), self.model.max_length),
            )
        if self.by_votes:
            soft = sum(share not in (0.0, 1.0) for share in shares)
            logger.info("fit: of %d pairs %d are learned as a share of votes", len(rows), soft)
        return BradleyTerry(rows, names, shares if self.by_votes else None)

    def _row(self, encoder: Encoder, asked: Asked) -> Row | None:
        """None for a pair that is too long, or that cannot become tokens."""
        try:
            row = encoder.encode(*asked)
        except TokenError:
            return None
        return fit_length(row, self.model.max_length, self.model.over_length, bos_id=encoder.bos_id)

    def _labelled(self) -> list[dict[str, Any]]:
        columns = ["pair_id", *TEXTS, "tools", "split", "label", "tie", "votes_a", "votes_b"]
        tables = [read_pairs(self.pairs, part("pairs", k), columns) for k in range(self.shards)]
        rows = [row for table in tables for row in pair_rows(table)]
        if self.watched is not None:
            watched = self.watched.labels()
            return [row for row in rows if row["pair_id"] in watched]
        return [
            row
            for row in rows
            if row["split"] == "labelled"
            and (row["label"] is not None or (self.by_votes and row["tie"]))
        ]


def _share(pair: dict[str, Any], *, a_first: bool) -> float:
    """The share of people that prefer the answer that is put first; half of them in a tie."""
    if pair["tie"]:
        return 0.5
    share = people_share(pair["label"], pair["votes_a"], pair["votes_b"])
    assert share is not None, "a pair without a label is in no labelled part, but for ties"
    return share if a_first else 1 - share
