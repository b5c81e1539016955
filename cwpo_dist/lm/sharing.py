"""Rows of one answer each in; rows in which the answers of a prompt share its tokens, out.

An answer's tokens are a function of its prompt and itself. Where they leave those of the prompt
alone, its own begin. Answers that stand in one row share what they all begin with; what of a prompt
is not common goes with its answer, and counts for no log-prob.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from typing import TypeVar

import numpy as np

from cwpo_dist.lm.ids import common_prefix
from cwpo_dist.lm.rows import CutRow, Row

N = TypeVar("N")
_WORTH = 16  # a row is shared where that saves this part of it


def tokens_hash(row: Row) -> int:
    """63 bits of the tokens of a row of one answer and of where it leaves its prompt, signed.

    The last bit is 1 where tokens were cut off, `was_cut`.
    """
    border = len(row.prompt).to_bytes(8)
    content = hashlib.blake2b(b"".join(_spelled(row)), digest_size=8, salt=border)
    found = int.from_bytes(content.digest(), signed=True)
    return found | 1 if isinstance(row, CutRow) else found & ~1


def was_cut(hashed: int) -> bool:
    """Whether the row of this hash lost tokens to `max_length`."""
    return bool(hashed & 1)


def in_one_row(rows: Sequence[Row]) -> Row:
    """One row of the answers of several, which have one each and begin with the same token."""
    if all(row.prompt == rows[0].prompt for row in rows):
        return Row(rows[0].prompt, tuple(row.answers[0] for row in rows))
    starts, wholes = [len(row.prompt) for row in rows], [_whole(row) for row in rows]
    shared = min(*starts, common_prefix(wholes))
    return Row(
        wholes[0][:shared],
        tuple(whole[shared:] for whole in wholes),
        tuple(start - shared for start in starts),
    )


def unshared(row: Row) -> list[Row]:
    """A row for each answer of one, which `in_one_row` would join again."""
    ends = [len(row.prompt) + skipped for skipped in row.skipped or (0,) * len(row.answers)]
    wholes = ([*row.prompt, *answer] for answer in row.answers)
    both = zip(wholes, ends, strict=True)
    return [Row(whole[:end], (whole[end:],)) for whole, end in both]


@dataclass(frozen=True)
class SharedRows:
    """Answers in rows, those of a prompt beside each other; the same tokens stand there once.

    Attributes:
        rows: with any number of answers.
        places: of each answer that was given, its place among those of all rows.
    """

    rows: list[Row]
    places: list[int]

    @classmethod
    def of(cls, answers: Sequence[tuple[Hashable, Row]]) -> SharedRows:
        """The rows of answers.

        Args:
            answers: each with its prompt, whose answers lie side by side; rows of one answer.
        """
        rows: list[Row] = []
        places: list[int] = []
        start = 0
        for _, group in groupby(answers, lambda answer: answer[0]):
            named = [(_spelled(row), row) for _, row in group]
            # In the order of their tokens, those that share most lie beside each other.
            distinct = sorted(dict(named).items(), key=lambda item: (b"".join(item[0]), item[0]))
            place = {spelled: start + at for at, (spelled, _) in enumerate(distinct)}
            places += [place[spelled] for spelled, _ in named]
            rows += _joined([row for _, row in distinct])
            start += len(distinct)
        return cls(rows, places)

    def of_each(self, values: Sequence[Sequence[N]]) -> list[N]:
        """Of each answer that was given, what its row was given for it."""
        flat = list(chain.from_iterable(values))
        return [flat[place] for place in self.places]


def _joined(rows: list[Row]) -> list[Row]:
    """Rows of one prompt in the order of their tokens, in one row, or parted where they share less.

    An answer that leaves the prompt early, as one that was cut does, would make the shared part
    short for all.
    """
    wholes = [_whole(row) for row in rows]
    both = zip(pairwise(wholes), pairwise(rows), strict=True)
    shared = [min(common_prefix(two), *(len(row.prompt) for row in of)) for two, of in both]
    lengths = [min(len(a), len(b)) for a, b in pairwise(wholes)]
    ends = [
        at + 1
        for at, (common, length) in enumerate(zip(shared, lengths, strict=True))
        if common < max(1, length // _WORTH, max(shared[max(0, at - 1) : at + 2]) // 2)
    ]
    return [in_one_row(rows[start:end]) for start, end in pairwise([0, *ends, len(rows)])]


def _whole(row: Row) -> list[int]:
    return [*row.prompt, *row.answers[0]]


def _spelled(row: Row) -> tuple[bytes, bytes]:
    """The tokens of prompt and answer."""
    prompt, answer = (np.asarray(ids, np.int32).tobytes() for ids in (row.prompt, *row.answers))
    return prompt, answer
