"""labelled pairs, weak language model → annotator: a one-label Hugging Face reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from cwpo_dist.config import ConfigError, ModelConfig
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.tokens import Encoder, fit_length
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages.context import Context
from cwpo_dist.stages.graph import Node
from cwpo_dist.storage import Store
from cwpo_dist.training.tasks import BradleyTerry


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

    def __call__(self, tokenizer: PreTrainedTokenizerBase) -> BradleyTerry:
        """Tokens of every labelled pair that fits, the human's choice first."""
        encoder = Encoder(tokenizer, self.model.chat_template)
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
