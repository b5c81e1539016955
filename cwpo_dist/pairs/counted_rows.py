"""Rows that were read in, without their texts; how many pairs and answers of each split are out.

They are merged, split and put together as `buckets` does it, but in memory.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from cwpo_dist.config import Split
from cwpo_dist.pairs import numbers
from cwpo_dist.pairs.alone import AloneCounts, Answer, Comparing, decided
from cwpo_dist.pairs.records import prompt_of
from cwpo_dist.pairs.rejects import Tally
from cwpo_dist.pairs.row_forms import ListCounts, RowPairs
from cwpo_dist.pairs.splits import LEAKED, SIDES, Drawn, merge, split_of
from cwpo_dist.pairs.stored import Pair, Told

SAMPLED = 64  # answers of a split; enough to say of about how many something holds


class Standing(NamedTuple):
    """Where a pair stands, all its copies together.

    Attributes:
        split: that it is in.
        labelled: whether it has a human's label.
        own: the kinds of numbers of its own that it can be weighed by.
    """

    split: Split
    labelled: bool
    own: frozenset[numbers.Own]


class CountedRows:
    """What was read: rows, without their texts; and, when all are there, pairs by split."""

    def __init__(self) -> None:
        self.copies: dict[str, list[tuple[Told, Drawn]]] = {}  # by pair id
        self._given_as: dict[str, str] = {}  # of pairs that were made and given: their other name
        self._learn_ties = False
        self.pairs: Counter[str] = Counter()
        self.labelled: Counter[str] = Counter()
        # Ids by split. Those of answers are the texts that `copies` holds, and take a reference.
        self.prompts: defaultdict[str, set[str]] = defaultdict(set)
        self.answers: defaultdict[str, set[str]] = defaultdict(set)
        self.own: dict[numbers.Own, Counter[str]] = {own: Counter() for own in numbers.COLUMNS}
        self.void: Counter[str] = Counter()
        self.most_weight = 0.0
        self.ties = self.merged = self.unlike = 0
        self.lists, self.of_lists = ListCounts(), Tally()
        self.alone = AloneCounts()
        self.answers_alone: defaultdict[str, set[str]] = defaultdict(set)
        self.prompts_alone: defaultdict[str, set[str]] = defaultdict(set)

    def note(self, made: RowPairs) -> None:
        """Counts a row's list."""
        self.lists += made.counts or ListCounts()
        for reason, found, _ in made.set_aside:
            self.of_lists.add(reason, found)

    def add(self, pair: Pair, place: Drawn, own: numbers.Numbers) -> bool:
        """Whether it is the first of its pair."""
        self.void.update(own.void)
        self.most_weight = max(self.most_weight, own.weight or 0.0)
        copies = self.copies.setdefault(pair.pair_id, [])
        copies.append((pair.told, place))
        return len(copies) == 1

    def gather(self, tally: Tally, how: Comparing | None, *, learn_ties: bool) -> None:
        """Sets aside prompts of two sides, merges copies and splits, as `buckets` does."""
        self._learn_ties = learn_ties
        self._set_leaks_aside(tally)
        alone = [] if how is None else list(self._taken_alone())
        if how is not None:
            self._make_pairs(alone, how)
        for pair_id, copies in self.copies.items():
            merged, unlike = _merged(copies)
            self.unlike += unlike
            self._count(pair_id, merged, _merged_place(copies))
            self.merged += len(copies) - 1
        paired = set(chain.from_iterable(self.answers.values()))
        for answer in alone:
            place = answer.row[1]
            if place.answer_a not in paired:
                split = split_of(SIDES[place.side], place.in_labelled_part, None)
                self.alone.in_no_pair += 1
                self.answers_alone[split].add(place.answer_a)
                self.prompts_alone[split].add(prompt_of(place.answer_a))

    def sampled_ids(self) -> dict[str, list[str]]:
        """Of answers of each split's pairs; where it has none, of those that stand in none.

        The least: they are drawn evenly, as ids are hashes.
        """
        every = {**self.answers_alone, **self.answers}
        return {split: heapq.nsmallest(SAMPLED, ids) for split, ids in every.items()}

    def standing(self, name: str) -> Standing | None:
        """Where a pair stands that was gathered; None: it was set aside, or is no pair."""
        copies = self.copies.get(self._given_as.get(name, name))
        if copies is None:
            return None
        told, _ = _merged(copies)
        split = self._split(told, _merged_place(copies))
        return Standing(split, told.label is not None, frozenset(numbers.usable(told)))

    def _split(self, told: Told, place: Drawn) -> Split:
        learned = self._learn_ties and bool(told.tie)
        return split_of(SIDES[place.side], place.in_labelled_part, told.label, learned_tie=learned)

    def _set_leaks_aside(self, tally: Tally) -> None:
        sides: dict[str, int] = {}
        for _, place in chain.from_iterable(self.copies.values()):
            sides[place.prompt_hash] = max(place.side, sides.get(place.prompt_hash, 0))
        for pair_id, copies in [*self.copies.items()]:
            side = sides[copies[0][1].prompt_hash]  # a pair has one prompt
            staying = [(told, place) for told, place in copies if place.side == side]
            for _ in range(len(copies) - len(staying)):
                tally.add(LEAKED[SIDES[side]])
            self.copies[pair_id] = staying
            if not staying:
                del self.copies[pair_id]

    def _taken_alone(self) -> Iterator[Answer[tuple[Told, Drawn]]]:
        """Takes out the responses in rows of their own, each once, sorted by their ids."""
        named = [name for name, copies in self.copies.items() if copies[0][1].alone]
        for name in sorted(named):
            copies = self.copies.pop(name)
            told, differ = _merged(copies)
            place = _merged_place(copies)
            self.alone.rows += len(copies)
            self.alone.answers += 1
            self.alone.rated_twice += differ
            yield Answer(place.answer_a, None, told.score_a, (told, place))

    def _make_pairs(self, alone: Iterable[Answer[tuple[Told, Drawn]]], how: Comparing) -> None:
        """Adds the pairs that are made of them, each to its copies where it was given as well."""
        given = {
            frozenset((place.answer_a, place.answer_b)): (pair_id, place.answer_a)
            for pair_id, copies in self.copies.items()
            for _, place in copies[:1]
        }
        for _, group in itertools.groupby(alone, lambda each: prompt_of(each.answer_id)):
            of_prompt = list(group)
            labelled = of_prompt[0].row[1].in_labelled_part
            for better, worse in decided(of_prompt, how.pairing, self.alone):
                a, b = better.answer_id, worse.answer_id
                pair_id, first = given.get(frozenset((a, b)), (a + b, a))
                if pair_id != a + b:
                    self._given_as[a + b] = pair_id
                rated = better.good is not None and worse.good is not None
                scores = (better.good, worse.good) if rated and how.scored else (None, None)
                told = better.row[0]._replace(
                    label=("a" if first == a else "b") if rated else None,
                    score_a=scores[first != a],
                    score_b=scores[first == a],
                )
                place = better.row[1]._replace(answer_a=a, answer_b=b, in_labelled_part=labelled)
                self.copies.setdefault(pair_id, []).append((told, place))

    def _count(self, pair_id: str, told: Told, place: Drawn) -> None:
        split = self._split(told, place)
        self.pairs[split] += 1
        self.labelled[split] += told.label is not None
        self.prompts[split].add(prompt_of(pair_id))
        self.answers[split].update((place.answer_a, place.answer_b))
        self.ties += bool(told.tie)
        for kind in numbers.usable(told):
            self.own[kind][split] += 1


def _merged_place(copies: Sequence[tuple[Told, Drawn]]) -> Drawn:
    """Where copies stand together: in the labelled part, if one of them does."""
    labelled = any(place.in_labelled_part for _, place in copies)
    return copies[0][1]._replace(in_labelled_part=labelled)


def _merged(copies: Sequence[tuple[Told, Drawn]]) -> tuple[Told, bool]:
    """What copies of a pair say together, and whether their numbers differ."""
    told = [told for told, _ in copies]
    agreed, unlike = numbers.agreed(told)
    return merge([agreed, *told[1:]])[0], unlike


def sizes(by_split: Mapping[str, set[str]]) -> dict[str, int]:
    """How many there are of each split."""
    return {split: len(ids) for split, ids in by_split.items()}
