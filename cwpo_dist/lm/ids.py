"""Rendered texts as token ids: nothing is added to them, and no EOS appears twice."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from cwpo_dist.lm.foreign import refused_as
from cwpo_dist.lm.templates import Fault, TokenError


def without_eos(text: str, eos: str) -> str:
    """Drops EOS, and what a template writes after it, from the end."""
    while (stripped := text.rstrip()).endswith(eos):
        text = stripped.removesuffix(eos)
    return text


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of rendered texts, to which the tokenizer adds nothing.

    Raises:
        TokenError: where it fails, as regular expressions of some do on some texts.
    """
    if not texts:
        return []
    with refused_as(unread):
        encoded: list[list[int]] = tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
    return encoded


def unread(why: str) -> TokenError:
    """The refusal of a text on which the tokenizer fails, and what it said."""
    return TokenError(
        f"prompt or answer: the tokenizer fails on the text ({why}); give another model, or its "
        "files as their author has them",
        Fault.UNREAD,
    )


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many tokens all sequences begin with."""
    if not sequences:
        return 0
    first, length = sequences[0], len(sequences[0])
    for other in sequences[1:]:
        low, length = 0, min(length, len(other))
        while low < length:  # halved each time, as slices are compared in C
            middle = (low + length + 1) // 2
            if first[low:middle] == other[low:middle]:
                low = middle
            else:
                length = middle - 1
    return length
