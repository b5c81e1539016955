"""Shard workers: answers → tokens, answers → scores, tokens → log-probs, prompts → answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import nn

from cwpo_dist.config import Engine, ModelConfig
from cwpo_dist.lm.encoder import fill_id, load_tokenizer
from cwpo_dist.lm.generation import generate
from cwpo_dist.lm.heads import name_heads
from cwpo_dist.lm.loading import ModelError, load_config, load_policy, load_reward_model
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores, scores_last_token, unwrapped
from cwpo_dist.lm.reading import encoder_for
from cwpo_dist.lm.rows import CutRow, Row
from cwpo_dist.lm.sharing import SharedRows, tokens_hash
from cwpo_dist.lm.vllm_generation import VllmWriter
from cwpo_dist.pairs.records import (
    ANSWER_SCHEMA,
    HEADS_SCHEMA,
    LOG_PROB_SCHEMA,
    PROMPT_SCHEMA,
    REJECT_SCHEMA,
    SCORE_SCHEMA,
    TOKEN_SCHEMA,
    AnswerTokens,
    HeadScores,
    LogProb,
    PromptTokens,
    SampledAnswer,
    prompt_of,
    read_rows,
    table_of,
)
from cwpo_dist.scoring.answers_in import Answers, AnswersIn, encoded, read_tokens
from cwpo_dist.scoring.devices import assigned_device, assigned_gpus, fix_workspace
from cwpo_dist.scoring.forward import Ranks, RowForward
from cwpo_dist.scoring.invariant import InvariantForward
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.scoring.retries import Input, ShardOutput, T
from cwpo_dist.scoring.set_aside import SetAside
from cwpo_dist.storage import Store

STATES = 64  # numbers of an answer's projected state: of a million pairs, 256 MB


class TokenWorker:
    """answers → their tokens and those of the prompt before them, with the policy's tokenizer."""

    def __init__(self, answers: AnswersIn, model: ModelConfig) -> None:
        self.answers, self.model = answers, model
        self.encoder = encoder_for(model, "policy")

    def read(self, index: int) -> Answers:
        """The answers."""
        return self.answers.read(index)

    def __call__(self, index: int, rows: Answers) -> ShardOutput:
        """The tokens of every answer that fits."""
        rejects, hashes = SetAside(index), dict[str, int | None]()
        tokens: list[AnswerTokens] = []
        number = 0
        for slice_ in encoded(self.encoder, self.model, rows, rejects):
            number += sum(row.n_tokens for row in _shared(slice_).rows)
            hashes |= {each.name: tokens_hash(row) for each, row in slice_}
            tokens += [
                AnswerTokens(each.name, row.prompt, row.answers[0], isinstance(row, CutRow))
                for each, row in slice_
            ]
        self.answers.set_alike_aside(index, hashes, rejects)
        counts = {"rows_in": len(rows), "rows": len(tokens), "tokens": number}
        table = table_of(tokens, TOKEN_SCHEMA)
        return ShardOutput(table, rejects.table(), counts | rejects.counts())


def reward_module(model: ModelConfig, device: torch.device) -> AnswerScores:
    """A ready reward model as it is applied."""
    loaded = load_reward_model(model, device=device)
    encoder = encoder_for(model, "reward model", loaded)
    return AnswerScores(loaded, token_types=encoder.token_types)


def states_module(model: ModelConfig, device: torch.device) -> AnswerScores:
    """A reward model that says what its head reads of an answer: a projection, last the score.

    The projection is drawn once and for all, so that it is the same in each actor.

    Raises:
        ModelError: for a model without a head that is one matrix over an answer's last token.
    """
    loaded = load_reward_model(model, device=device)
    head = getattr(loaded, "score", None)
    if not scores_last_token(loaded) or type(head) is not nn.Linear:
        raise ModelError(
            f"{model.model_name_or_path}: its score is no matrix times an answer's last state, "
            "which strategy 'information' reads; take 'uncertain', or another of docs/ask.md"
        )
    drawn = torch.Generator().manual_seed(0)
    projection = torch.randn(min(STATES, head.in_features), head.in_features, generator=drawn)
    score = head.weight.detach().float().mean(0, keepdim=True)
    loaded.score = nn.Linear(head.in_features, len(projection) + 1, bias=False, device=device)
    with torch.no_grad():
        loaded.score.weight.copy_(torch.cat([projection.to(score), score]))
    name_heads(loaded.config, len(projection) + 1)
    encoder = encoder_for(model, "reward model", loaded)
    return AnswerScores(loaded, token_types=encoder.token_types)


def policy_module(model: ModelConfig, device: torch.device) -> AnswerLogProbs:
    """A policy as it is applied."""
    return AnswerLogProbs(load_policy(model, device=device))


