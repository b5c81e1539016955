"""Texts in pieces at their added tokens: the ids are those of the whole text, whatever the kind."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer, word_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cwpo_dist.lm import ids
from cwpo_dist.lm.ids import ids_of

ADDED = [
    AddedToken("<|a|>", normalized=False, special=True),
    AddedToken("<|a|>b", normalized=False, special=False),  # begins as another does
    AddedToken("<|l|>", normalized=False, lstrip=True, special=True),
    AddedToken("<|r|>", normalized=False, rstrip=True, special=True),
    AddedToken("late", normalized=True, special=False),
]
OF_ITS_OWN = AddedToken("word", normalized=False, single_word=True, special=True)
WORDS = [*(str(token.content) for token in ADDED), " ", "\n", "a", "b", "Ab", "</s>", "<", "▁"]
KINDS = ("bytes", "prefixed", "first", "prepended", "words", "letters")


@cache
def tokenizer(kind: str, *, words: bool = False) -> PreTrainedTokenizerFast:
    """Of a kind that treats the beginning of a text in its own way."""
    if kind == "words":
        made = word_tokenizer()
    elif kind == "bytes":
        made = tiny_tokenizer()
    else:
        letters = [chr(code) for code in range(10, 127)]
        pieces = ["<unk>", "</s>", "▁", "▁a", "▁Ab", "Ab", *letters]
        merges = [("▁", "a"), ("A", "b"), ("▁", "Ab")]
        inner = Tokenizer(
            models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>")
        )
        if kind == "prefixed":
            inner = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
            inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        elif kind == "first":
            inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        elif kind == "prepended":
            inner.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
            inner.decoder = decoders.Metaspace()
        else:
            inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
        made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    made.add_tokens([*ADDED, *([OF_ITS_OWN, AddedToken("b", normalized=False)] if words else [])])
    return made


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=12).map("".join), max_size=5))
@settings(max_examples=150, deadline=None)
def test_ids_are_those_of_the_whole_text(kind: str, texts: list[str]) -> None:
    reads = tokenizer(kind)
    assert ids_of(reads, texts) == [
        reads(text, add_special_tokens=False)["input_ids"] for text in texts
    ]


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.lists(st.sampled_from([*WORDS, "word"]), max_size=8).map("".join), max_size=5))
@example(["wordb", "word b"])
@settings(max_examples=50, deadline=None)
def test_a_token_that_must_be_a_word_of_its_own_is_not_made_one(
    kind: str, texts: list[str]
) -> None:
    reads = tokenizer(kind, words=True)
    assert ids_of(reads, texts) == [
        reads(text, add_special_tokens=False)["input_ids"] for text in texts
    ]


def test_what_texts_share_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    reads = tokenizer("bytes")

    class Noting:
        def __getattr__(self, name: str) -> Any:
            return getattr(reads, name)

        def __call__(self, texts: list[str], **told: Any) -> Any:
            read.extend(texts)
            return reads(texts, **told)

    noting: Any = Noting()
    ids.ids_of(noting, ["long<|a|>", "long<|a|> one</s>", "long<|a|> two</s>"])
    assert read == ["long", "<|a|>", "<|a|> one", "</s>", "<|a|> two"]
