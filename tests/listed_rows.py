"""Batches of rows as one writes them down, token by token in lists: what `collate` is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cwpo_dist.lm.rows import PAD, PROMPT, Layout, Row, RowBatch, shared_mask


@dataclass(frozen=True)
class _Sequence:
    """One sequence of a batch: tokens, and the segment and position of each."""

    tokens: list[int]
    segments: list[int]
    positions: list[int]


def listed_batch(rows: Sequence[Row], layout: Layout, pad_id: int) -> RowBatch:
    """The same as `collate`."""
    sequences = _LAYOUTS[layout](rows)
    length = max(len(sequence.tokens) for sequence in sequences)
    segment_BL = _padded([sequence.segments for sequence in sequences], length, PAD)
    if layout == "packed":
        lengths = [[len(row.prompt), *map(len, row.answers)] for row in rows]
        mask = _padded(lengths, max(map(len, lengths)), 0)[None, None]
    else:
        mask = shared_mask(segment_BL) if layout == "shared" else (segment_BL != PAD).long()
    types = _padded([sequence.segments for sequence in sequences], length, 0)
    return RowBatch(
        input_ids=_padded([sequence.tokens for sequence in sequences], length, pad_id),
        position_ids=_padded([sequence.positions for sequence in sequences], length, 0),
        attention_mask=mask,
        token_type_ids=types if layout == "plain" else None,
        **_read_tokens(rows, _answer_spans(rows, layout, length)),
        layout=layout,
        lengths=tuple(len(sequence.tokens) for sequence in sequences),
        padded_tokens=len(sequences) * length,
    )


def _read_tokens(rows: Sequence[Row], spans: Sequence[tuple[int, range]]) -> dict[str, Tensor]:
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
