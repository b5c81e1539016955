"""Prompts and answers as Arrow holds them in, as texts or messages out; and back.

A plain message is a dict of its own keys alone. Arrow has the same fields in every row: what stands
beside role and content lies together in `extra`, as JSON.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from cwpo_dist.pairs.records import Text, Tools

_ALWAYS = ("role", "content")


def unpacked(column: pa.ChunkedArray) -> list[Any]:
    """Prompts or answers as Arrow holds them, as texts or messages."""
    texts: list[Any] = column.to_pylist()
    for text in texts:
        _unpack(text)
    return texts


def tools_of(column: pa.ChunkedArray) -> list[Tools | None]:
    """The tools of prompts, which are JSON in a file."""
    return [None if tools is None else json.loads(tools) for tools in column.to_pylist()]


def packed(text: Text | None) -> object:
    """A prompt or answer as Arrow holds it."""
    if text is None or isinstance(text, str):
        return text
    return [
        {
            "role": message["role"],
            "content": message["content"],
            "extra": as_json({k: message[k] for k in message if k not in _ALWAYS} or None),
        }
        for message in text
    ]


def _unpack(text: object) -> None:
    for message in text if isinstance(text, list) else ():
        extra = message.pop("extra")
        if extra is not None:
            message.update(json.loads(extra))


def as_json(value: object) -> str | None:
    """JSON text; None where there is nothing."""
    return None if value is None else json.dumps(value, ensure_ascii=False)
