"""Rendered texts as token ids: nothing is added to them, and no EOS appears twice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain, pairwise

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

    What stands between a template's own tokens, a prompt say, is tokenised once for all texts.

    Raises:
        TokenError: where it fails, as regular expressions of some do on some texts.
    """
    if not texts:
        return []
    with refused_as(unread):
        parted = _parted(tokenizer, texts)
        pieces = list(dict.fromkeys(chain.from_iterable(parted)))
        encoded: list[list[int]] = tokenizer(
            pieces, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
    ids = dict(zip(pieces, encoded, strict=True))
    return [list(chain.from_iterable(ids[piece] for piece in text)) for text in parted]


def _parted(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[str]]:
    """Texts in pieces that have their own ids, whatever is before and behind them.

    The library `tokenizers` looks for added tokens first, and reads what is between them part by
    part. So a text may be cut where one begins, unless it takes in what is before it, or one that
    must be a word of its own would then look like one.
    """
    tokens = tokenizer.added_tokens_decoder.values() if tokenizer.is_fast else ()
    found = [token for token in tokens if not token.normalized]  # others are found later
    cut = {token.content for token in found if not token.lstrip}
    words = any(token.single_word for token in found)
    if not cut or words or tokenizer.split_special_tokens:
        return [[text] for text in texts]
    longest_first = sorted((token.content for token in found), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    parted = []
    for text in texts:
        starts = [match.start() for match in pattern.finditer(text) if match[0] in cut]
        places = pairwise(dict.fromkeys([0, *starts, len(text)]))
        parted.append([text[start:end] for start, end in places] or [text])
    return parted


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
