"""Whether what names a model or a data set is an id on the Hugging Face hub, or a place.

One rule for all that ask: loading, plans, keys, sources and cards must read one name alike.
"""

from __future__ import annotations

import os
import re

_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # `./name` and `../name` are paths
_LONGEST = 96  # letters, on the hub
# How files of pairs end, packed ones too: no hub id ends so.
FILE_ENDINGS = (
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".pq", ".arrow", ".feather"),
    *(".ipc", ".gz", ".bz2", ".xz", ".zst", ".lz4"),
)


def is_hub_id(name: str) -> bool:
    """True for `owner/name` or `name` that is nothing on disk and no name of a file of pairs."""
    is_file = name.lower().endswith(FILE_ENDINGS)
    may_be = len(name) <= _LONGEST and _ID.fullmatch(name) is not None and not is_file
    return may_be and not os.path.exists(name)  # of pathlib's a name that is too long raises