class RewardWorker:
    """answers → a score for each, by any Hugging Face reward model, of one head or several."""

    def __init__(
        self,
        answers: AnswersIn,
        model: ModelConfig,
        annotator: str,
        max_tokens: int,
        ranks: Ranks | None = None,
        *,
        batch_invariant: bool = False,
        load: Callable[[ModelConfig, torch.device], AnswerScores] = reward_module,
    ) -> None:
        """Loads the model, unless ranks hold it together.

        Args:
            answers: what is scored.
            model: the reward model.
            annotator: its name in the scores.
            max_tokens: of one forward pass.
            ranks: that hold it.
            batch_invariant: no answer's bits depend on what is scored beside it.
            load: makes the module.

        Raises:
            ModelError: for a model that cannot be loaded, read or, where asked, be kept invariant.
        """
        self.answers, self.model, self.annotator = answers, model, annotator
        if batch_invariant:
            fix_workspace()
        module = load(model, assigned_device()) if ranks is None else ranks.module
        assert isinstance(module, AnswerScores)
        self.schema = SCORE_SCHEMA if module.heads == 1 else HEADS_SCHEMA
        self.encoder = encoder_for(model, "reward model", unwrapped(module.model))
        told = module, self.encoder.pad_id, model.max_length, max_tokens
        self.forward = InvariantForward(*told) if batch_invariant else RowForward(*told, ranks)

    def read(self, index: int) -> Answers:
        """The answers."""
        return self.answers.read(index)

    def __call__(self, index: int, rows: Answers) -> ShardOutput:
        """The scores of every answer that fits."""
        rejects = SetAside(index)
        counts = Counter({"rows_in": len(rows)})
        scores = []
        for slice_ in encoded(self.encoder, self.model, rows, rejects):
            shared = _shared(slice_)
            forwarded = self.forward(shared.rows)
            counts.update(forwarded.counts)
            for (answer, row), score in zip(slice_, shared.of_each(forwarded.values), strict=True):
                heads = score if isinstance(score, list) else [score]
                if all(map(math.isfinite, heads)):
                    told = answer.name, self.annotator, fmean(heads), tokens_hash(row)
                    scores.append(HeadScores(*told, heads))
                else:
                    rejects.add("non-finite score", answer)
        hashes = {score.answer_id: score.tokens_hash for score in scores}
        self.answers.set_alike_aside(index, hashes, rejects)
        counts.update({"rows": len(scores)} | rejects.counts())
        return ShardOutput(table_of(scores, self.schema), rejects.table(), dict(counts))


class ReferenceWorker:
    """tokens → the summed log-prob of each answer under a frozen policy."""

    def __init__(
        self,
        answers: AnswersIn,
        tokens: Store,
        model: ModelConfig,
        max_tokens: int,
        ranks: Ranks | None = None,
    ) -> None:
        """Loads the policy, unless ranks hold it together."""
        self.answers, self.tokens = answers, tokens
        module = policy_module(model, assigned_device()) if ranks is None else ranks.module
        words = load_config(model).get_text_config().vocab_size
        pad = fill_id(load_tokenizer(model), words)
        self.forward = RowForward(module, pad, model.max_length, max_tokens, ranks)

    def read(self, index: int) -> list[Input[Row]]:
        """The tokens of the answers, of those that have some."""
        tokens = read_tokens(self.tokens, index)
        return [
            Input(name, position, tokens[name])
            for name, position, _ in self.answers.read(index)
            if name in tokens
        ]

    def __call__(self, index: int, rows: Sequence[Input[Row]]) -> ShardOutput:
        """The log-prob of every answer."""
        rejects = SetAside(index)
        found = []
        shared = _shared([(row, row.given) for row in rows])
        forwarded = self.forward(shared.rows)
        for row, logp in zip(rows, shared.of_each(forwarded.values), strict=True):
            if math.isfinite(logp):
                (number,) = row.given.n_scored
                found.append(LogProb(row.name, logp, number, tokens_hash(row.given)))
            else:
                rejects.add("non-finite log-probability", row)
        hashes = {each.answer_id: each.tokens_hash for each in found}
        self.answers.set_alike_aside(index, hashes, rejects)
        counts = {"rows_in": len(rows), "rows": len(found)} | forwarded.counts
        table = table_of(found, LOG_PROB_SCHEMA)
        return ShardOutput(table, rejects.table(), counts | rejects.counts())


def _shared(answers: Sequence[tuple[Input[T], Row]]) -> SharedRows:
    """Answers with their tokens, in rows that share their prompts."""
    return SharedRows.of([(prompt_of(answer.name), row) for answer, row in answers])


class AnswerWorker:
    """prompts → one sampled answer each; an answer does not depend on the batch."""

    def __init__(
        self,
        prompts: Store,
        model: ModelConfig,
        sampling: dict[str, Any],
        together: int,
        engine: Engine = "transformers",
    ) -> None:
        """Loads the policy, which answers `together` prompts at once."""
        self.prompts, self.device = prompts, assigned_device()
        told = sampling | {"batch_size": together}
        self.write: Callable[[Sequence[Sequence[int]]], list[str]]
        if engine == "vllm":
            self.write = VllmWriter(model, gpus=assigned_gpus(), **told)
        else:
            policy = load_policy(model, device=self.device)
            self.device = policy.device
            self.write = partial(generate, policy, load_tokenizer(model), **told)

    def read(self, index: int) -> list[Input[list[int]]]:
        """The prompts of the batch."""
        rows = read_rows(self.prompts, part("prompts", index), PromptTokens, PROMPT_SCHEMA)
        return [Input(row.pair_id, place, row.tokens) for place, row in enumerate(rows)]

    def __call__(self, index: int, rows: Sequence[Input[list[int]]]) -> ShardOutput:
        """One answer to each prompt of the batch."""
        both = zip(rows, self.write([row.given for row in rows]), strict=True)
        table = table_of([SampledAnswer(row.name, text) for row, text in both], ANSWER_SCHEMA)
        counts = {"rows_in": len(rows), "rows": len(rows), "rejects": 0}
        return ShardOutput(table, REJECT_SCHEMA.empty_table(), counts)
