"""Sampled answers in; what a gold reward, a model or a rule, gives them out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from cwpo_dist.config import ModelConfig
from cwpo_dist.evaluation.gold_function import load_function
from cwpo_dist.pairs.answers import read_compared
from cwpo_dist.pairs.messages import plain_text
from cwpo_dist.pairs.records import SCORE_SCHEMA, Score, read_rows
from cwpo_dist.runs.divergence import Answered, write_answered
from cwpo_dist.runs.joined import both_known
from cwpo_dist.runs.scored_by import Scorers
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.pipeline import ShardJob, part
from cwpo_dist.scoring.scorers import RewardWorker, reward_module
from cwpo_dist.storage import Store

Gold = dict[str, tuple[float, float]]  # by pair id: of the aligned answer, of the baseline's


def scores_by_function(name: str, rows: Sequence[Answered]) -> Gold:
    """Gold scores (aligned, baseline) by a rule."""
    score = load_function(name)
    asked = [plain_text(row.prompt.text) for row in rows]
    return {
        row.pair_id: (score(text, row.after), score(text, row.before))
        for row, text in zip(rows, asked, strict=True)
    }


def scores_by_model(
    model: ModelConfig, by: Scorers, store: Store, rows: Sequence[Answered], size: int
) -> Gold:
    """Gold scores (aligned, baseline) by a reward model, on the pipeline that annotates.

    An answer without a finite score, or one that is too long, takes its pair out.

    Args:
        model: the reward model.
        by: who scores.
        store: where pairs and scores are written.
        rows: the answers.
        size: how many of them make a shard.
    """
    budget, shards = by.section.max_tokens_per_batch, write_answered(store, rows, size)
    job = ShardJob(
        name="scores",
        output=store,
        shards=shards,
        make_worker=partial(RewardWorker, AnswersIn(store), model, "gold", budget),
    )
    by.run(job, model, reward_module)
    gold: Gold = {}
    for index in range(shards):
        found = read_rows(store, part("scores", index), Score, SCORE_SCHEMA)
        scores = {score.answer_id: score.score for score in found}
        pairs = both_known(read_compared(store, index), scores)
        gold |= {pair.pair_id: (b, a) for pair, a, b in pairs}
    return gold
