"""Shard workers: pairs → tokens, pairs → scores, tokens → log-probs, prompts → answers."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import pyarrow as pa

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.encoder import Asked, Encoder, fill_id, load_tokenizer
from cwpo_dist.lm.fitting import encode_pairs
from cwpo_dist.lm.generation import generate
from cwpo_dist.lm.loading import load_config, load_policy, load_reward_model
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.lm.reading import encoder_for
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.templates import Fault, TokenError
from cwpo_dist.pairs.records import (
    ANSWER_SCHEMA,
    PROMPT_SCHEMA,
    REFERENCE_SCHEMA,
    REJECT_SCHEMA,
    SCORE_SCHEMA,
    TOKEN_SCHEMA,
    LogProbs,
    PairTokens,
    PromptTokens,
    SampledAnswer,
    Score,
    read_records,
    read_rows,
    table_of,
)
from cwpo_dist.pairs.stored import Pair, read_pairs
from cwpo_dist.scoring.devices import assigned_device, fix_workspace
from cwpo_dist.scoring.forward import Ranks, RowForward
from cwpo_dist.scoring.invariant import InvariantForward
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.scoring.retries import Input, ShardOutput
from cwpo_dist.scoring.set_aside import SetAside
from cwpo_dist.storage import Store

logger = logging.getLogger(__name__)

SLICE = 256  # pairs that are tokenised together, while those before are scored
Pairs = Sequence[Input[Pair]]


@dataclass(frozen=True)
class PairsIn:
    """Which rows of which pair files a worker reads.

    Attributes:
        store: the output folder of `prepare` (or any folder with `pairs/part-*.parquet`).
        splits: rows of these splits only; None: all.
        selected: given a shard, the ids of those of its pairs that are read; None: all.
    """

    store: Store
    splits: tuple[str, ...] | None = None
    selected: Callable[[int], Container[str]] | None = None

    def read(self, index: int) -> list[Input[Pair]]:
        """The rows of one shard, in file order."""
        pairs = read_pairs(self.store, index)
        names = None if self.selected is None else self.selected(index)
        return [
            Input(pair.pair_id, position, pair)
            for position, pair in enumerate(pairs)
            if (names is None or pair.pair_id in names)
            and (self.splits is None or pair.split in self.splits)
        ]


def _encoded(
    encoder: Encoder, model: ModelConfig, rows: Pairs, rejects: SetAside, ties: bool = False
) -> Iterator[list[tuple[Input[Pair], Row]]]:
    """Slices of pairs with their tokens; what has none or is too long is set aside.

    A thread tokenises ahead, so that a device never waits for text.
    """
    slices = [rows[start : start + SLICE] for start in range(0, len(rows), SLICE)]
    with ThreadPoolExecutor(1) as ahead:
        tokenised = ahead.map(partial(_tokens, encoder, model, ties), slices)
        for pairs, found in zip(slices, tokenised, strict=True):
            encoded = []
            for pair, tokens in zip(pairs, found, strict=True):
                if isinstance(tokens, Row):
                    encoded.append((pair, tokens))
                else:
                    rejects.add(tokens, pair)
            yield encoded


def _tokens(encoder: Encoder, model: ModelConfig, ties: bool, rows: Pairs) -> list[Row | str]:
    """Each pair's tokens, or why it is set aside."""
    asked = [Asked(row.given.prompt, row.given.answers, row.given.tools) for row in rows]
    found = encode_pairs(encoder, model, asked, ties=ties)
    return [row if isinstance(row, Row) else _reason(row) for row in found]


def _reason(error: TokenError) -> str:
    if error.fault is Fault.OVER_LENGTH:
        return str(error.fault)
    return f"{error.fault}: {error}"


class TokenWorker:
    """pairs → tokens of prompt and both answers, with the policy's tokenizer, once."""

    def __init__(self, pairs: PairsIn, model: ModelConfig) -> None:
        self.pairs, self.model = pairs, model
        self.encoder = encoder_for(model, "policy")

    def read(self, index: int) -> Pairs:
        """The pairs."""
        return self.pairs.read(index)

    def __call__(self, index: int, rows: Pairs) -> ShardOutput:
        """The tokens of every pair that fits."""
        rejects = SetAside(index)
        slices = _encoded(self.encoder, self.model, rows, rejects)
        encoded = [pair for each in slices for pair in each]
        tokens = [PairTokens(pair.pair_id, row.prompt, *row.answers) for pair, row in encoded]
        counts = {
            "rows_in": len(rows),
            "rows": len(encoded),
            "tokens": sum(row.n_tokens for _, row in encoded),
        }
        table = table_of(tokens, TOKEN_SCHEMA)
        return ShardOutput(table, rejects.table(), counts | rejects.counts())


