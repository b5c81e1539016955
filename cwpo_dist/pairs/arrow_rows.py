"""Record batches in, their rows as plain Python values out; a cell that cannot be one is marked.

Columns of JSON (the Json feature of `datasets`, Parquet's JSON type) hold text, also inside lists
and objects; rows hold what it says.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cwpo_dist.pairs.rejects import Reason

Decode = Callable[[Any], object]


@dataclass(frozen=True)
class _Unreadable:
    """Stands for a cell that Arrow holds but Python cannot."""

    text: str
    fault: Reason

    def __str__(self) -> str:
        return self.text


def batch_rows(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, object], dict[str, Reason]]]:
    """Each row by column name, and of its cells that cannot be read each with why.

    Raises:
        ArrowInvalid: for two columns of one name, of which nobody knows which is meant.
    """
    twice = [name for name, count in Counter(batch.schema.names).items() if count > 1]
    if twice:
        raise pa.ArrowInvalid(f"it has several columns called {', '.join(map(repr, twice))}")
    columns = {name: _values(batch.column(k)) for k, name in enumerate(batch.schema.names)}
    for offset in range(batch.num_rows):
        value = {name: column[offset] for name, column in columns.items()}
        bad = {n: cell.fault for n, cell in value.items() if isinstance(cell, _Unreadable)}
        yield value, bad


def _values(column: pa.Array) -> list[object]:
    decode = _decoder(column.type)
    try:
        values: list[object] = column.to_pylist()
        return values if decode is None else [decode(value) for value in values]
    except (ValueError, OverflowError, RecursionError):  # no UTF-8, no JSON, dates beyond Python's
        return [_cell(cell, decode) for cell in column]


def _cell(cell: pa.Scalar, decode: Decode | None) -> object:
    try:
        return cell.as_py() if decode is None else decode(cell.as_py())
    except UnicodeDecodeError as error:
        # Also inside nested values, `object` is the bytes of the string at fault.
        return _Unreadable(error.object.decode("utf-8", "backslashreplace"), Reason.UNICODE)
    except json.JSONDecodeError as error:
        return _Unreadable(error.doc, Reason.MALFORMED)
    except (ValueError, OverflowError, RecursionError) as error:
        return _Unreadable(str(error), Reason.TYPE)


def _decoder(kind: pa.DataType) -> Decode | None:
    """What makes values of the JSON text inside values of a type; None where it holds none."""
    if isinstance(kind, pa.JsonType):
        return _parsed
    if isinstance(kind, pa.StructType):
        found = {kind.field(at).name: _decoder(kind.field(at).type) for at in range(len(kind))}
        fields = {name: decode for name, decode in found.items() if decode is not None}
        return _object_decoder(fields) if fields else None
    inner = _decoder(kind.value_type) if isinstance(kind, _LISTS) else None
    return None if inner is None else _list_decoder(inner)


_LISTS = (
    pa.ListType,
    pa.LargeListType,
    pa.FixedSizeListType,
    pa.ListViewType,
    pa.LargeListViewType,
)


def _parsed(text: str | None) -> object:
    return None if text is None else json.loads(text)


def _list_decoder(inner: Decode) -> Decode:
    return lambda values: None if values is None else [inner(value) for value in values]


def _object_decoder(fields: dict[str, Decode]) -> Decode:
    def decode(value: dict[str, object] | None) -> object:
        if value is None:
            return None
        return value | {name: inner(value[name]) for name, inner in fields.items()}

    return decode
