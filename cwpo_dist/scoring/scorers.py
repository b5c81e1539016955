"""Shard workers: pairs → tokens, pairs → scores, tokens → log-probs, prompts → answers."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.generation import generate
from cwpo_dist.lm.loading import load_policy, load_reward_model
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.tokens import Encoder, TokenError, fit_length, load_tokenizer
from cwpo_dist.pairs.records import (
    ANSWER_SCHEMA,
    REFERENCE_SCHEMA,
    REJECT_SCHEMA,
    SCORE_SCHEMA,
    TOKEN_SCHEMA,
)
from cwpo_dist.scoring.forward import RowForward
from cwpo_dist.scoring.pipeline import ShardOutput, part
from cwpo_dist.storage import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairsIn:
    """Which rows of which pair files a worker reads.

    Attributes:
        store: the output folder of `prepare` (or any folder with `pairs/part-*.parquet`).
        splits: rows of these splits only; None: all.
    """

    store: Store
    splits: tuple[str, ...] | None = None

    def read(self, index: int) -> list[dict[str, Any]]:
        """The rows of one shard, in file order."""
        columns = ["pair_id", "prompt", "response_a", "response_b", "split"]
        rows = self.store.read_table(part("pairs", index), columns).to_pylist()
        return [row for row in rows if self.splits is None or row["split"] in self.splits]


class _Rejects:
    """Collects the rows that a shard sets aside, and why."""

    def __init__(self, index: int) -> None:
        self.source = part("pairs", index)
        self.rows: list[dict[str, Any]] = []

    def add(self, reason: str, position: int, pair_id: str) -> None:
        self.rows.append(
            {"reason": reason, "source": self.source, "position": position, "row": pair_id}
        )

    def table(self) -> pa.Table:
        return pa.Table.from_pylist(self.rows, schema=REJECT_SCHEMA)

    def counts(self) -> dict[str, int]:
        """Over-length rows are counted apart: they are good rows of another size."""
        reasons = Counter(row["reason"] for row in self.rows)
        over_length = reasons.pop("over_length", 0)
        return {"over_length": over_length, "rejects": sum(reasons.values())}


def _encode(
    encoder: Encoder, model: ModelConfig, rows: Sequence[dict[str, Any]], rejects: _Rejects
) -> dict[str, Row]:
    """Tokens by pair id; what is longer than the model's `max_length` goes to the rejects."""
    encoded = {}
    for position, row in enumerate(rows):
        try:
            tokens = encoder.encode(row["prompt"], (row["response_a"], row["response_b"]))
        except TokenError as error:
            rejects.add(f"tokens: {error}", position, row["pair_id"])
            continue
        fitting = fit_length(tokens, model.max_length, model.over_length, bos_id=encoder.bos_id)
        if fitting is None:
            rejects.add("over_length", position, row["pair_id"])
        else:
            encoded[row["pair_id"]] = fitting
    return encoded


class TokenWorker:
    """pairs → tokens of prompt and both answers, with the policy's tokenizer, once."""

    def __init__(self, pairs: PairsIn, model: ModelConfig) -> None:
        self.pairs, self.model = pairs, model
        self.encoder = Encoder(load_tokenizer(model), model.chat_template)

    def __call__(self, index: int) -> ShardOutput:
        """The tokens of every pair that fits."""
        rejects = _Rejects(index)
        rows = self.pairs.read(index)
        encoded = _encode(self.encoder, self.model, rows, rejects)
        columns = {
            "pair_id": list(encoded),
            "prompt": [row.prompt for row in encoded.values()],
            "answer_a": [row.answers[0] for row in encoded.values()],
            "answer_b": [row.answers[1] for row in encoded.values()],
        }
        counts = {
            "rows_in": len(rows),
            "rows": len(encoded),
            "tokens": sum(row.n_tokens for row in encoded.values()),
        }
        return ShardOutput(
            pa.table(columns, schema=TOKEN_SCHEMA), rejects.table(), counts | rejects.counts()
        )


