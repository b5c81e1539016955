"""Answers, sampled or the data's, in; what a gold reward, a model or a rule, gives them out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from cwpo_dist.config import ModelConfig, Split
from cwpo_dist.evaluation.gold_function import load_function
from cwpo_dist.evaluation.left_out import LeftOut
from cwpo_dist.pairs.answers import read_compared
from cwpo_dist.pairs.messages import plain_text
from cwpo_dist.pairs.records import SCORE_SCHEMA, Score, read_rows
from cwpo_dist.pairs.stored import read_pairs
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.divergence import Answered, write_answered
from cwpo_dist.runs.given_model import GivenModel
from cwpo_dist.runs.joined import Margins, both_known
from cwpo_dist.runs.output_key import Node
from cwpo_dist.runs.scored_by import Scorers
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.pipeline import ShardJob, part
from cwpo_dist.scoring.scorers import RewardWorker, reward_module
from cwpo_dist.scoring.set_aside import reasons
from cwpo_dist.storage import Store


class GoldScores(NamedTuple):
    """What a gold reward gives sampled answers.

    Attributes:
        scores: by pair id: of the aligned answer, of the baseline's.
        left_out: the prompts of which an answer has none.
    """

    scores: dict[str, tuple[float, float]]
    left_out: LeftOut


def scores_by_function(name: str, rows: Sequence[Answered]) -> GoldScores:
    """Gold scores by a rule, which reads every answer."""
    score = load_function(name)
    asked = [plain_text(row.prompt.text) for row in rows]
    scores = {
        row.pair_id: (score(text, row.after), score(text, row.before))
        for row, text in zip(rows, asked, strict=True)
    }
    return GoldScores(scores, LeftOut())


def scores_by_model(
    model: ModelConfig, by: Scorers, store: Store, rows: Sequence[Answered], size: int
) -> GoldScores:
    """Gold scores by a reward model, on the pipeline that annotates.

    An answer without a finite score, or one that is too long, takes its pair out, and is counted.

    Args:
        model: the reward model.
        by: who scores.
        store: where pairs and scores are written.
        rows: the answers.
        size: how many of them make a shard.
    """
    shards = write_answered(store, rows, size)
    found = _scored(model, by, store, AnswersIn(store), shards)
    scores = {pair_id: (b, a) for pair_id, a, b in found}
    why = reasons(store, "scores", range(shards))
    missing = [
        (why.get(pair.answer_b), why.get(pair.answer_a))
        for index in range(shards)
        for pair in read_compared(store, index)
        if pair.pair_id not in scores
    ]
    return GoldScores(scores, LeftOut.of(missing))


def gold_margins(
    context: Context,
    node: Node,
    split: Split,
    model: GivenModel | None,
    rule: str | None,
    by: Scorers,
) -> Margins:
    """Gold scores of answer a less those of b, of a split's own pairs: by the model, or a rule."""
    prepared, shards = context.prepared(node), context.shards(node)
    if model is not None:
        store, answers = context.place(node).child("pairs"), AnswersIn(prepared, (split,))
        return {i: a - b for i, a, b in _scored(model.config, by, store, answers, shards)}
    assert rule is not None, "there is one of both"
    score, found = load_function(rule), Margins()
    for index in range(shards):
        for pair in read_pairs(prepared, index):
            if pair.split == split:
                prompt, a, b = map(plain_text, (pair.prompt, *pair.answers))
                found[pair.pair_id] = score(prompt, a) - score(prompt, b)
    return found


def _scored(
    model: ModelConfig, by: Scorers, store: Store, answers: AnswersIn, shards: int
) -> Iterator[tuple[str, float, float]]:
    """Pairs with the scores of both answers, a and b."""
    worker = partial(RewardWorker, answers, model, "gold", by.section.max_tokens_per_batch)
    job = ShardJob(name="scores", output=store, shards=shards, make_worker=worker)
    by.run(job, model, reward_module)
    for index in range(shards):
        found = read_rows(store, part("scores", index), Score, SCORE_SCHEMA)
        scores = {score.answer_id: score.score for score in found}
        compared = read_compared(answers.store, index, answers.splits)
        yield from ((pair.pair_id, a, b) for pair, a, b in both_known(compared, scores))
