"""Pairs and an encoder in; rows that fit its model and tell it something, or why not, out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.encoder import Asked, Encoder
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.templates import Fault, TokenError

_AT_ONCE = 1024  # pairs whose rendered texts are held together


def encode_pairs(
    encoder: Encoder,
    model: ModelConfig,
    pairs: Sequence[Asked],
    *,
    ties: bool = False,
) -> list[Row | TokenError]:
    """The rows of pairs that a model can read and that tell it something.

    Args:
        encoder: the model's.
        model: whose `max_length` and `over_length` apply.
        pairs: prompt, answers and tools of each.
        ties: keep pairs whose answers became the same tokens.

    Returns:
        A row for each pair, or why there is none: also a pair that is too long has its fault.
    """
    found: list[Row | TokenError] = []
    for start in range(0, len(pairs), _AT_ONCE):
        found += encoder.encode_all(pairs[start : start + _AT_ONCE])
    return [
        row if isinstance(row, TokenError) else _useful(row, encoder, model, ties) for row in found
    ]


def _useful(row: Row, encoder: Encoder, model: ModelConfig, ties: bool) -> Row | TokenError:
    if not ties and len(row.answers) > 1 and all(each == row.answers[0] for each in row.answers):
        return TokenError(
            "what they differ by is not among their tokens (a chat template that trims, or cuts "
            "reasoning); give a template that writes it (chat_template)",
            Fault.IDENTICAL,
        )
    fitting = fit_length(
        row, model.max_length, model.over_length, bos_id=encoder.bos_id, closing=encoder.closing
    )
    if fitting is None:
        return TokenError(f"longer than max_length {model.max_length}", Fault.OVER_LENGTH)
    return fitting


def fit_length(
    row: Row,
    max_length: int,
    over_length: Literal["drop", "truncate"],
    *,
    bos_id: int | None = None,
    closing: int = 1,
) -> Row | None:
    """The row when prompt and longest answer fit `max_length`; else dropped or truncated.

    Truncation takes the prompt's oldest tokens first (its BOS stays), down to a quarter of
    `max_length`, as an answer without its question teaches nothing; then it takes the answers'
    last tokens, and what closes them stays. A pair whose answers differ only in what was cut off
    is dropped.

    Args:
        row: any row.
        max_length: tokens of prompt + longest answer.
        over_length: 'drop' or 'truncate'.
        bos_id: the encoder's, kept in front of a cut prompt.
        closing: the encoder's, how many tokens stay at the end of a cut answer.

    Returns:
        A row of at most `max_length` tokens an answer, or None: to be counted as over length.

    Raises:
        TokenError: for a `max_length` that leaves no room to truncate to.
    """
    if row.n_longest <= max_length:
        return row
    if over_length == "drop":
        return None
    shortest = shortest_cut(closing)
    if max_length < shortest:
        raise TokenError(
            f"max_length: {max_length} leaves no room for prompt and answer; use at least "
            f"{shortest}"
        )
    longest = max(len(answer) for answer in row.answers)
    room = min(max(max_length - longest, max_length // 4, 2), max_length - closing - 1)
    prompt = _cut_left(row.prompt, room, bos_id)
    answers = tuple(_cut_right(answer, max_length - len(prompt), closing) for answer in row.answers)
    if len(answers) > 1 and all(answer == answers[0] for answer in answers):
        return None
    return Row(prompt, answers, row.skipped)


def shortest_cut(closing: int) -> int:
    """The fewest tokens to cut to: BOS, one of the prompt, one of the answer, what closes it."""
    return 3 + closing


def _cut_left(prompt: list[int], room: int, bos_id: int | None) -> list[int]:
    if len(prompt) <= room:
        return prompt
    if prompt[0] == bos_id:
        return [prompt[0], *prompt[len(prompt) - room + 1 :]]
    return prompt[len(prompt) - room :]


def _cut_right(answer: list[int], room: int, closing: int) -> list[int]:
    if len(answer) <= room:
        return answer
    return [*answer[: room - closing], *answer[len(answer) - closing :]]
