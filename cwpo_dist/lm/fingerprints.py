"""A model in; what its weights, configuration and tokenizer are known by, without reading them."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download

from cwpo_dist.config import ModelConfig
from cwpo_dist.file_marks import Mark, fingerprint
from cwpo_dist.hub_names import is_hub_id
from cwpo_dist.lm.loading import ModelError, model_path
from cwpo_dist.storage import Store

_MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")


def model_fingerprint(model: ModelConfig) -> list[Mark]:
    """What identifies a model's weights, configuration and tokenizer without reading them.

    Returns:
        Name, size and modification time (or ETag) of each file of a folder; for a hub model its
        id and the commit that its revision stands for.
    """
    name = model.model_name_or_path
    path = name if "://" in name else model_path(name)
    if is_hub_id(path):
        return [[name, _commit(model)]]
    root = Store(path).root
    return [
        [str(file)[len(root) + 1 :], *marks]
        for file, *marks in fingerprint(path)
        if str(file).endswith(_MODEL_FILES)
    ]


def of_tokenizer(marks: list[Mark]) -> list[Mark]:
    """What of it makes text into tokens: other weights under one tokenizer change nothing.

    Its configuration does: it says how many embeddings there are, beyond which no token is read.
    """
    return [mark for mark in marks if not _is_of_weights(str(mark[0]))]


def _is_of_weights(file: str) -> bool:
    return ".safetensors" in file or Path(file).name == "generation_config.json"


def _commit(model: ModelConfig) -> str:
    """The commit of a hub model's revision: the hub's word, or without a network the cache's."""
    try:
        cached = hf_hub_download(model.model_name_or_path, "config.json", revision=model.revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"model_name_or_path: {model.model_name_or_path!r}: {error}") from error
    return Path(cached).parent.name  # …/snapshots/COMMIT/config.json
