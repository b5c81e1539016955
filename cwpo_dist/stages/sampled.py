"""Sampled pairs in; their lengths in a model's tokens, and how the model reads them, out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from cwpo_dist.config import ConfigError, ModelConfig
from cwpo_dist.lm.rows import Row, collate
from cwpo_dist.lm.tokens import Encoder, TokenError, fit_length, load_tokenizer
from cwpo_dist.pairs.messages import extra_keys
from cwpo_dist.pairs.parsing import ParsedPair
from cwpo_dist.stages.costs import Lengths


@dataclass(frozen=True)
class ShownRow:
    """A pair as a model sees it: decoded tokens, and what its mask lets through."""

    model: str
    prompt: str
    answers: tuple[str, ...]
    mask: tuple[str, ...]


def encoder_of(field: str, model: ModelConfig) -> Encoder:
    """The tokenizer and template of the model that a field names."""
    tokenizer = load_tokenizer(model, distinct_pad=field == "weak")
    return Encoder(tokenizer, model.chat_template)


def lengths_in(model: ModelConfig, encoder: Encoder, sample: Sequence[ParsedPair]) -> Lengths:
    """Of the pairs that fit the model.

    Raises:
        ConfigError: for a template that cannot read them.
    """
    try:
        rows = [_row(model, encoder, pair) for pair in sample]
    except TokenError as error:
        raise ConfigError(f"{model.model_name_or_path}: {error}") from error
    fitting = [row for row in rows if row is not None]
    if not fitting:
        return Lengths(0.0, 0.0, 0.0, 0.0)
    return Lengths(
        len(fitting) / len(rows),
        fmean(row.n_tokens for row in fitting),
        fmean(row.n_longest for row in fitting),
        fmean(row.n_tokens - len(row.prompt) for row in fitting),
    )


def unrendered(
    encoders: Mapping[str, tuple[ModelConfig, Encoder]], sample: Sequence[ParsedPair]
) -> Iterator[str]:
    """What the pairs hold that a model's chat template does not mention, for people."""
    for name, (_, encoder) in encoders.items():
        template, counts = str(encoder.tokenizer.chat_template), Counter[str]()
        for pair in sample:
            held = extra_keys((pair.prompt, pair.first, pair.second))
            held |= set() if pair.tools is None else {"tools"}
            counts.update(key for key in held if key not in template)
        if counts:
            listed = ", ".join(f"{key} (in {n} of {len(sample)})" for key, n in counts.items())
            yield (
                f"{name}: its chat template does not read what sampled pairs hold: {listed}; "
                "the model will not see it"
            )


def shown_row(
    field: str, model: ModelConfig, encoder: Encoder, pair: ParsedPair
) -> ShownRow | None:
    """One pair as a shared row; what the mask lets through is read off the real mask."""
    row = _row(model, encoder, pair)
    if row is None:
        return None
    batch = collate([row], "shared", 0)
    positions, allowed = batch.position_ids[0], batch.attention_mask[0, 0]
    lines = [f"prompt: {len(row.prompt)} tokens at positions 0–{len(row.prompt) - 1}"]
    start = len(row.prompt)
    for name, answer in zip("ab", row.answers, strict=False):
        span = slice(start, start + len(answer))
        seen = int(allowed[span.stop - 1].sum())
        first, last = int(positions[span.start]), int(positions[span.stop - 1])
        lines.append(
            f"{name}: {len(answer)} tokens at positions {first}–{last}; its last token sees {seen} "
            f"of {batch.input_ids.shape[1]}"
        )
        start = span.stop
    decode = encoder.tokenizer.decode
    return ShownRow(
        field, str(decode(row.prompt)), tuple(str(decode(a)) for a in row.answers), tuple(lines)
    )


def _row(model: ModelConfig, encoder: Encoder, pair: ParsedPair) -> Row | None:
    row = encoder.encode(pair.prompt, (pair.first, pair.second), pair.tools)
    return fit_length(row, model.max_length, model.over_length, bos_id=encoder.bos_id)
