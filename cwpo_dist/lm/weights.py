"""A model's folder in; why what it says of itself cannot be, out, before anything is built of it.

Headers of safetensors are a few kilobytes, and its own library checks them: length, JSON, types,
and that all tensors lie in the file. What `config.json` claims is held against them: there are at
least as many tensors as layers, and as many numbers as words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from cwpo_dist.lm.foreign import one_line

_LARGEST_FILE = 64 * 2**20  # of JSON; a tokenizer of 260,000 words has 34 MiB
_SMALL = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json")
_JSON = (*_SMALL, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_MOST_LABELS = 10_000  # transformers copies them with every configuration, for seconds
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_WORDS = ("vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "head_dim")
_WHOLE = (*_LAYERS, *_WORDS, "num_attention_heads", "max_position_embeddings")


@dataclass(frozen=True)
class Weights:
    """How much the files of a model hold."""

    tensors: int
    numbers: int


def folder_fault(folder: Path) -> str | None:
    """Why a folder is no model, naming the file; None where nothing is seen that speaks against it.

    Args:
        folder: local; its index of weights, if it has one, names safetensors alone.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".safetensors") and not path.is_file():
            return f"{path.name} is not a regular file; fetch it again"
    for name in _JSON:
        if fault := _json_fault(folder / name):
            return f"{name}: {fault}; fetch it again, or correct it"
    tensors = numbers = 0
    for file in _files(folder):
        try:
            held = _held(file)
        except (SafetensorError, OSError, ValueError) as error:
            return f"{file.name}: {one_line(error)}; fetch it again"
        tensors, numbers = tensors + held.tensors, numbers + held.numbers
    return _claims(folder / CONFIG_NAME, Weights(tensors, numbers)) if tensors else None


def bytes_of(folder: Path) -> int:
    """Of the files of weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _json_fault(path: Path) -> str | None:
    if not path.is_file():
        return None
    if path.stat().st_size > _LARGEST_FILE:
        return f"it has more than {_LARGEST_FILE:,} bytes"
    try:
        held = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({one_line(error)})"
    return None if isinstance(held, dict) else "it does not hold a JSON object"


def _files(folder: Path) -> Iterator[Path]:
    """The files that transformers reads: one, or those that an index names."""
    if (folder / SAFE_WEIGHTS_NAME).exists():
        yield folder / SAFE_WEIGHTS_NAME
    elif (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_bytes())
        yield from (folder / name for name in sorted(set(index["weight_map"].values())))


def _held(file: Path) -> Weights:
    """What one file holds, from its header."""
    with safe_open(file, framework="pt") as weights:
        names = weights.keys()  # it is no mapping, and cannot be iterated over itself
        shapes = [weights.get_slice(name).get_shape() for name in names]
        if (weights.metadata() or {}).get("format", "pt") != "pt":
            raise ValueError(f"it is of {weights.metadata()['format']!r}, not of PyTorch")
    return Weights(len(shapes), sum(map(math.prod, shapes)))


def _claims(path: Path, held: Weights) -> str | None:
    """What a configuration says that its weights belie."""
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    labels, count = config.get("id2label"), config.get("num_labels")
    for name, many in ("id2label", len(labels or ())), ("num_labels", count):
        if isinstance(many, int) and many > _MOST_LABELS:
            return f"config.json: {name}: {many:,} labels; a reward model has one: remove it"
    text = config.get("text_config")
    of_text = _belied(text, held) if isinstance(text, dict) else None
    return _belied(config, held) or of_text


def _belied(config: Mapping[str, object], held: Weights) -> str | None:
    """The first size that is none, or that takes more than the weights have."""
    for name, value in _numbers(config):
        if value is None:
            return f"config.json: {name}: {config[name]!r}; give a whole number above 0"
        limit, what = held.numbers, "numbers"
        if name in _LAYERS:  # each of which has a tensor at least
            limit, what = held.tensors, "tensors"
        if name in (*_LAYERS, *_WORDS) and value > limit:
            return (
                f"config.json: {name}: {value}, but its weights have {limit} {what} in all; "
                "fetch both again"
            )
    return None


def _numbers(config: Mapping[str, object]) -> Iterator[tuple[str, int | None]]:
    """The sizes that are numbers; None for one that no size can be."""
    for name in _WHOLE:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            yield name, value if value > 0 else None
        elif isinstance(value, str | float | bool):
            yield name, None
