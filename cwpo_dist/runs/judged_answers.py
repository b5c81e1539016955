"""Sampled answers and the gold scores of those that have some in; rows and figures of them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pyarrow as pa

from cwpo_dist.evaluation.accuracy import GoldAccuracy, gra
from cwpo_dist.evaluation.win_rates import Answers, answer_figures
from cwpo_dist.pairs.records import content_hash
from cwpo_dist.runs.divergence import Answered
from cwpo_dist.runs.gold_scores import GoldScores

JUDGED_SCHEMA = pa.schema(
    [
        *(("pair_id", pa.string()), ("prompt", pa.string()), ("against", pa.string())),
        *(("length", pa.int64()), ("baseline_length", pa.int64())),
        *(("gold", pa.float64()), ("baseline_gold", pa.float64())),
    ]
)


class JudgedAnswer(NamedTuple):
    """A policy's sampled answer beside a baseline's.

    Attributes:
        pair_id: of the pair whose prompt it is.
        prompt: the prompt's hash.
        against: which baseline.
        length: characters of the policy's answer.
        baseline_length: of the baseline's.
        gold: the gold score of the policy's answer; null without gold model or function, and where
            the model gave one of the two answers none.
        baseline_gold: of the baseline's.
    """

    pair_id: str
    prompt: str
    against: str
    length: int
    baseline_length: int
    gold: float | None
    baseline_gold: float | None


def judged_answers(
    against: str, rows: Sequence[Answered], gold: GoldScores | None
) -> list[JudgedAnswer]:
    """All answers, with the gold scores of those that have some."""
    scores = {} if gold is None else gold.scores
    return [
        JudgedAnswer(
            row.pair_id,
            content_hash(row.prompt.text),
            against,
            len(row.after),
            len(row.before),
            *scores.get(row.pair_id, (None, None)),
        )
        for row in rows
    ]


def judged_figures(
    answers: Sequence[JudgedAnswer], gold: GoldScores | None
) -> tuple[GoldAccuracy | None, Answers]:
    """GRA, where there is something to judge by, and lengths, which are of all answers."""
    everything = answer_figures(*_lengths(answers))
    if gold is None:
        return None, everything
    scored = [each for each in answers if each.gold is not None]
    ours = [each.gold for each in scored if each.gold is not None]
    theirs = [each.baseline_gold for each in scored if each.baseline_gold is not None]
    controlled = answer_figures(*_lengths(scored), ours, theirs).length_controlled
    accuracy = replace(gra(ours, theirs), left_out=gold.left_out)
    return accuracy, replace(everything, length_controlled=controlled)


def _lengths(answers: Sequence[JudgedAnswer]) -> tuple[list[int], list[int]]:
    return [each.length for each in answers], [each.baseline_length for each in answers]