class RewardWorker:
    """pairs → a score for each answer, by any one-label Hugging Face reward model."""

    def __init__(self, pairs: PairsIn, model: ModelConfig, annotator: str, max_tokens: int) -> None:
        self.pairs, self.model, self.annotator = pairs, model, annotator
        reward_model, tokenizer = load_reward_model(model), load_tokenizer(model)
        self.encoder = Encoder(tokenizer, model.chat_template)
        self.forward = RowForward(
            AnswerScores(reward_model), tokenizer.pad_token_id, model.max_length, max_tokens
        )

    def __call__(self, index: int) -> ShardOutput:
        """The scores of every pair that fits."""
        rejects = _Rejects(index)
        rows = self.pairs.read(index)
        encoded = _encode(self.encoder, self.model, rows, rejects)
        values = self.forward(list(encoded.values()))
        scores = []
        for position, (pair_id, (score_a, score_b)) in enumerate(zip(encoded, values, strict=True)):
            if math.isfinite(score_a) and math.isfinite(score_b):
                scores.append(
                    {
                        "pair_id": pair_id,
                        "annotator": self.annotator,
                        "score_a": score_a,
                        "score_b": score_b,
                    }
                )
            else:
                rejects.add("non-finite score", position, pair_id)
        counts = {
            "rows_in": len(rows),
            "rows": len(scores),
            "tokens": sum(row.n_tokens for row in encoded.values()),
        }
        table = pa.Table.from_pylist(scores, schema=SCORE_SCHEMA)
        return ShardOutput(table, rejects.table(), counts | rejects.counts())


class ReferenceWorker:
    """tokens → summed log-probs of both answers under a frozen policy."""

    def __init__(self, pairs: PairsIn, tokens: Store, model: ModelConfig, max_tokens: int) -> None:
        self.pairs, self.tokens = pairs, tokens
        policy = load_policy(model)
        pad = load_tokenizer(model).pad_token_id
        self.forward = RowForward(AnswerLogProbs(policy), pad, model.max_length, max_tokens)

    def __call__(self, index: int) -> ShardOutput:
        """The log-probs of every pair that the policy's tokens hold."""
        wanted = {row["pair_id"] for row in self.pairs.read(index)}
        rows = {i: r for i, r in read_tokens(self.tokens, index).items() if i in wanted}
        rejects = _Rejects(index)
        reference = []
        values = self.forward(list(rows.values()))
        for position, (pair_id, row, (logp_a, logp_b)) in enumerate(
            zip(rows, rows.values(), values, strict=True)
        ):
            if not (math.isfinite(logp_a) and math.isfinite(logp_b)):
                rejects.add("non-finite log-probability", position, pair_id)
                continue
            n_a, n_b = (len(answer) for answer in row.answers)
            reference.append(
                {"pair_id": pair_id, "logp_a": logp_a, "logp_b": logp_b, "n_a": n_a, "n_b": n_b}
            )
        counts = {
            "rows_in": len(rows),
            "rows": len(reference),
            "tokens": sum(row.n_tokens for row in rows.values()),
        }
        table = pa.Table.from_pylist(reference, schema=REFERENCE_SCHEMA)
        return ShardOutput(table, rejects.table(), counts | rejects.counts())


def read_tokens(tokens: Store, index: int) -> dict[str, Row]:
    """The tokens of one shard by pair id; answers in the pair's order (a, b)."""
    table = tokens.read_table(part("tokens", index)).to_pylist()
    return {r["pair_id"]: Row(r["prompt"], (r["answer_a"], r["answer_b"])) for r in table}


class AnswerWorker:
    """prompts → one sampled answer each; a shard is one batch, so its sampling is its own."""

    def __init__(self, prompts: Store, model: ModelConfig, sampling: dict[str, Any]) -> None:
        self.prompts, self.sampling = prompts, dict(sampling)
        self.policy = load_policy(model)
        self.tokenizer = load_tokenizer(model)

    def __call__(self, index: int) -> ShardOutput:
        """One answer to each prompt of the batch."""
        rows = self.prompts.read_table(part("prompts", index)).to_pylist()
        answers = generate(
            self.policy,
            self.tokenizer,
            [row["tokens"] for row in rows],
            batch_size=len(rows),
            **self.sampling,
        )
        table = pa.Table.from_pylist(
            [
                {"pair_id": row["pair_id"], "answer": answer}
                for row, answer in zip(rows, answers, strict=True)
            ],
            schema=ANSWER_SCHEMA,
        )
        counts = {"rows_in": len(rows), "rows": len(rows), "rejects": 0}
        return ShardOutput(table, _Rejects(index).table(), counts)
