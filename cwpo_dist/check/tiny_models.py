"""Models of known shapes with random weights, rows of random tokens, and a tokenizer for them.

What is checked needs no download: right or wrong does not depend on what weights say.
"""

from __future__ import annotations

import math
import random
from copy import deepcopy
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from cwpo_dist.lm.rows import Row
from cwpo_dist.training.tasks import Preference

VOCABULARY = 512
# Grouped key heads of the width that most models have; little enough for a CPU.
_SMALL = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
# The shape of Qwen2.5-0.5B, the size of an annotator or a small policy.
_HALF_BILLION = Qwen2Config(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)


def policy(
    dtype: torch.dtype, device: torch.device, *, seed: int = 0, large: bool = False
) -> PreTrainedModel:
    """A causal language model; the same weights on every device."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(_HALF_BILLION) if large else LlamaForCausalLM(_SMALL)
    return _placed(model, dtype, device)


def classifier(dtype: torch.dtype, device: torch.device, *, large: bool = False) -> PreTrainedModel:
    """A one-label classifier."""
    torch.manual_seed(0)
    kind = Qwen2ForSequenceClassification if large else LlamaForSequenceClassification
    config = deepcopy(_HALF_BILLION if large else _SMALL)
    config.num_labels = 1
    return _placed(kind(config), dtype, device)


def _placed(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    model.eval().to(device, dtype)
    return model


def rows(
    count: int, prompt: tuple[int, int], answer: tuple[int, int], seed: int = 0, answers: int = 2
) -> list[Row]:
    """Rows of so many answers, of lengths between the bounds."""
    draw = random.Random(seed)

    def tokens(bounds: tuple[int, int]) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(*bounds))]

    return [
        Row(tokens(prompt), tuple(tokens(answer) for _ in range(answers))) for _ in range(count)
    ]


def preferences(given: list[Row]) -> Preference:
    """Weighted preferences over rows; references are about what random weights say.

    Far from them the loss would be flat, and its gradient numbers that CPUs are slow with.
    """
    weights = [0.2 + 0.8 * i / len(given) for i in range(len(given))]
    lengths = [[len(answer) for answer in row.answers] for row in given]
    references = [(-a * math.log(VOCABULARY), -b * math.log(VOCABULARY)) for a, b in lengths]
    names = [str(number) for number in range(len(given))]
    return Preference(given, names, weights, references, "sigmoid", 0.1)


def save(folder: Path) -> None:
    """A policy of the small shape with a tokenizer of bytes, as a Hugging Face folder."""
    special = ["<s>", "</s>", "<pad>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)
    policy(torch.float32, torch.device("cpu")).save_pretrained(folder)
