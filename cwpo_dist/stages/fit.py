"""labelled pairs, weak language model → annotator: a one-label Hugging Face reward model."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from cwpo_dist.config import ModelConfig
from cwpo_dist.evaluation.calibration import people_share
from cwpo_dist.lm.encoder import Asked, Encoder
from cwpo_dist.lm.fitting import encode_pairs
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.templates import Fault, TokenError
from cwpo_dist.pairs.records import TEXTS, read_pairs
from cwpo_dist.pairs.splits import VOTES
from cwpo_dist.pairs.stored import pair_rows
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.graph import Node
from cwpo_dist.runs.held_out_pairs import WatchedPairs, watched_pairs
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.storage import Store
from cwpo_dist.training.group import TrainSpec, train
from cwpo_dist.training.tasks import BradleyTerry, TaskError

logger = logging.getLogger(__name__)


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `model/`, which `AutoModelForSequenceClassification` loads; returns the counts."""
    weak = context.config.weak
    assert weak is not None, "graph() makes no fit node without a weak model"
    pairs = context.place(node.inputs["prepare"])
    task = LabelledPairs(
        pairs,
        context.shards(node),
        weak,
        by_votes=node.settings["labels"] == "votes",
        most=context.config.prepare.max_reject_fraction,
    )
    watched = watched_pairs(context, node, context.config.fit)
    spec = TrainSpec(
        name="fit",
        store=context.place(node),
        key=node.key,
        seed=node.settings["seed"],
        config=context.config.fit,
        model=weak,
        head="scores",
        make_task=task,
        make_held_out=replace(task, most=1.0, watched=watched),
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
        most: the share of them that it may be unable to read (`prepare.max_reject_fraction`).
        watched: the held-out pairs to load instead; None: what is trained on.
    """

    pairs: Store
    shards: int
    model: ModelConfig
    by_votes: bool = False
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
        read = [
            (pair, row) for pair, row in zip(labelled, found, strict=True) if isinstance(row, Row)
        ]
        faults = Counter(str(row.fault) for row in found if isinstance(row, TokenError))
        self._tell(len(labelled), faults)
        shares = [_first_share(pair) for pair, _ in read] if self.by_votes else None
        if shares is not None:
            soft = sum(share not in (0.0, 1.0) for share in shares)
            logger.info("fit: of %d pairs %d are learned as a share of votes", len(read), soft)
        rows, names = [row for _, row in read], [pair["pair_id"] for pair, _ in read]
        return BradleyTerry(rows, names, shares, left_out=faults)

    def _tell(self, pairs: int, faults: Counter[str]) -> None:
        """Says what cannot be read, and stops where that is too much."""
        told = ", ".join(f"{number} × {fault}" for fault, number in faults.most_common())
        if told:
            logger.warning("fit: of %d labelled pairs are left out: %s", pairs, told)
        unread = faults.total() - faults[Fault.OVER_LENGTH]
        if unread > self.most * pairs:
            raise TaskError(
                f"{unread} of {pairs} labelled pairs cannot be read ({told}), more than "
                f"prepare.max_reject_fraction {self.most:g} allows; give a chat_template that "
                "writes them, or raise it"
            )

    def _labelled(self) -> list[dict[str, Any]]:
        columns = ["pair_id", *TEXTS, "tools", "split", "label", "tie", *VOTES]
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


def _chosen_first(pair: dict[str, Any]) -> Asked:
    """The answers, people's choice first; of a tie in their own order."""
    answers = (pair["response_a"], pair["response_b"])
    return Asked(pair["prompt"], answers[::-1] if pair["label"] == "b" else answers, pair["tools"])


def _first_share(pair: dict[str, Any]) -> float:
    """The share of people that prefer the answer that is put first; half in a tie without votes."""
    share = people_share(pair["label"], *(pair[name] for name in VOTES))
    if share is None:  # without a label only ties are in the labelled part
        return 0.5
    return 1 - share if pair["label"] == "b" else share
