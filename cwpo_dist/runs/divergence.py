"""Sampled answers of an aligned policy in; how far it went from its SFT model, in nats, out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from cwpo_dist.config import ModelConfig
from cwpo_dist.evaluation.left_out import LeftOut, Reasons
from cwpo_dist.evaluation.shares import AsDict
from cwpo_dist.lm.encoder import Asked
from cwpo_dist.lm.fitting import encode_answers
from cwpo_dist.lm.loading import load_config
from cwpo_dist.lm.reading import encoder_for
from cwpo_dist.lm.templates import TokenError
from cwpo_dist.pairs.answers import read_answers, read_compared
from cwpo_dist.pairs.records import TOKEN_SCHEMA, AnswerTokens, Prompt, Text, table_of
from cwpo_dist.pairs.stored import Pair, write_pairs
from cwpo_dist.runs.context import Context, policy_of, read_sampled
from cwpo_dist.runs.joined import read_log_probs
from cwpo_dist.runs.output_key import Node
from cwpo_dist.runs.scored_by import Scorers
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.pipeline import ShardJob, part
from cwpo_dist.scoring.scorers import ReferenceWorker, policy_module
from cwpo_dist.scoring.set_aside import reasons
from cwpo_dist.storage import Store


class Answered(NamedTuple):
    """A prompt, with what a baseline and the aligned model answered.

    Attributes:
        pair_id: of the pair whose prompt it is.
        prompt: with its tools.
        before: the baseline's answer.
        after: the aligned model's.
    """

    pair_id: str
    prompt: Prompt
    before: str
    after: str


_EMPTY = "empty answer"
_ROLES = ("sft", "aligned")


@dataclass(frozen=True)
class Divergence(AsDict):
    """The KL divergence of an aligned policy from its SFT model, by its sampled answers.

    Attributes:
        n: prompts.
        mean: in nats an answer.
        error: its standard error.
        left_out: the prompts that it is not of.
    """

    n: int
    mean: float | None
    error: float | None
    left_out: LeftOut = field(default_factory=LeftOut)


def kl_divergence(
    context: Context,
    node: Node,
    prompts: dict[str, Prompt],
    policy: ModelConfig,
    by: Scorers,
    new_tokens: int,
    rows_a_shard: int,
) -> Divergence:
    """KL(π‖π_SFT) = E_{y∼π} log π(y|x)/π_SFT(y|x), by the answers that π was heard to give.

    They were sampled at `evaluate.temperature`, and one cut at `max_new_tokens` is taken to end
    there: an estimate, the same for all arms. One that does not fit what was sampled (`max_length`
    of a prompt, and `max_new_tokens`) when its text is read again is left out, and counted.

    Args:
        context: the run.
        node: `evaluate`, which reads both models' answers.
        prompts: by the ids of their pairs.
        policy: as it was given, before any training.
        by: who computes log-probs.
        new_tokens: of an answer, at most.
        rows_a_shard: of them.
    """
    store = context.place(node).child("kl")
    models = {role: node.inputs[f"answers_{role}"] for role in _ROLES}
    told = {role: read_sampled(context, given) for role, given in models.items()}
    rows = [Answered(i, prompts[i], told["sft"][i], y) for i, y in told["aligned"].items() if y]
    shards = write_answered(store, rows, rows_a_shard)
    readers = {
        role: _reader(policy_of(context, given, policy), new_tokens)
        for role, given in models.items()
    }
    unread = _write_tokens(store, readers["aligned"], shards)
    values = {role: _log_probs(store, role, shards, model, by) for role, model in readers.items()}
    both = sorted(values["sft"].keys() & values["aligned"].keys())
    ratios = np.array([values["aligned"][i] - values["sft"][i] for i in both])
    empty = [(_EMPTY, None) for y in told["aligned"].values() if not y]
    left_out = LeftOut.of([*empty, *_missing(store, shards, unread, both)])
    if not len(ratios):
        return Divergence(0, None, None, left_out)
    error = float(ratios.std(ddof=1) / np.sqrt(len(ratios))) if len(ratios) > 1 else None
    return Divergence(len(ratios), float(ratios.mean()), error, left_out)


def _reader(policy: ModelConfig, new_tokens: int) -> ModelConfig:
    """The policy as it reads what it wrote: a prompt that it was given, and an answer after it.

    Where prompts are cut, a longer bound would admit some that it was never given whole.
    """
    if policy.over_length == "truncate":
        return policy.model_copy(update={"over_length": "drop"})
    positions = getattr(load_config(policy).get_text_config(), "max_position_embeddings", None)
    written = policy.max_length + new_tokens
    longest = max(policy.max_length, min(written, positions or written))
    return policy.model_copy(update={"max_length": longest})


def _missing(
    store: Store, shards: int, unread: Mapping[str, str], known: Sequence[str]
) -> Iterator[Reasons]:
    """Why answers have no log-prob under one of the models, or under both."""
    there = set(known)
    why = {role: reasons(store.child(role), "reference", range(shards)) for role in _ROLES}
    for index in range(shards):
        for pair in read_compared(store, index):
            name = pair.answer_b
            if pair.pair_id not in there:
                yield unread.get(name) or why["aligned"].get(name), why["sft"].get(name)


def _log_probs(
    store: Store, role: str, shards: int, policy: ModelConfig, by: Scorers
) -> dict[str, float]:
    """What a model thinks of the aligned one's answers, by pair id."""
    output, budget = store.child(role), by.section.max_tokens_per_batch
    worker = partial(ReferenceWorker, AnswersIn(store), store, policy, budget)
    by.run(ShardJob("reference", output, shards, worker), policy, policy_module)
    values: dict[str, float] = {}
    for index in range(shards):
        found = read_log_probs(output, index)
        pairs = read_compared(store, index)
        values |= {p.pair_id: found[p.answer_b].logp for p in pairs if p.answer_b in found}
    return values


def write_answered(store: Store, rows: Sequence[Answered], size: int) -> int:
    """Answers as pairs, the baseline's first, in shards of `size`; how many shards."""
    pairs = [
        Pair(row.pair_id, row.prompt.text, *_wrapped(row), tools=row.prompt.tools) for row in rows
    ]
    starts = range(0, len(rows), size)
    for index, start in enumerate(starts):
        write_pairs(store, index, pairs[start : start + size])
    return len(starts)


def _wrapped(row: Answered) -> tuple[Text, Text]:
    """Both answers, the baseline's first, of the kind of their prompt: texts, or messages."""
    if isinstance(row.prompt.text, str):
        return row.before, row.after
    before, after = ([{"role": "assistant", "content": text}] for text in (row.before, row.after))
    return before, after


def _write_tokens(store: Store, model: ModelConfig, shards: int) -> dict[str, str]:
    """Writes tokens of prompts and the aligned model's answers.

    Returns:
        Why there are none of some answers, by their ids: most often they do not fit.
    """
    unread: dict[str, str] = {}
    encoder = encoder_for(model, "policy")
    for index in range(shards):
        told = {pair.answer_b for pair in read_compared(store, index)}
        answers = [answer for answer in read_answers(store, index) if answer.answer_id in told]
        asked = [Asked(answer.prompt, [answer.answer], answer.tools) for answer in answers]
        tokens = []
        for answer, (row,) in zip(answers, encode_answers(encoder, model, asked), strict=True):
            if isinstance(row, TokenError):
                unread[answer.answer_id] = str(row.fault or row)
            else:
                tokens.append(AnswerTokens(answer.answer_id, row.prompt, row.answers[0]))
        store.create_table(part("tokens", index), table_of(tokens, TOKEN_SCHEMA))
    return unread
