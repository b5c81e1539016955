"""A value or a table in; bytes that are equal for equal ones, and a value's key, out."""

from __future__ import annotations

import hashlib
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq


def to_json(value: object) -> bytes:
    """Canonical JSON: sorted keys, so that equal values have equal bytes."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def digest(value: object) -> str:
    """A short content key: 16 hex digits of the SHA-256 of canonical JSON."""
    return hashlib.sha256(to_json(value)).hexdigest()[:16]


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as Parquet bytes, deterministic for one version of pyarrow.

    Without rows it has no row group either: `datasets` takes the first one's rows as its batch
    size, and refuses 0.
    """
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema, compression="zstd") as writer:
        if table.num_rows:
            writer.write_table(table)
    return buffer.getvalue()
