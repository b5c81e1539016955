"""Answers or pairs and an encoder in; rows that fit its model, or why there are none, out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.encoder import Asked, Encoder
from cwpo_dist.lm.rows import CutRow, Row
from cwpo_dist.lm.sharing import in_one_row
from cwpo_dist.lm.templates import Fault, TokenError

_AT_ONCE = 1024  # prompts whose answers' rendered texts are held together


def encode_answers(
    encoder: Encoder, model: ModelConfig, asked: Sequence[Asked]
) -> list[list[Row | TokenError]]:
    """The rows of answers that a model can read, each a function of its prompt and itself alone.

    Args:
        encoder: the model's.
        model: whose `max_length` and `over_length` apply.
        asked: prompts, with any number of answers each.

    Returns:
        Of each prompt a row for each of its answers, with that one alone, or why there is none:
        also one that is too long has its fault.
    """
    found: list[list[Row | TokenError]] = []
    for start in range(0, len(asked), _AT_ONCE):
        part = asked[start : start + _AT_ONCE]
        for each, rows in zip(part, encoder.encode_all(part), strict=True):
            found.append([_fitting(row, each, encoder, model) for row in rows])
    return found


def encode_pairs(
    encoder: Encoder, model: ModelConfig, pairs: Sequence[Asked]
) -> list[Row | TokenError]:
    """The rows of pairs that a model can read and that tell it something.

    Args:
        encoder: the model's.
        model: whose `max_length` and `over_length` apply.
        pairs: prompt, both answers and tools of each.

    Returns:
        A row for each pair, or why there is none: also a pair that is too long has its fault.
    """
    return [_pair(answers, model) for answers in encode_answers(encoder, model, pairs)]


def _pair(answers: Sequence[Row | TokenError], model: ModelConfig) -> Row | TokenError:
    """The row of a pair's answers, or what is wrong with one of them, or with both together."""
    rows = []
    for answer in answers:
        if isinstance(answer, TokenError):
            return answer
        rows.append(answer)
    if not are_alike(rows):
        row = in_one_row(rows)
        return row if row.prompt else _nothing_shared()
    return too_long(model) if isinstance(rows[0], CutRow) else alike()


def _nothing_shared() -> TokenError:
    """The fault of answers without a prompt: a row needs a token before them."""
    return TokenError(
        "prompt: its answers begin with no token that they share; give a prompt, or a chat "
        "template that writes one",
        Fault.NO_TOKENS,
    )


def are_alike(rows: Sequence[Row]) -> bool:
    """Whether a model cannot tell answers apart: they are several, and the same tokens."""
    first = rows[0]
    same = (row.prompt == first.prompt and row.answers == first.answers for row in rows[1:])
    return len(rows) > 1 and all(same)


def alike() -> TokenError:
    """The fault of a pair whose answers are the same tokens."""
    return TokenError(
        "what they differ by is not among their tokens (a chat template that trims, or cuts "
        "reasoning); give a template that writes it (chat_template)",
        Fault.IDENTICAL,
    )


def too_long(model: ModelConfig) -> TokenError:
    """The fault of what does not fit."""
    return TokenError(f"longer than max_length {model.max_length}", Fault.OVER_LENGTH)


def _fitting(
    row: Row | TokenError, asked: Asked, encoder: Encoder, model: ModelConfig
) -> Row | TokenError:
    if isinstance(row, TokenError) or row.n_tokens <= model.max_length:
        return row
    if model.over_length == "truncate":
        row = encoder.parted(row, asked)
    fitting = fit_length(row, model.max_length, model.over_length, closing=encoder.closing)
    return too_long(model) if fitting is None else fitting


def fit_length(
    row: Row, max_length: int, over_length: Literal["drop", "truncate"], *, closing: int = 1
) -> Row | None:
    """The row when its prompt and answer fit `max_length`; else dropped or truncated.

    Truncation takes the prompt's oldest tokens first, down to a quarter of `max_length`, as an
    answer without its question teaches nothing; then it takes the answer's last tokens, and what
    closes it stays. So does the first token of all: BOS, or what else all answers of a prompt begin
    with, however much of it is cut off.

    Args:
        row: of one answer.
        max_length: tokens of prompt and answer.
        over_length: 'drop' or 'truncate'.
        closing: the encoder's, how many tokens stay at the end of a cut answer.

    Returns:
        A row of at most `max_length` tokens, or None: to be counted as over length.

    Raises:
        TokenError: for a `max_length` that leaves no room to truncate to.
    """
    if row.n_tokens <= max_length:
        return row
    if over_length == "drop":
        return None
    shortest = shortest_cut(closing)
    if max_length < shortest:
        raise TokenError(
            f"max_length: {max_length} leaves no room for prompt and answer; use at least "
            f"{shortest}"
        )
    (answer,) = row.answers
    room = min(max(max_length - len(answer), max_length // 4, 2), max_length - closing - 1)
    prompt = _cut_left(row.prompt, room)
    return CutRow(prompt, (_cut_right(answer, max_length - len(prompt), closing),))


def shortest_cut(closing: int) -> int:
    """The fewest tokens to cut to: the first, one of the prompt, one of the answer, its end."""
    return 3 + closing


def _cut_left(prompt: list[int], room: int) -> list[int]:
    if len(prompt) <= room:
        return prompt
    return [prompt[0], *prompt[len(prompt) - room + 1 :]]


def _cut_right(answer: list[int], room: int, closing: int) -> list[int]:
    if len(answer) <= room:
        return answer
    return [*answer[: room - closing], *answer[len(answer) - closing :]]
