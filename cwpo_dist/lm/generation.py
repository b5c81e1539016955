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
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from cwpo_dist.lm.foreign import FOREIGN_ERRORS, model_fault
from cwpo_dist.lm.loading import ModelError
from cwpo_dist.lm.rope import turn_alone, turning_length

logger = logging.getLogger(__name__)

_PROBE_PROMPTS = (9, 3)  # tokens
_HEEDS_PADS = "_cwpo_heeds_pads"  # on a model: what was found of it
# By how much of their spread the logits of a padded prompt may differ from those of it alone.
_PAD_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


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

    Batches are made of prompts of like length, padded on the left; a model that does not heed pads,
    and an answer in which rotary positions turn (rope.py), is written alone. The same prompt given
    twice has the same answer.

    Args:
        model: a causal language model; put into evaluation mode.
        tokenizer: decodes the answers; its EOS and those of the model's `generation_config.json`
            end an answer. No other key of that file acts.
        prompts: token ids, ready for generation (template and BOS already there).
        max_new_tokens: longest answer, in tokens.
        temperature: 0 is greedy.
        seed: of the noise.
        batch_size: prompts in one forward; changes nothing but speed and memory.

    Returns:
        The answers without special tokens, in the order of `prompts`.

    Raises:
        ConfigError: where a prompt and its answer do not fit the model's positions.
        ModelError: for a model that cannot write.
        ValueError: for an empty prompt.
    """
    check_fit(model, prompts, max_new_tokens)
    model.train(False)
    turn_alone(model)
    settings = _settings(model, tokenizer, max_new_tokens)
    answers = [""] * len(prompts)
    with _without_own_settings(model):
        for members in _batches(model, settings, prompts, batch_size):
            batch = [prompts[i] for i in members]
            texts = _generate_batch(model, tokenizer, batch, settings, temperature, seed)
            for i, text in zip(members, texts, strict=True):
                answers[i] = text
    return answers


def _batches(
    model: PreTrainedModel,
    settings: GenerationConfig,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
) -> Iterator[list[int]]:
    """The places of prompts that are answered together: the same answers as one by one."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    turning, new_tokens = turning_length(model), settings.max_new_tokens or 0
    together = order
    if turning is not None:
        together = [i for i in order if len(prompts[i]) + new_tokens <= turning]
    if len(together) > 1 and batch_size > 1 and not _heeds_pads(model, settings.pad_token_id):
        together = []
    for start in range(0, len(together), batch_size):
        yield together[start : start + batch_size]
    yield from ([i] for i in order[len(together) :])


def _heeds_pads(model: PreTrainedModel, pad_id: int) -> bool:
    """Whether a padded prompt is continued as it is alone, for two tokens; asked once a model."""
    known: bool | None = getattr(model, _HEEDS_PADS, None)
    if known is not None:
        return known
    draw = torch.Generator().manual_seed(0)
    words = int(model.config.get_text_config().vocab_size)
    longer, short, (token,) = (
        torch.randint(words, (n,), generator=draw).tolist() for n in (*_PROBE_PROMPTS, 1)
    )
    padded_2V = _two_logits(model, [longer, short], pad_id, token)
    alone_2V = _two_logits(model, [short], pad_id, token)
    differ = float((padded_2V - alone_2V).abs().max() / alone_2V.std())
    heeds = differ <= _PAD_TOLERANCE[model.dtype]
    setattr(model, _HEEDS_PADS, heeds)
    if not heeds:
        logger.warning(
            "%s reads the padding in front of a prompt as text: its answers are written one by one",
            type(model).__name__,
        )
    return heeds


class _Watch(LogitsProcessor):
    """Keeps what a model says of each next token of its last prompt, and gives one of its own."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] → logits under which the token is the greedy one."""
        self.seen.append(scores[-1].float())
        chosen = torch.zeros_like(scores)
        chosen[:, self.token] = 1.0
        return chosen


def _two_logits(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, token: int
) -> Tensor:
    """The logits that follow the last prompt, and those after a token, from the cache, [2, V]."""
    watch = _Watch(token)
    settings = GenerationConfig(
        max_new_tokens=2, do_sample=False, use_cache=True, pad_token_id=pad_id
    )
    _continued(model, prompts, settings, LogitsProcessorList([watch]))
    return torch.stack(watch.seen)


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
    processors = LogitsProcessorList()
    if temperature > 0:
        seeds = [stream_seed(seed, prompt) for prompt in prompts]
        processors.append(GumbelNoise(seeds, temperature, model.device))
    return decoded(tokenizer, _continued(model, prompts, settings, processors))


def decoded(tokenizer: PreTrainedTokenizerBase, answers: Tensor | list[list[int]]) -> list[str]:
    """Tokens of answers as text, without special ones."""
    texts: list[str] = tokenizer.batch_decode(
        answers, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts


def _continued(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    processors: LogitsProcessorList,
) -> Tensor:
    """The new tokens alone, [B, T]."""
    longest = max(len(prompt) for prompt in prompts)
    ids_BL = torch.full((len(prompts), longest), settings.pad_token_id, dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        ids_BL[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BL[row, longest - len(prompt) :] = 1
    sampler: Any = model  # generate() is a mixin's, which the base class does not declare
    try:
        with torch.no_grad():
            output_BT: Tensor = sampler.generate(
                ids_BL.to(model.device),
                attention_mask=mask_BL.to(model.device),
                generation_config=settings,
                logits_processor=processors,
            )
    except FOREIGN_ERRORS as error:
        raise ModelError(
            f"model: {type(model).__name__} cannot write answers ({model_fault(error)}); set "
            "evaluate.num_prompts to 0, or give another model"
        ) from error
    return output_BT[:, longest:]


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model has no generation settings of its own.

    transformers fills whatever a given configuration leaves open from the model's, key by key, and
    keys that it does not know too: an empty one has nothing to fill in.
    """
    owner: Any = model
    own = getattr(owner, "generation_config", None)
    owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = own


def _settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Greedy settings; every knob that is not named here is at its neutral value."""
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id
    if pad is None or pad >= model.config.get_text_config().vocab_size:
        pad = ends[0] if ends else 0  # masked out before the prompt, and no text behind an answer
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=pad,
    )


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: the tokenizer's EOS, and those of the model's own file."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = own if isinstance(own, list) else [own]
    return sorted({int(i) for i in [tokenizer.eos_token_id, *found] if i is not None})


def stream_seed(seed: int, prompt: Sequence[int]) -> int:
    """A 63-bit seed of (seed, prompt): of the noise of its answer."""
    content = np.asarray([seed, *prompt], dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def check_fit(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Returns when each prompt has tokens, and its answer would have positions.

    Raises:
        ConfigError, ValueError: as `generate`.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts: one has no tokens; set aside pairs with empty prompts")
    longest = max((len(prompt) for prompt in prompts), default=0)
    limit = getattr(model.config, "max_position_embeddings", None)
    if turning_length(model) is not None:
        limit = None  # such positions are made for longer texts
    if limit is not None and longest + max_new_tokens > limit:
        raise ConfigError(
            f"evaluate.max_new_tokens: {max_new_tokens} after a prompt of {longest} tokens passes "
            f"the model's {limit} positions; lower it, or policy.max_length"
        )
