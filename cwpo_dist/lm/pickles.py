"""A model's index of weights in; which of them are no safetensors, if any, out.

transformers, told to read safetensors alone, still hands whatever such an index names to
torch.load, which may run code.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from cwpo_dist.hub_names import is_hub_id
from cwpo_dist.lm.foreign import one_line


def other_weights(path: str, revision: str | None) -> str | None:
    """What is wrong with the index of a model, in words; None where nothing is.

    Args:
        path: a local folder, or a hub id.
        revision: of a hub model.
    """
    index = _index(path, revision)
    if index is None:  # one file, whose name says what it is
        return None
    if not index.is_file():
        return f"{SAFE_WEIGHTS_INDEX_NAME} is not a regular file; fetch it again"
    fault = _fault(index)
    return None if fault is None else f"{SAFE_WEIGHTS_INDEX_NAME} {fault}"


def _fault(index: Path) -> str | None:
    """What an index is, or names, that it should not."""
    try:
        held = json.loads(index.read_bytes())
        files = {str(file) for file in held["weight_map"].values()}
        held["metadata"]  # transformers reads it, without a word where there is none
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"is not an index of weights ({one_line(error)}); fetch it again"
    elsewhere = sorted(file for file in files if {"/", ".."} & set(PurePosixPath(file).parts))
    if elsewhere:
        return f"names {elsewhere[0]!r}, outside its folder; fetch it again"
    others = sorted(file for file in files if not file.endswith(".safetensors"))
    if not others:
        return None
    return (
        f"names {others[0]!r}, and only safetensors are read, as other weights may run code; "
        "convert them once"
    )


def _index(path: str, revision: str | None) -> Path | None:
    if not is_hub_id(path):
        file = Path(path, SAFE_WEIGHTS_INDEX_NAME)
        return file if file.exists() else None
    try:
        return Path(hf_hub_download(path, SAFE_WEIGHTS_INDEX_NAME, revision=revision))
    except EntryNotFoundError:  # nor in the cache, where there is no hub
        return None
