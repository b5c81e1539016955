"""Rows of token ids in, one batch of tensors out: packed, with shared prompts, or plain.

A row is a prompt, once, and then its answers, however many. Positions of each answer continue from
the prompt, and an answer sees the prompt and itself, so that a stock model given this batch's mask
and positions computes exactly what it computes on a plain row an answer. Packed rows lie end to end
in one sequence without pads; shared rows are a sequence each under a dense mask; plain ones a
sequence an answer.

Shapes: B sequences, L padded length, R rows, K most answers of one, A answers, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cwpo_dist.lm.feeding import moved, pinned
from cwpo_dist.lm.sequence import ALONE, SequenceGroup

Layout = Literal["packed", "shared", "plain"]

PROMPT = 0  # segment of prompt tokens; answer k has segment k + 1
PAD = -1


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt and its answers (of a pair: chosen first, where that is known).

    Attributes:
        prompt: what all answers share; never empty, as its last token predicts each answer's first.
        answers: the answers' own tokens, each up to the last that is read (a policy's EOS).
        skipped: how many first tokens of each answer are of its prompt, but not of the others':
            they are seen, and count for no log-prob; () where there are none.
    """

    prompt: list[int]
    answers: tuple[list[int], ...]
    skipped: tuple[int, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Tokens of a row that is not plain: the prompt once and all answers."""
        return len(self.prompt) + sum(len(answer) for answer in self.answers)

    @property
    def n_longest(self) -> int:
        """Tokens of the prompt and the longest answer: what `max_length` bounds."""
        return len(self.prompt) + max(len(answer) for answer in self.answers)

    @property
    def n_scored(self) -> tuple[int, ...]:
        """Tokens of each answer that count for its log-prob: its last ones."""
        skipped = self.skipped or (0,) * len(self.answers)
        return tuple(len(answer) - n for answer, n in zip(self.answers, skipped, strict=True))

    def part(self, answers: slice) -> Row:
        """The row of these of its answers."""
        return Row(self.prompt, self.answers[answers], self.skipped[answers])

    def picked(self, places: Sequence[int]) -> Row:
        """The row of its answers at these places, in their order."""
        skipped = tuple(self.skipped[k] for k in places) if self.skipped else ()
        return Row(self.prompt, tuple(self.answers[k] for k in places), skipped)


@dataclass(frozen=True)
class CutRow(Row):
    """A row of one answer that lost tokens to `max_length`."""


@dataclass(frozen=True)
class RowBatch:
    """A batch ready for a model.

    Attributes:
        input_ids: [B, L] token ids.
        position_ids: [B, L] positions; each answer's continue from its prompt.
        attention_mask: for layout 'packed' int64 [1, 1, R, 1 + K], always on the host: tokens of
            each row's prompt and answers, and 0 where it has fewer; for 'shared' bool [B, 1, L, L],
            True where a query (dim 2) sees a key (dim 3); for 'plain' int64 [B, L], 1 on tokens and
            0 on pads.
        token_type_ids: [B, L], 1 on answers, for classifiers of pairs of texts; None unless plain.
        source: [N] flat index (sequence × L + position) of the hidden state that predicts a token.
        target: [N] the predicted answer tokens.
        answer: [N] which of the batch's A answers each token belongs to.
        last: [A] flat index of each answer's last token.
        layout: how rows were laid out.
        lengths: tokens of each sequence that are no pads, known to the host.
        padded_tokens: B × L.
        group: the ranks that share it, of which each has a part (sequence.py); `attention_mask`,
            `last` and A are of the whole.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    source: Tensor
    target: Tensor
    answer: Tensor
    last: Tensor
    layout: Layout
    lengths: tuple[int, ...]
    padded_tokens: int
    group: SequenceGroup = ALONE

    @property
    def useful_tokens(self) -> int:
        """Tokens that are no pads."""
        return sum(self.lengths)

    def to(self, device: torch.device | str) -> Self:
        """The batch with its tensors on `device`; packed rows' lengths stay on the host."""
        stays = "attention_mask" if self.layout == "packed" else ""
        return self._each(lambda name, tensor: tensor if name == stays else moved(tensor, device))

    def pinned(self, device: torch.device | str) -> Self:
        """The batch in memory from which `device` copies by itself (feeding.py)."""
        return self._each(lambda _, tensor: pinned(tensor, device))

    def _each(self, made: Callable[[str, Tensor], Tensor]) -> Self:
        of: dict[str, Any] = {n: made(n, t) for n, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **of)


def planned_length(row: Row, layout: Layout) -> int:
    """The length by which a micro-batch planner counts a row.

    The sum of planned lengths is the size of a packed batch. Rows × the longest planned length is
    the padded size of any other: in the plain layout a row of K answers is K sequences, so that
    rows of unequal K are to be planned by their sequences too.
    """
    return len(row.answers) * row.n_longest if layout == "plain" else row.n_tokens


def cut(row: Row, budget: int, layout: Layout) -> list[Row]:
    """The row, or rows of its answers in their order, each with the whole prompt.

    Args:
        row: with any number of answers.
        budget: the planned length that no row exceeds which has more than one answer.
        layout: by which lengths are planned.
    """
    prompt, starts, total, longest = len(row.prompt), [0], 0, 0
    for k, answer in enumerate(row.answers):
        count, total, longest = k + 1 - starts[-1], total + len(answer), max(longest, len(answer))
        # `planned_length` of this part, kept up along the way: anew each time would be quadratic.
        planned = count * (prompt + longest) if layout == "plain" else prompt + total
        if planned > budget and count > 1:
            starts.append(k)
            total = longest = len(answer)
    return [row.part(slice(*ends)) for ends in pairwise([*starts, len(row.answers)])]


def collate(rows: Sequence[Row], layout: Layout, pad_id: int) -> RowBatch:
    """Lays rows out as one batch, right-padded unless it is packed.

    Args:
        rows: at least one, of any numbers of answers.
        layout: 'packed', one sequence in all; 'shared', one a row; or 'plain', one an answer.
        pad_id: fills the tail of shorter sequences; no token sees it.

    Raises:
        ValueError: for no rows or answers, an empty prompt, or an answer of which nothing counts.
    """
    _check(rows)
    laid = _laid_out(rows, layout)
    ids_BL = laid.spread(np.concatenate(laid.pieces), pad_id)
    segment_BL = laid.spread(np.repeat(laid.segment, laid.length), PAD)
    return RowBatch(
        input_ids=ids_BL,
        position_ids=laid.spread(counted(laid.position, laid.length), 0),
        attention_mask=_attention_mask(rows, layout, segment_BL),
        token_type_ids=segment_BL.clamp(min=PROMPT) if layout == "plain" else None,
        **_read_tokens(rows, laid, ids_BL.flatten()),
        layout=layout,
        lengths=tuple(laid.tokens.tolist()),
        padded_tokens=ids_BL.numel(),
        group=ALONE,
    )


Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class _LaidOut:
    """Pieces of rows, which are prompts and answers, and where each lies; arrays of one a piece.

    Attributes:
        pieces: their token ids.
        length: tokens of each.
        start: place of its first token in all sequences, end to end with their pads.
        position: of its first token, as the model counts.
        segment: of each.
        first: [A] place of each answer's first token.
        before: [A] that of the token that predicts it.
        tokens: [B] of each sequence.
        longest: L.
    """

    pieces: list[Numbers]
    length: Numbers
    start: Numbers
    position: Numbers
    segment: Numbers
    first: Numbers
    before: Numbers
    tokens: Numbers
    longest: int

    @cached_property
    def places(self) -> Numbers:
        """[N] of all tokens, in the order of the pieces."""
        return counted(self.start, self.length)

    def spread(self, values_N: Numbers, fill: int) -> Tensor:
        """[B, L] one number a token; `fill` on pads."""
        if len(self.tokens) == 1:  # it has no pads, and all is in order
            return torch.from_numpy(values_N)[None]
        spread = np.full(len(self.tokens) * self.longest, fill)
        spread[self.places] = values_N
        return torch.from_numpy(spread).view(len(self.tokens), self.longest)


def _laid_out(rows: Sequence[Row], layout: Layout) -> _LaidOut:
    """Where all goes: what loops over tokens is NumPy, this loop is of pieces."""
    pieces: list[Numbers] = []
    told: list[tuple[int, int, int, int]] = []  # sequence, place in it, position, segment
    read: list[tuple[int, int, int]] = []  # sequence, places of an answer's first and before it
    sequence, end, longest = 0, 0, 0

    def put(piece: Numbers, position: int, segment: int) -> None:
        nonlocal end, longest
        pieces.append(piece)
        told.append((sequence, end, position, segment))
        end += len(piece)
        longest = max(longest, end)

    for row, numbers in _sequences(rows, layout):
        if layout != "packed" and pieces:
            sequence, end = sequence + 1, 0
        put(np.asarray(row.prompt, np.int64), 0, PROMPT)
        prompt_end, n = end, len(row.prompt)
        for k in numbers:
            answer = np.asarray(row.answers[k], np.int64)
            read.append((sequence, end, prompt_end - 1))
            # A plain model's token types say of an answer only what counts.
            skipped = row.skipped[k] if row.skipped and layout == "plain" else 0
            put(answer[:skipped], n, PROMPT)
            put(answer[skipped:], n + skipped, 1 if layout == "plain" else k + 1)
    of, at, position, segment = np.array(told).T
    answers, first, before = np.array(read).T
    return _LaidOut(
        pieces,
        np.array([len(piece) for piece in pieces]),
        of * longest + at,
        position,
        segment,
        answers * longest + first,
        answers * longest + before,
        np.bincount(of, list(map(len, pieces))).astype(np.int64),
        longest,
    )


def _sequences(rows: Sequence[Row], layout: Layout) -> Iterator[tuple[Row, Sequence[int]]]:
    """Each row with the numbers of those of its answers that follow one prompt."""
    for row in rows:
        numbers = range(len(row.answers))
        yield from ((row, [k]) for k in numbers) if layout == "plain" else [(row, numbers)]


def counted(starts: Numbers, lengths: Numbers) -> Numbers:
    """Whole numbers: of each start so many, one after the other; end to end."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def _read_tokens(rows: Sequence[Row], laid: _LaidOut, ids: Tensor) -> dict[str, Tensor]:
    """Which states are read, what they should predict, and whose they are (see `RowBatch`)."""
    lengths = np.array([len(answer) for row in rows for answer in row.answers])
    scored = np.array([n for row in rows for n in row.n_scored])
    last = laid.first + lengths - 1
    target = counted(last + 1 - scored, scored)
    source = target - 1
    whole = scored == lengths  # the end of the prompt predicts their first tokens
    source[(np.cumsum(scored) - scored)[whole]] = laid.before[whole]
    return {
        "source": torch.from_numpy(source),
        "target": torch.from_numpy(ids.numpy()[target]),
        "answer": torch.from_numpy(np.repeat(np.arange(len(scored)), scored)),
        "last": torch.from_numpy(last),
    }


def mask_allows(query: Tensor, key: Tensor, query_segment: Tensor, key_segment: Tensor) -> Tensor:
    """Whether a query may see a key: the prompt and its own answer, up to itself.

    Args:
        query: index of the query in its sequence.
        key: index of the key.
        query_segment: 0 in the prompt, k + 1 in answer k, −1 on pads.
        key_segment: the same for the key.

    Returns:
        bool, broadcast over the arguments. A pad sees itself alone (an empty softmax is NaN).
    """
    own = (key_segment == PROMPT) | (key_segment == query_segment)
    return (query == key) | ((key <= query) & (query_segment >= PROMPT) & own)


def shared_mask(segment_BL: Tensor) -> Tensor:
    """Segments [B, L] → bool mask [B, 1, L, L], True where the query (dim 2) sees the key."""
    index_L = torch.arange(segment_BL.shape[1], device=segment_BL.device)
    allowed_BLL = mask_allows(
        index_L[None, :, None], index_L[None, None, :], segment_BL[:, :, None], segment_BL[:, None]
    )
    return allowed_BLL[:, None]


def _check(rows: Sequence[Row]) -> None:
    if not rows:
        raise ValueError("rows: none given; a micro-batch needs at least one row")
    for number, row in enumerate(rows):
        if not row.prompt or not row.answers or not all(row.answers):
            raise ValueError(
                f"rows[{number}]: no answer, or an empty prompt or answer; set such rows aside"
            )
        if len(row.skipped) not in (0, len(row.answers)) or min(row.n_scored) < 1:
            raise ValueError(
                f"rows[{number}]: skipped {row.skipped}; give a number for each answer, below that "
                "of its tokens"
            )


def _attention_mask(rows: Sequence[Row], layout: Layout, segment_BL: Tensor) -> Tensor:
    if layout == "packed":
        lengths = [[len(row.prompt), *map(len, row.answers)] for row in rows]
        most = max(map(len, lengths))
        return torch.tensor([each + [0] * (most - len(each)) for each in lengths])[None, None]
    return shared_mask(segment_BL) if layout == "shared" else (segment_BL != PAD).long()
