"""The values of a `keep_columns` column in, one Arrow column of one type out.

All shards of a run share one schema, but JSON lines declare no types, so the type of a column is
settled when all its values were seen. Numbers, booleans and strings stay what they are; lists,
objects and mixed columns become JSON text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import TypeGuard

import pyarrow as pa

_ARROW = {
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "string": pa.string(),
    "json": pa.string(),
}
_INT64 = range(-(2**63), 2**63)
_FLOAT_EXACT = 2**53


def is_above_zero(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number above 0."""
    return isinstance(value, int | float) and value is not True and 0 < value < math.inf


def value_type(value: object) -> str | None:
    """The type name of one value, None for null."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if value not in _INT64:
            return "json"
        # Beyond this a float column would change the number.
        return "int" if abs(value) <= _FLOAT_EXACT else "big int"
    return {float: "float", str: "string"}.get(type(value), "json")


def settle(seen: Iterable[str]) -> str:
    """The one type that holds values of all the types seen, none of them changed."""
    types = set(seen)
    if not types:
        return "string"
    if types <= {"int", "big int"}:
        return "int"
    if types <= {"int", "float"}:
        return "float"
    return types.pop() if len(types) == 1 else "json"


def kept_schema(types: Mapping[str, str]) -> pa.Schema:
    """The Arrow fields of the kept columns, in the config's order."""
    return pa.schema([(name, _ARROW[kind]) for name, kind in types.items()])


def spell(value: object, kind: str) -> object:
    """A value as the settled type holds it."""
    if value is None or kind != "json":
        return value
    return json.dumps(value, ensure_ascii=False)
