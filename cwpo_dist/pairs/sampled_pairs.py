"""Pairs that are read one after the other in; some of them, drawn evenly, out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from cwpo_dist.pairs.alone import AloneCounts, Answer, Comparing, decided, kept_by_both
from cwpo_dist.pairs.pairing import pair_with
from cwpo_dist.pairs.parsing import ParsedPair
from cwpo_dist.pairs.records import prompt_of
from cwpo_dist.pairs.splits import Drawn


class Sampled(NamedTuple):
    """One of them: its id as it was read, or made, and itself."""

    name: str
    pair: ParsedPair


class Sample:
    """Pairs drawn evenly from what was read, and those that responses in rows of their own make."""

    def __init__(self, most: int, seed: int) -> None:
        self._most, self._random = most, random.Random(seed)
        self._pairs = list[Sampled]()
        self._of_prompts = _OfPrompts(most)

    def add(self, given: Sampled, place: Drawn, seen: int) -> None:
        """Reservoir sampling: after any number of pairs, each was drawn with the same chance."""
        if place.alone:
            self._of_prompts.add(place.answer_a, given.pair)
        elif len(self._pairs) < self._most:
            self._pairs.append(given)
        elif (at := self._random.randrange(seen)) < self._most:
            self._pairs[at] = given

    def pairs(self, how: Comparing | None) -> tuple[Sampled, ...]:
        """All of them, at most twice as many as were asked for."""
        return (*self._pairs, *self._of_prompts.pairs(how))[: 2 * self._most]


class _OfPrompts:
    """Responses in rows of their own, with their texts, to a few prompts: those of the least ids.

    Ids are hashes, so that these prompts are drawn evenly, and all of their responses are there.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: dict[str, dict[str, ParsedPair]] = {}

    def add(self, answer: str, alone: ParsedPair) -> None:
        """Adds one, by its id, if its prompt is among the least."""
        prompt = prompt_of(answer)
        if prompt not in self._found and len(self._found) == self._most:
            greatest = max(self._found)
            if prompt > greatest:
                return
            del self._found[greatest]
        self._found.setdefault(prompt, {})[answer] = alone

    def pairs(self, how: Comparing | None) -> Iterator[Sampled]:
        """The pairs that are made of them; of what makes none each response with itself."""
        if how is None:
            return
        for prompt in sorted(self._found):
            rows = sorted(self._found[prompt].items())
            answers = [Answer(i, row.first, row.numbers.score_first, row) for i, row in rows]
            made = decided(answers, how.pairing, AloneCounts())
            for better, worse in made:
                pair = pair_with(better.row, better, worse, scored=how.scored)
                kept = kept_by_both(better.row.kept, worse.row.kept)
                yield Sampled(better.answer_id + worse.answer_id, replace(pair, kept=kept))
            if not made:
                yield from (Sampled(name, row) for name, row in rows)
