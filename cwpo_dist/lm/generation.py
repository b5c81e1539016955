"""Prompts as token ids in, sampled answers out.

Sampling does not depend on the batch: answer i is drawn with noise that is a function of
(seed, its prompt, position) alone, by the Gumbel-max trick, so another batch size, order or
padding changes an answer only where two tokens are equal to within rounding. Two models that are
given one seed share their noise, and equal models then give equal answers (ties): a comparison
of independent samples, as the paper's, gives each model a seed of its own.

Shapes: B = prompts of a batch, L = longest prompt, V = vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cwpo_dist.config import ConfigError


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
) -> list[str]:
    """Samples one answer a prompt, from the whole vocabulary (no top-k or top-p cut).

    Batches are made of prompts of like length, padded on the left. The same prompt given twice
    has the same answer.

    Args:
        model: a causal language model; put into evaluation mode.
        tokenizer: decodes the answers; its EOS and the model's own end an answer.
        prompts: token ids, ready for generation (template and BOS already there).
        max_new_tokens: longest answer, in tokens.
        temperature: 0 is greedy.
        seed: of the noise.
        batch_size: prompts in one forward; changes nothing but speed and memory.

    Returns:
        The answers without special tokens, in the order of `prompts`.

    Raises:
        ConfigError: where a prompt and its answer do not fit the model's positions.
        ValueError: for an empty prompt.
    """
    _check_fit(model, prompts, max_new_tokens)
    model.train(False)
    settings = _settings(model, tokenizer, max_new_tokens)
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        batch = [prompts[i] for i in members]
        for i, text in zip(
            members,
            _generate_batch(model, tokenizer, batch, settings, temperature, seed),
            strict=True,
        ):
            answers[i] = text
    return answers


class GumbelNoise(LogitsProcessor):
    """Makes the greedy choice a draw at a temperature: argmax(logits/T + G) ~ softmax(logits/T).

    Each row has a random stream of its own, so a draw does not depend on its neighbours.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self.streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] → noisy logits [B, V], fp32."""
        noise_BV = torch.empty_like(scores, dtype=torch.float32)
        for row_V, stream in zip(noise_BV, self.streams, strict=True):
            row_V.exponential_(generator=stream)
        tiny = torch.finfo(torch.float32).tiny  # −log of an exponential draw is a Gumbel draw
        return scores.float() / self.temperature - noise_BV.clamp_min_(tiny).log_()


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    temperature: float,
    seed: int,
) -> list[str]:
    longest = max(len(prompt) for prompt in prompts)
    ids_BL = torch.full((len(prompts), longest), settings.pad_token_id, dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        ids_BL[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BL[row, longest - len(prompt) :] = 1
    processors = LogitsProcessorList()
    if temperature > 0:
        seeds = [_stream_seed(seed, prompt) for prompt in prompts]
        processors.append(GumbelNoise(seeds, temperature, model.device))
    sampler: Any = model  # generate() is a mixin's, which the base class does not declare
    with torch.no_grad():
        output_BT = sampler.generate(
            ids_BL.to(model.device),
            attention_mask=mask_BL.to(model.device),
            generation_config=settings,
            logits_processor=processors,
        )
    texts: list[str] = tokenizer.batch_decode(
        output_BT[:, longest:], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts


def _settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Greedy settings with every other knob of the model's own file at its neutral value."""
    ends = _end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id
    if pad is None or pad >= model.config.get_text_config().vocab_size:
        pad = ends[0] if ends else 0  # masked out before the prompt, and no text behind an answer
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=pad,
    )


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    found = own if isinstance(own, list) else [own]
    return sorted({int(i) for i in [tokenizer.eos_token_id, *found] if i is not None})


def _stream_seed(seed: int, prompt: Sequence[int]) -> int:
    """A 63-bit seed of (seed, prompt)."""
    content = np.asarray([seed, *prompt], dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def _check_fit(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts: one has no tokens; set aside pairs with empty prompts")
    longest = max((len(prompt) for prompt in prompts), default=0)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest + max_new_tokens > limit:
        raise ConfigError(
            f"evaluate.max_new_tokens: {max_new_tokens} after a prompt of {longest} tokens passes "
            f"the model's {limit} positions; lower it, or policy.max_length"
        )
