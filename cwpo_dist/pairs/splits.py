"""A pair and a seed in; the order of its answers, its side, its split out. Duplicates, leaks.

Everything here is a function of content and seed, never of the order or number of the rows, so
that tomorrow's rows move none of yesterday's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from cwpo_dist.config import Split
from cwpo_dist.pairs.chosen import Label
from cwpo_dist.pairs.parsing import ParsedPair
from cwpo_dist.pairs.records import (
    Canonical,
    answer_id,
    canonical,
    content_hash,
    pair_id,
    prompt_id,
    prompt_of,
    unit_hash,
)
from cwpo_dist.pairs.rejects import Reason
from cwpo_dist.pairs.stored import Pair, Told
from cwpo_dist.pairs.verdicts import Verdict, majority

Side = Literal["train", "validation", "test"]
Into = Side | Literal["labelled"]  # what a source is for

# A prompt on two sides stays on the later one of this tuple: what is measured on is never shrunk
# in favour of what is trained on.
SIDES: tuple[Side, ...] = ("train", "validation", "test")
SPLITS: tuple[Split, ...] = ("labelled", "unlabelled", "validation", "test")
LEAKED = {"test": Reason.IN_TEST, "validation": Reason.IN_VALIDATION}

# One prompt on one side, as far as a pass over all buckets must know it.
SIDE_SCHEMA = pa.schema([("prompt_hash", pa.string()), ("side", pa.int8())])


@dataclass(frozen=True)
class SplitRule:
    """The shares of the sides, drawn by hash from the split key: the prompt, or the group."""

    seed: int
    labelled: float
    validation: float
    test: float

    def side(self, key: str, into: Side | None = None) -> Side:
        """`into` where the source says so, else a draw from hash(seed, key)."""
        if into is not None:
            return into
        draw = unit_hash(self.seed, "side", key)
        if draw < self.test:
            return "test"
        return "validation" if draw < self.test + self.validation else "train"

    def is_labelled(self, key: str) -> bool:
        """Whether a training pair with this key belongs to the labelled part, if it has a label."""
        return unit_hash(self.seed, "labelled", key) < self.labelled


@dataclass(frozen=True)
class Fold:
    """One of several parts of the prompts, drawn by hash, with their pairs and answers.

    Attributes:
        seed: of the draw.
        of: how many parts there are.
        number: which one it is, from 0.
    """

    seed: int
    of: int
    number: int

    def __contains__(self, name: object) -> bool:
        """Whether it holds a pair, or an answer, by its id."""
        return int(unit_hash(self.seed, "fold", prompt_of(str(name))) * self.of) == self.number

    def identity(self) -> dict[str, object]:
        """What decides what it holds."""
        return {"fold": [self.seed, self.of, self.number]}


def split_of(
    side: Side, in_labelled_part: bool, label: str | None, *, learned_tie: bool = False
) -> Split:
    """The split; a training pair without a label is unlabelled whatever its draw.

    Args:
        side: of the pair.
        in_labelled_part: its draw.
        label: of people.
        learned_tie: whether it is a tie, and ties are to be learned from.
    """
    if side != "train":
        return side
    tells = label is not None or learned_tie
    return "labelled" if in_labelled_part and tells else "unlabelled"


def is_swapped(seed: int, pair_id: str) -> bool:
    """Whether the answer that sorts first becomes response_b.

    The order depends on the content alone, so position says nothing about the label, and two
    copies of a pair agree on it whichever answer was chosen in each.
    """
    return unit_hash(seed, "order", pair_id) < 0.5


_LABELS: dict[str | None, Label] = {"first": "a", "second": "b"}  # before a pair is swapped


class Drawn(NamedTuple):
    """Where a pair lies by its content and the seed, its copies and leaks apart.

    Attributes:
        prompt_hash: of its prompt, which lies on one side alone.
        side: its number in SIDES.
        in_labelled_part: whether it is labelled if it is for training and has a label.
        answer_a: id of its first answer.
        answer_b: of the other; the same one of an answer in a row of its own.
    """

    prompt_hash: str
    side: int
    in_labelled_part: bool
    answer_a: str
    answer_b: str

    @property
    def alone(self) -> bool:
        """Whether it is of an answer in a row of its own, which goes as a pair with itself."""
        return self.answer_a == self.answer_b


def drawn(given: ParsedPair, rule: SplitRule, source: str, into: Into | None) -> tuple[Pair, Drawn]:
    """A pair in the order and on the side that its content and the seed decide.

    Args:
        given: as its source has it.
        rule: the seed and the shares of the sides.
        source: where it comes from.
        into: the side to which all of its source goes, or the labelled part; None: by hash.
    """
    prompt = canonical(given.prompt)
    pair, *answers = ordered(given, prompt, rule.seed, source)
    prompt_hash = content_hash(prompt)
    key = prompt_hash if given.group is None else given.group
    side = SIDES.index(rule.side(key, "train" if into == "labelled" else into))
    labelled = into == "labelled" or rule.is_labelled(key)
    return pair, Drawn(prompt_hash, side, labelled, *answers)


def ordered(given: ParsedPair, prompt: Canonical, seed: int, source: str) -> tuple[Pair, str, str]:
    """A pair in the order that its content and the seed decide, and the ids of its answers.

    Args:
        given: as its source has it.
        prompt: its prompt's canonical spelling.
        seed: of the order.
        source: where it comes from.
    """
    own = given.numbers
    first, second = map(canonical, (given.first, given.second))
    asked = prompt_id(prompt, given.tools)
    answers = answer_id(asked, first), answer_id(asked, second)
    pair = Pair(
        pair_id(asked, first, second),
        given.prompt,
        given.first,
        given.second,
        given.tools,
        _LABELS.get(given.label),
        given.label == "tie",
        given.votes_first,
        given.votes_second,
        given.votes_tie,
        own.weight,
        own.confidence,
        own.score_first,
        own.score_second,
        source=source,
    )
    if (first < second) == is_swapped(seed, pair.pair_id):
        pair, answers = pair.swap(), answers[::-1]
    return pair, *answers


def merge(copies: Sequence[Told]) -> tuple[Told, bool]:
    """What copies of one pair say together: votes add up, labels (or ties) must agree.

    Where labels differ, and each is no more than one person's vote, all votes make the label.

    Args:
        copies: of one pair, at least one; the first gives its numbers.

    Returns:
        What they say, and whether they had conflicting labels (then the label is None).
    """
    merged = copies[0]._replace(
        votes_a=_total(told.votes_a for told in copies),
        votes_b=_total(told.votes_b for told in copies),
        votes_tie=_total(told.votes_tie for told in copies),
    )
    labels = {_said(told) for told in copies} - {None}
    if len(labels) > 1 and all(_said(told) is None or _is_one_vote(told) for told in copies):
        labels = {_voted(merged)}
    conflict = len(labels) > 1
    label = None if conflict or not labels else labels.pop()
    return merged._replace(label=None if label == "tie" else label, tie=label == "tie"), conflict


def _said(told: Told) -> Verdict | None:
    return "tie" if told.tie else told.label


def _is_one_vote(told: Told) -> bool:
    votes = told.votes_a, told.votes_b, told.votes_tie
    return sum(filter(None, votes)) == 1 and _said(told) == _voted(told)


def _voted(told: Told) -> Verdict | None:
    return majority(told.votes_a or 0, told.votes_b or 0, told.votes_tie or 0)


def _total(votes: Iterable[int | None]) -> int | None:
    given = [vote for vote in votes if vote is not None]
    return sum(given) if given else None


def leaks(prompts: pa.Table) -> pa.Table:
    """The prompts that lie on several sides, each with the one side that keeps them.

    Args:
        prompts: rows of SIDE_SCHEMA, any number for one prompt.
    """
    sides = prompts.group_by("prompt_hash").aggregate([("side", "min"), ("side", "max")])
    several = sides.filter(pc.not_equal(sides["side_min"], sides["side_max"]))
    return several.select(["prompt_hash", "side_max"]).rename_columns(SIDE_SCHEMA.names)
