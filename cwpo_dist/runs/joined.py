"""Scores, log-probs and tokens of answers in; those of the pairs that compare them out.

Of a pair whose answers are the same to the model there is nothing: it cannot say which is better.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import pyarrow.compute as pc

from cwpo_dist.lm.fitting import are_alike
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.sharing import in_one_row
from cwpo_dist.pairs.answers import Compared, read_compared
from cwpo_dist.pairs.records import (
    HEADS_SCHEMA,
    LOG_PROB_SCHEMA,
    SCORE_SCHEMA,
    LogProb,
    Score,
    read_records,
    read_rows,
    rows_of,
)
from cwpo_dist.scoring.answers_in import read_tokens
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.storage import Store

T = TypeVar("T")
N = TypeVar("N", Score, LogProb)
Margins = dict[str, float]  # by pair id: score difference a − b


@dataclass(frozen=True)
class ScoresIn:
    """What one annotator gave.

    Attributes:
        store: its output folder of `annotate`.
        retries: how many retries of its rejects count.
        pairs: the output folder of `prepare`.
        others: what it gave other pairs, where each fold of them has an output of its own.
        head: which of its heads; None: its one, or the mean of them.
    """

    store: Store
    retries: int
    pairs: Store
    others: tuple[ScoresIn, ...] = ()
    head: int | None = None

    def read(self, index: int) -> Margins:
        """Of the pairs of one shard both of whose answers it scored."""
        names = score_files(self.store, index, self.retries)
        given = {score.answer_id: score for name in names for score in self._scores(name)}
        pairs = _told_apart(read_compared(self.pairs, index), given)
        found = {pair.pair_id: a.score - b.score for pair, a, b in pairs}
        for other in self.others:
            found |= other.read(index)
        return found

    def _scores(self, name: str) -> list[Score]:
        if self.head is None:
            return read_rows(self.store, name, Score, SCORE_SCHEMA)
        table = read_records(self.store, name, HEADS_SCHEMA)
        score = pc.list_element(table["heads"], self.head)
        return rows_of(Score, table.drop_columns("score").append_column("score", score))


def score_files(store: Store, index: int, retries: int) -> list[str]:
    """The files with one shard's scores: the first, and one of each retry that it was part of."""
    again = [part("scores", index, number) for number in range(1, retries + 1)]
    return [part("scores", index), *(name for name in again if store.exists(name))]


class PairLogProbs(NamedTuple):
    """Of the two answers of a pair: summed log-probs under a model, in nats, and their tokens."""

    a: LogProb
    b: LogProb

    @property
    def sums(self) -> tuple[float, float]:
        """(a, b), in nats."""
        return self.a.logp, self.b.logp

    @property
    def means(self) -> tuple[float, float]:
        """(a, b), in nats a token."""
        return self.a.logp / self.a.tokens, self.b.logp / self.b.tokens


def read_log_probs(reference: Store, index: int) -> dict[str, LogProb]:
    """Those of one shard's answers, by their ids, from an output folder of `reference`."""
    found = read_rows(reference, part("reference", index), LogProb, LOG_PROB_SCHEMA)
    return {each.answer_id: each for each in found}


def pair_log_probs(reference: Store, prepared: Store, index: int) -> dict[str, PairLogProbs]:
    """Those of one shard's pairs, by pair id.

    Args:
        reference: the output folder of `reference`.
        prepared: that of `prepare`.
        index: the shard's number.
    """
    found = read_log_probs(reference, index)
    pairs = _told_apart(read_compared(prepared, index), found)
    return {pair.pair_id: PairLogProbs(a, b) for pair, a, b in pairs}


def pair_rows(tokens: Store, prepared: Store, index: int) -> dict[str, Row]:
    """Rows of both answers of one shard's pairs, in the pairs' order (a, b), by pair id.

    Args:
        tokens: the output folder of `tokens`.
        prepared: that of `prepare`.
        index: the shard's number.
    """
    return {name: in_one_row(both) for name, both in _pairs_of_rows(tokens, prepared, index)}


def pair_prompts(tokens: Store, prepared: Store, index: int) -> dict[str, list[int]]:
    """The tokens of the prompt alone of each of them: what of it the longer answer leaves.

    Args:
        tokens: the output folder of `tokens`.
        prepared: that of `prepare`.
        index: the shard's number.
    """
    found = _pairs_of_rows(tokens, prepared, index)
    longest = ((name, max(both, key=lambda row: len(row.prompt))) for name, both in found)
    return {name: list(row.prompt) for name, row in longest}


def _pairs_of_rows(
    tokens: Store, prepared: Store, index: int
) -> Iterator[tuple[str, tuple[Row, Row]]]:
    for pair, *both in both_known(read_compared(prepared, index), read_tokens(tokens, index)):
        if not are_alike(both):
            yield pair.pair_id, (both[0], both[1])


def both_known(
    pairs: Iterable[Compared], known: Mapping[str, T]
) -> Iterator[tuple[Compared, T, T]]:
    """The pairs both of whose answers are known, with what is known of each."""
    for pair in pairs:
        if pair.answer_a in known and pair.answer_b in known:
            yield pair, known[pair.answer_a], known[pair.answer_b]


def _told_apart(
    pairs: Iterable[Compared], known: Mapping[str, N]
) -> Iterator[tuple[Compared, N, N]]:
    """Those of them whose answers are not the same tokens."""
    for pair, a, b in both_known(pairs, known):
        if a.tokens_hash is None or a.tokens_hash != b.tokens_hash:
            yield pair, a, b