class RewardWorker:
    """pairs → a score for each answer, by any one-label Hugging Face reward model."""

    def __init__(
        self,
        pairs: PairsIn,
        model: ModelConfig,
        annotator: str,
        max_tokens: int,
        *,
        ties: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        """Loads the model.

        Args:
            pairs: what is scored.
            model: the reward model.
            annotator: its name in the scores.
            max_tokens: of one forward pass.
            ties: score also pairs whose answers it cannot tell apart.
            batch_invariant: no answer's bits depend on what is scored beside it.

        Raises:
            ModelError: for a model that cannot be loaded, read or, where asked, be kept invariant.
        """
        self.pairs, self.model, self.annotator, self.ties = pairs, model, annotator, ties
        if batch_invariant:
            fix_workspace()
        reward_model = load_reward_model(model, device=assigned_device())
        self.encoder = encoder_for(model, "reward model", reward_model)
        scores = AnswerScores(reward_model, token_types=self.encoder.token_types)
        forward = InvariantForward if batch_invariant else RowForward
        self.forward = forward(scores, self.encoder.pad_id, model.max_length, max_tokens)

    def read(self, index: int) -> Pairs:
        """The pairs."""
        return self.pairs.read(index)

    def __call__(self, index: int, rows: Pairs) -> ShardOutput:
        """The scores of every pair that fits."""
        rejects = SetAside(index)
        counts = Counter({"rows_in": len(rows)})
        scores = []
        for encoded in _encoded(self.encoder, self.model, rows, rejects, self.ties):
            forwarded = self.forward([row for _, row in encoded])
            counts.update(forwarded.counts)
            for (pair, _), (score_a, score_b) in zip(encoded, forwarded.values, strict=True):
                if not (math.isfinite(score_a) and math.isfinite(score_b)):
                    rejects.add("non-finite score", pair)
                    continue
                scores.append(Score(pair.pair_id, self.annotator, score_a, score_b))
        counts.update({"rows": len(scores)} | rejects.counts())
        table = table_of(scores, SCORE_SCHEMA)
        return ShardOutput(table, rejects.table(), dict(counts))


class ReferenceWorker:
    """tokens → summed log-probs of both answers under a frozen policy."""

    def __init__(
        self,
        pairs: PairsIn,
        tokens: Store,
        model: ModelConfig,
        max_tokens: int,
        ranks: Ranks | None = None,
    ) -> None:
        """Loads the policy, unless ranks hold it together."""
        self.pairs, self.tokens = pairs, tokens
        if ranks is not None:
            module = ranks.module
        else:
            module = AnswerLogProbs(load_policy(model, device=assigned_device()))
        words = load_config(model).get_text_config().vocab_size
        pad = fill_id(load_tokenizer(model), words)
        self.forward = RowForward(module, pad, model.max_length, max_tokens, ranks)

    def read(self, index: int) -> list[Input[Row]]:
        """The tokens of the pairs, of those that have some."""
        tokens = read_tokens(self.tokens, index)
        return [
            Input(pair_id, position, tokens[pair_id])
            for pair_id, position, _ in self.pairs.read(index)
            if pair_id in tokens
        ]

    def __call__(self, index: int, rows: Sequence[Input[Row]]) -> ShardOutput:
        """The log-probs of every pair."""
        rejects = SetAside(index)
        found = []
        forwarded = self.forward([row.given for row in rows])
        for row, (logp_a, logp_b) in zip(rows, forwarded.values, strict=True):
            if not (math.isfinite(logp_a) and math.isfinite(logp_b)):
                rejects.add("non-finite log-probability", row)
                continue
            n_a, n_b = row.given.n_scored
            found.append(LogProbs(row.pair_id, logp_a, logp_b, n_a, n_b))
        counts = {"rows_in": len(rows), "rows": len(found)} | forwarded.counts
        table = table_of(found, REFERENCE_SCHEMA)
        return ShardOutput(table, rejects.table(), counts | rejects.counts())


def read_tokens(tokens: Store, index: int) -> dict[str, Row]:
    """The tokens of one shard by pair id; answers in the pair's order (a, b)."""
    found = read_rows(tokens, part("tokens", index), PairTokens, TOKEN_SCHEMA)
    return {each.pair_id: Row(each.prompt, (each.answer_a, each.answer_b)) for each in found}


def token_views(tokens: Store, index: int) -> dict[str, Row]:
    """The same without a Python number a token: views of int32 that read like lists."""
    table = read_records(tokens, part("tokens", index), TOKEN_SCHEMA)
    prompt, answer_a, answer_b = (_views(table[name]) for name in PairTokens._fields[1:])
    names = table["pair_id"].to_pylist()
    return {name: Row(prompt[i], (answer_a[i], answer_b[i])) for i, name in enumerate(names)}


def _views(column: pa.ChunkedArray) -> list[Any]:
    lists = pa.concat_arrays(column.chunks)
    ids, ends = memoryview(lists.values.to_numpy()), lists.offsets.to_pylist()
    return [ids[start:end] for start, end in pairwise(ends)]


class AnswerWorker:
    """prompts → one sampled answer each; answers do not depend on the batch."""

    def __init__(
        self,
        prompts: Store,
        model: ModelConfig,
        sampling: dict[str, Any],
        together: int | None = None,
    ) -> None:
        """With `together` prompts at once; None: all of a shard."""
        self.prompts, self.sampling, self.together = prompts, dict(sampling), together
        self.policy = load_policy(model, device=assigned_device())
        self.tokenizer = load_tokenizer(model)

    def read(self, index: int) -> list[Input[list[int]]]:
        """The prompts of the batch."""
        rows = read_rows(self.prompts, part("prompts", index), PromptTokens, PROMPT_SCHEMA)
        return [Input(row.pair_id, place, row.tokens) for place, row in enumerate(rows)]

    def __call__(self, index: int, rows: Sequence[Input[list[int]]]) -> ShardOutput:
        """One answer to each prompt of the batch."""
        answers = generate(
            self.policy,
            self.tokenizer,
            [row.given for row in rows],
            batch_size=self.together or len(rows),
            **self.sampling,
        )
        both = zip(rows, answers, strict=True)
        table = table_of([SampledAnswer(row.pair_id, text) for row, text in both], ANSWER_SCHEMA)
        counts = {"rows_in": len(rows), "rows": len(rows), "rejects": 0}
        return ShardOutput(table, REJECT_SCHEMA.empty_table(), counts)
