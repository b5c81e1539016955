"""Rows of token ids in, one batch of tensors out: packed, with shared prompts, or plain.

A row is a prompt, once, and then its answers, however many. Positions of each answer continue from
the prompt, and an answer sees the prompt and itself, so that a stock model given this batch's mask
and positions computes exactly what it computes on a plain row an answer. Packed rows lie end to end
in one sequence without pads; shared rows are a sequence each under a dense mask; plain ones a
sequence an answer.

Shapes: B sequences, L padded length, R rows, K answers of the row that has most, A answers of the
batch, N tokens of them that count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Self

import torch
from torch import Tensor

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
        useful_tokens: tokens that are no pads.
        padded_tokens: B × L.
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
    useful_tokens: int
    padded_tokens: int

    def to(self, device: torch.device | str) -> Self:
        """The batch with its tensors on `device`; packed rows' lengths stay on the host."""
        stay = {"attention_mask"} if self.layout == "packed" else set()
        names = [field.name for field in fields(self) if field.name not in stay]
        tensors = [name for name in names if isinstance(getattr(self, name), Tensor)]
        return replace(self, **{n: getattr(self, n).to(device, non_blocking=True) for n in tensors})


@dataclass(frozen=True)
class _Sequence:
    """One sequence of a batch: tokens, and the segment and position of each."""

    tokens: list[int]
    segments: list[int]
    positions: list[int]


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
    rows, start = [], 0
    for end in range(1, len(row.answers)):
        if planned_length(row.part(slice(start, end + 1)), layout) > budget:
            rows.append(row.part(slice(start, end)))
            start = end
    return [*rows, row.part(slice(start, None))]


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
    sequences = _LAYOUTS[layout](rows)
    length = max(len(sequence.tokens) for sequence in sequences)
    spans = _answer_spans(rows, layout, length)
    return RowBatch(
        input_ids=_padded([sequence.tokens for sequence in sequences], length, pad_id),
        position_ids=_padded([sequence.positions for sequence in sequences], length, 0),
        attention_mask=_attention_mask(rows, layout, sequences, length),
        token_type_ids=_token_types(layout, sequences, length),
        **_read_tokens(rows, spans),
        layout=layout,
        useful_tokens=sum(len(sequence.tokens) for sequence in sequences),
        padded_tokens=len(sequences) * length,
    )


def _read_tokens(rows: Sequence[Row], spans: Sequence[tuple[int, range]]) -> dict[str, Tensor]:
    """Which states are read, what they should predict, and whose they are (see `RowBatch`)."""
    answers = [answer for row in rows for answer in row.answers]
    scored = [n for row in rows for n in row.n_scored]
    sources = ([before, *span[:-1]][-n:] for (before, span), n in zip(spans, scored, strict=True))
    targets = (answer[-n:] for answer, n in zip(answers, scored, strict=True))
    return {
        "source": torch.tensor([i for source in sources for i in source]),
        "target": torch.tensor([token for target in targets for token in target]),
        "answer": torch.tensor([a for a, n in enumerate(scored) for _ in range(n)]),
        "last": torch.tensor([span[-1] for _, span in spans]),
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


def _attention_mask(
    rows: Sequence[Row], layout: Layout, sequences: Sequence[_Sequence], length: int
) -> Tensor:
    if layout == "packed":
        lengths = [[len(row.prompt), *map(len, row.answers)] for row in rows]
        return _padded(lengths, max(map(len, lengths)), 0)[None, None]
    segment_BL = _padded([sequence.segments for sequence in sequences], length, PAD)
    return shared_mask(segment_BL) if layout == "shared" else (segment_BL != PAD).long()


def _token_types(layout: Layout, sequences: Sequence[_Sequence], length: int) -> Tensor | None:
    if layout != "plain":
        return None
    return _padded([sequence.segments for sequence in sequences], length, 0)


def _packed(rows: Sequence[Row]) -> list[_Sequence]:
    shared = _shared(rows)
    return [
        _Sequence(
            tokens=[token for sequence in shared for token in sequence.tokens],
            segments=[segment for sequence in shared for segment in sequence.segments],
            positions=[position for sequence in shared for position in sequence.positions],
        )
    ]


def _shared(rows: Sequence[Row]) -> list[_Sequence]:
    return [_shared_row(row) for row in rows]


def _shared_row(row: Row) -> _Sequence:
    start = len(row.prompt)
    tokens, segments, positions = list(row.prompt), [PROMPT] * start, list(range(start))
    for k, answer in enumerate(row.answers):
        tokens += answer
        segments += [k + 1] * len(answer)
        positions += range(start, start + len(answer))
    return _Sequence(tokens, segments, positions)


def _plain(rows: Sequence[Row]) -> list[_Sequence]:
    return [
        _Sequence(
            tokens=[*row.prompt, *answer],
            segments=[PROMPT] * (len(row.prompt) + len(answer) - scored) + [1] * scored,
            positions=list(range(len(row.prompt) + len(answer))),
        )
        for row in rows
        for answer, scored in zip(row.answers, row.n_scored, strict=True)
    ]


_LAYOUTS: dict[Layout, Callable[[Sequence[Row]], list[_Sequence]]] = {
    "packed": _packed,
    "shared": _shared,
    "plain": _plain,
}


def _padded(values: list[list[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([value + [fill] * (length - len(value)) for value in values])


def _answer_spans(rows: Sequence[Row], layout: Layout, length: int) -> list[tuple[int, range]]:
    """For each answer: the flat index of the prompt's last token, and those of its own tokens."""
    spans = []
    start = 0  # flat index of the row's first token
    for row in rows:
        written = 0  # tokens of earlier answers in the same sequence
        for k, answer in enumerate(row.answers):
            base = start + len(row.prompt) + (k * length if layout == "plain" else written)
            before = base - 1 if layout == "plain" else start + len(row.prompt) - 1
            spans.append((before, range(base, base + len(answer))))
            written += len(answer)
        sequences = len(row.answers) if layout == "plain" else 1
        start += row.n_tokens if layout == "packed" else sequences * length
    return spans
