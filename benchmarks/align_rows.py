"""A model and data in; what `align.py` compares its sides on, out: some layers, and rows of ids."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import measure
import torch

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.encoder import Asked, Encoder, load_tokenizer
from cwpo_dist.lm.fitting import encode_pairs
from cwpo_dist.lm.loading import load_policy, save
from cwpo_dist.lm.rows import Row
from cwpo_dist.pairs.records import Text
from cwpo_dist.pairs.stored import Pair, read_pairs

SEED, MAX_LENGTH = 0, 1024


def first_layers(model: Path, layers: int, folder: Path) -> str:
    """The model's first layers as a folder of its own: TRL loads its reference from the name."""
    settings = ModelConfig(model_name_or_path=str(model), num_hidden_layers=layers)
    save(load_policy(settings), load_tokenizer(settings), folder)
    return str(folder)


def _drawn_pairs(data: str, settings: ModelConfig, folder: Path) -> list[Pair]:
    """All pairs, in an order that a seed decides."""
    store, shards = measure.with_ray(lambda: measure.prepared(folder / "pairs", data, None, 1024))
    pairs = [pair for index in range(shards) for pair in read_pairs(store, index)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(SEED))
    return [pairs[i] for i in order.tolist()]


def drawn_rows(
    data: str, model: str, count: int, answers: int, sampler: Path, folder: Path
) -> Path:
    """So many pairs that neither side truncates, as a file of ids.

    Two answers: the data's own pairs, each taken for the only one of its prompt. More: all pairs of
    so many that `sampler` samples to each prompt.
    """
    settings = ModelConfig(model_name_or_path=model, max_length=MAX_LENGTH)
    encoder = Encoder(load_tokenizer(settings), settings.chat_template)
    pairs = _drawn_pairs(data, settings, folder)
    asked = [Asked(pair.prompt, pair.answers, pair.tools) for pair in pairs]
    each = list(combinations(range(answers), 2))
    if answers > 2:
        asked = _sampled(sampler, encoder, asked[: count // len(each)], answers)
    rows: dict[str, Any] = {}
    for number, row in enumerate(encode_pairs(encoder, settings, asked)):
        if isinstance(row, Row) and len(rows) < count:
            prompt, k = divmod(number, len(each))
            rows[f"{prompt:018x}{k:014x}"] = {"prompt": row.prompt, "answers": row.answers}
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def _sampled(sampler: Path, encoder: Encoder, asked: list[Asked], answers: int) -> list[Asked]:
    """All pairs of so many answers that a model samples to each prompt."""
    prompts = [encoder.encode(each.prompt, each.answers).prompt for each in asked]
    texts = zip(asked, measure.sampled(sampler, prompts, answers), strict=True)
    return [
        Asked(of.prompt, tuple(_spoken(of.prompt, text) for text in two))
        for of, found in texts
        for two in combinations(found, 2)
    ]


def _spoken(prompt: object, text: str) -> Text:
    """An answer in the kind of its prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
