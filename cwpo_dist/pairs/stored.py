"""Pairs and preferences with plain messages in, Arrow tables of their schemas out, and back.

A plain message is a dict of its own keys alone. Arrow has the same fields in every row: of pairs,
what stands beside role and content lies together in `extra`, as JSON. Preferences, which other
programs read, have role and content alone, or whole messages as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from cwpo_dist.pairs.records import TEXTS, Text

_ALWAYS = ("role", "content")


def pair_table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Pairs as their schema has them; `pair_rows` turns it round."""
    return pa.Table.from_pylist([_packed(row) for row in rows], schema=schema)


def pair_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table of pairs, or of some of its columns."""
    rows: list[dict[str, Any]] = table.to_pylist()
    texts = [name for name in TEXTS if name in table.schema.names]
    for row in rows:
        for name in texts:
            _unpack(row[name])
        if row.get("tools") is not None:
            row["tools"] = json.loads(row["tools"])
    return rows


def packed(text: Text | None) -> Any:
    """A prompt or answer as Arrow holds it."""
    if text is None or isinstance(text, str):
        return text
    return [
        {
            "role": message["role"],
            "content": message["content"],
            "extra": _json({k: message[k] for k in message if k not in _ALWAYS} or None),
        }
        for message in text
    ]


def preference_table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Preferences as their schema has them."""
    plain = pa.schema([pa.field(field.name, _without_json(field.type)) for field in schema])
    made = [
        {field.name: _spelled(row.get(field.name), field.type) for field in schema} for row in rows
    ]
    return pa.Table.from_pylist(made, schema=plain).cast(schema)


def _packed(row: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: packed(row[name]) for name in TEXTS if name in row}
    return {**row, **texts, "tools": _json(row.get("tools"))}


def _unpack(text: Any) -> None:
    for message in text if isinstance(text, list) else ():
        extra = message.pop("extra")
        if extra is not None:
            message.update(json.loads(extra))


def _without_json(kind: pa.DataType) -> pa.DataType:
    """The type with strings for JSON: Arrow makes JSON of strings, but not of Python's values."""
    if pa.types.is_list(kind):
        return pa.list_(_without_json(kind.value_type))
    return pa.string() if kind == pa.json_() else kind


def _spelled(value: Any, kind: pa.DataType) -> Any:
    """A value with the text of what is JSON in its type."""
    if value is not None and pa.types.is_list(kind):
        return [_spelled(each, kind.value_type) for each in value]
    return _json(value) if kind == pa.json_() else value


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)
