"""What workers read: the answers of a shard with their prompts, and their tokens."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from typing import Any

import pyarrow as pa

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.encoder import Asked, Encoder
from cwpo_dist.lm.feeding import ahead
from cwpo_dist.lm.fitting import alike, encode_answers
from cwpo_dist.lm.rows import CutRow, Row
from cwpo_dist.lm.sharing import was_cut
from cwpo_dist.lm.templates import Fault, TokenError
from cwpo_dist.pairs.answers import Answer, read_answers, read_compared
from cwpo_dist.pairs.records import TOKEN_SCHEMA, prompt_of, read_records
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.scoring.retries import Input
from cwpo_dist.scoring.set_aside import SetAside
from cwpo_dist.storage import Store

SLICE = 512  # answers that are tokenised together, while those before are scored
Answers = Sequence[Input[Answer]]


@dataclass(frozen=True)
class AnswersIn:
    """Which answers of which shards a worker reads.

    Attributes:
        store: the output folder of `prepare` (or any with shards by `write_shard`).
        splits: those alone that stand in a pair of these splits; None: all.
        selected: given a shard, the ids of those of its answers that are read; None: all.
        alone: whether also those that stand in no pair, of these splits.
    """

    store: Store
    splits: tuple[str, ...] | None = None
    selected: Callable[[int], Container[str]] | None = None
    alone: bool = False

    def read(self, index: int) -> list[Input[Answer]]:
        """The answers of one shard, in the order of its file."""
        asked: Container[str] | None = None
        if self.splits is not None:
            pairs = read_compared(self.store, index, self.splits)
            asked = {name for pair in pairs for name in (pair.answer_a, pair.answer_b)}
        names = None if self.selected is None else self.selected(index)
        return [
            Input(answer.answer_id, position, answer)
            for position, answer in enumerate(read_answers(self.store, index))
            if (names is None or answer.answer_id in names) and self._reads(answer, asked)
        ]

    def _reads(self, answer: Answer, asked: Container[str] | None) -> bool:
        """Whether it stands in a pair of the splits, `asked`; or in none, if that is asked for."""
        if answer.alone is None:
            return asked is None or answer.answer_id in asked
        return self.alone and (self.splits is None or answer.alone in self.splits)

    def set_alike_aside(
        self, index: int, hashes: Mapping[str, int | None], rejects: SetAside
    ) -> None:
        """Tells of the pairs of one shard whose answers are the same to a model.

        Args:
            index: of the shard.
            hashes: of the tokens of each answer that was read.
            rejects: where they go.
        """
        if len(set(hashes.values())) == len(hashes):  # as most shards are: no file is read for them
            return
        error = alike()
        for position, pair in enumerate(read_compared(self.store, index)):
            a, b = hashes.get(pair.answer_a), hashes.get(pair.answer_b)
            if a is not None and a == b and (self.splits is None or pair.split in self.splits):
                # What they differed by was cut off, or no template wrote it.
                reason = Fault.OVER_LENGTH if was_cut(a) else f"{error.fault}: {error}"
                rejects.add_alike(reason, Input(pair.pair_id, position, pair))


def encoded(
    encoder: Encoder, model: ModelConfig, rows: Answers, rejects: SetAside
) -> Iterator[list[tuple[Input[Answer], Row]]]:
    """Slices of answers with their tokens; what has none or is too long is set aside.

    A thread tokenises ahead, so that a device never waits for text.
    """
    for found in ahead(_tokens(encoder, model, slice_) for slice_ in _slices(rows)):
        read = []
        for answer, tokens in found:
            if isinstance(tokens, Row):
                read.append((answer, tokens))
            else:
                rejects.add(_reason(tokens), answer)
        yield read


def _slices(rows: Answers) -> Iterator[list[list[Input[Answer]]]]:
    """Prompts with their answers, all of them together, in slices of some."""
    slice_: list[list[Input[Answer]]] = []
    for _, group in groupby(rows, lambda row: prompt_of(row.name)):
        slice_.append(list(group))
        if sum(map(len, slice_)) >= SLICE:
            yield slice_
            slice_ = []
    if slice_:
        yield slice_


def _tokens(
    encoder: Encoder, model: ModelConfig, prompts: Iterable[Answers]
) -> list[tuple[Input[Answer], Row | TokenError]]:
    asked = [
        Asked(rows[0].given.prompt, [row.given.answer for row in rows], rows[0].given.tools)
        for rows in prompts
    ]
    found = chain.from_iterable(encode_answers(encoder, model, asked))
    return list(zip(chain.from_iterable(prompts), found, strict=True))


def _reason(error: TokenError) -> str:
    if error.fault is Fault.OVER_LENGTH:
        return str(error.fault)
    return f"{error.fault}: {error}"


def read_tokens(tokens: Store, index: int) -> dict[str, Row]:
    """The rows of one shard's answers by their ids, a row of one answer each.

    Their tokens are views of int32 that read like lists, without a Python number a token.
    """
    table = read_records(tokens, part("tokens", index), TOKEN_SCHEMA)
    prompts, answers = _views(table["prompt"]), _views(table["answer"])
    names, cut = table["answer_id"].to_pylist(), table["cut"].to_pylist()
    rows = zip(names, prompts, answers, cut, strict=True)
    return {
        name: (CutRow if shortened else Row)(prompt, (answer,))
        for name, prompt, answer, shortened in rows
    }


def _views(column: pa.ChunkedArray) -> list[Any]:
    lists = pa.concat_arrays(column.chunks)
    ids, ends = memoryview(lists.values.to_numpy()), lists.offsets.to_pylist()
    return [ids[start:end] for start, end in pairwise(ends)]
