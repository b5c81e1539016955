"""Answers that came in rows of their own in; the pairs that are made of those to one prompt out.

Until all of a prompt are together such an answer goes as a pair with itself: the same id says that
two rows have the same answer, and its score stands where those of pairs do.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from cwpo_dist.config import Pairing
from cwpo_dist.pairs.counts import Counts
from cwpo_dist.pairs.layout import Layout
from cwpo_dist.pairs.pairing import compared, is_tie, pair_with
from cwpo_dist.pairs.parsing import ParsedPair
from cwpo_dist.pairs.pieces import Filed, filed_table
from cwpo_dist.pairs.records import PROMPT_DIGITS, Kind, canonical, prompt_of, rows_of
from cwpo_dist.pairs.rejects import BadRow
from cwpo_dist.pairs.splits import ordered
from cwpo_dist.pairs.stored import TEXTS, Pair, pairs_of

_CHUNK = 2048  # pairs that are Python objects at once

T = TypeVar("T")


@dataclass(frozen=True)
class Comparing:
    """How pairs are made of answers in rows of their own.

    Attributes:
        pairing: which of a prompt are compared; given: none.
        scored: what rates them are scores, which their pairs then have; else ranks, as −rank.
        seed: of the order of a pair's answers.
        kind: text or conversational.
    """

    pairing: Pairing
    scored: bool
    seed: int
    kind: Kind


def comparing(
    layouts: Iterable[Layout], pairing: Pairing, seed: int, kind: Kind
) -> Comparing | None:
    """How rows of all sources are compared; None where none has answers in rows of their own."""
    found = {name for layout in layouts for name in layout.columns}
    return Comparing(pairing, "rank" not in found, seed, kind) if "response" in found else None


@dataclass
class AloneCounts(Counts):
    """What became of answers in rows of their own.

    Attributes:
        rows: that hold one, and stay on their side.
        answers: the different ones in them.
        rated_twice: those that copies rate differently; they count as not rated.
        pairs: made of them.
        ties: two with one score or rank, of which no pair is made.
        too_many: prompts with so many that no pair of theirs is made.
        in_no_pair: answers that stand in none, made or given.
    """

    rows: int = 0
    answers: int = 0
    rated_twice: int = 0
    pairs: int = 0
    ties: int = 0
    too_many: int = 0
    in_no_pair: int = 0

    def sentences(self) -> Iterator[str]:
        """What became of them, for people."""
        yield (
            f"{self.rows:,} rows hold one response each, {self.answers:,} different ones: "
            f"{self.pairs:,} pairs are made of them, {self.ties:,} ties left out; "
            f"{self.in_no_pair:,} stand in no pair, and can be scored all the same"
        )
        if self.rated_twice:
            yield f"{self.rated_twice:,} responses have differing ratings, and count as not rated"
        if self.too_many:
            yield f"{self.too_many:,} prompts have too many responses to compare all two of them"


class Answer(NamedTuple, Generic[T]):
    """One answer: its id, its text where it is at hand, how good it is, and its row."""

    answer_id: str
    text: Any
    good: float | None
    row: T

    @property
    def hashed(self) -> str:
        """The digits that end its id."""
        return self.answer_id[PROMPT_DIGITS:]


def decided(
    answers: Iterable[Answer[T]], pairing: Pairing, counts: AloneCounts
) -> list[tuple[Answer[T], Answer[T]]]:
    """Which answers of one prompt make pairs, the better one first; counts them and the ties.

    Where pairs need ratings, what has none is left alone.
    """
    told = [each for each in answers if pairing == "all" or each.good is not None]
    if pairing == "given" or len(told) < 2:
        return []
    try:
        both = compared(told, pairing)
    except BadRow:
        counts.too_many += 1
        return []
    made = [each for each in both if not is_tie(each)]
    counts.pairs, counts.ties = counts.pairs + len(made), counts.ties + len(both) - len(made)
    return made


def are_alone(rows: pa.Table) -> pa.ChunkedArray:
    """Which rows are such answers."""
    return pc.equal(rows["answer_a"], rows["answer_b"])


def pairs_made(alone: pa.Table, how: Comparing, counts: AloneCounts) -> pa.Table:
    """The pairs of answers, without texts, and what stands beside them as pieces write it.

    Args:
        alone: a row an answer, sorted by their ids.
        how: which are compared.
        counts: to which what becomes of them is added.
    """
    made = _made(alone, how, counts) if how.pairing != "given" else iter(())
    chunks = iter(lambda: list(itertools.islice(made, _CHUNK)), [])
    tables = [_without_texts(chunk, how.kind).select(alone.column_names) for chunk in chunks]
    return pa.concat_tables([alone.slice(0, 0), *tables])


def _made(alone: pa.Table, how: Comparing, counts: AloneCounts) -> Iterator[tuple[Pair, Filed]]:
    rows = zip(pairs_of(alone), rows_of(Filed, alone), strict=True)
    answers = (
        Answer(filed.answer_a, pair.response_a, pair.score_a, (pair, filed)) for pair, filed in rows
    )
    for _, group in itertools.groupby(answers, lambda each: prompt_of(each.answer_id)):
        of_prompt = list(group)
        # One draw for all of a prompt, also where its rows are of several groups.
        labelled = of_prompt[0].row[1].in_labelled_part
        for better, worse in decided(of_prompt, how.pairing, counts):
            pair, filed = _pair(better, worse, how)
            yield pair, filed._replace(in_labelled_part=labelled)


def _pair(
    better: Answer[tuple[Pair, Filed]], worse: Answer[tuple[Pair, Filed]], how: Comparing
) -> tuple[Pair, Filed]:
    """Of the better one's row, but for kept columns, of which it has what both say."""
    (pair, filed), (_, other) = better.row, worse.row
    some = ParsedPair(pair.prompt, pair.response_a, pair.response_b, None, tools=pair.tools)
    parsed = pair_with(some, better, worse, scored=how.scored)
    made, a, b = ordered(parsed, canonical(pair.prompt), how.seed, pair.source or "")
    return made, filed._replace(answer_a=a, answer_b=b, kept=_kept_by_both(filed.kept, other.kept))


def _kept_by_both(one: str, other: str) -> str:
    """Of two rows' kept columns, as JSON, those with one value: 1 and true are two."""
    if one == other:
        return one
    return json.dumps(kept_by_both(json.loads(one), json.loads(other)), ensure_ascii=False)


def kept_by_both(one: Mapping[str, object], other: Mapping[str, object]) -> dict[str, object]:
    """Of two rows' kept columns those with one value in both."""
    spelled = {name: json.dumps(value) for name, value in other.items()}
    return {name: kept for name, kept in one.items() if json.dumps(kept) == spelled.get(name)}


def _without_texts(made: Sequence[tuple[Pair, Filed]], kind: Kind) -> pa.Table:
    """Pairs as a table, by ids: of K answers each text would stand in K − 1 of them."""
    table = filed_table([pair for pair, _ in made], [filed for _, filed in made], kind)
    for name in TEXTS:
        at, field_ = table.schema.get_field_index(name), table.schema.field(name)
        table = table.set_column(at, field_, pa.nulls(len(table), field_.type))
    return table


def are_named(alone: pa.Table, pairs: pa.Table) -> pa.ChunkedArray:
    """Which of the answers stand in some of the pairs."""
    told = pa.chunked_array([*pairs["answer_a"].chunks, *pairs["answer_b"].chunks], pa.string())
    return pc.is_in(alone["answer_a"], value_set=told)
