"""A model's index of weights in; which of them are no safetensors, if any, out.

transformers, told to read safetensors alone, still hands whatever such an index names to
torch.load, which may run code.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file

from cwpo_dist.lm.foreign import one_line


def other_weights(path: str, revision: str | None) -> str | None:
    """What is wrong with the index of a model, in words; None where nothing is.

    Args:
        path: a local folder, or a hub id.
        revision: of a hub model.
    """
    index = cached_file(
        path,
        SAFE_WEIGHTS_INDEX_NAME,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if index is None:  # one file, whose name says what it is
        return None
    try:
        files = {str(file) for file in json.loads(Path(index).read_bytes())["weight_map"].values()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return (
            f"{SAFE_WEIGHTS_INDEX_NAME} is no index of weights ({one_line(error)}); fetch it again"
        )
    others = sorted(file for file in files if not file.endswith(".safetensors"))
    if not others:
        return None
    return (
        f"{SAFE_WEIGHTS_INDEX_NAME} names {others[0]!r}, and only safetensors are read, as other "
        "weights may run code; convert them once"
    )
