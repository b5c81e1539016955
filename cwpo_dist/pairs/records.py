"""The records that stages exchange: one Arrow schema each, and a check of a table against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from cwpo_dist.storage import Store

Kind = Literal["text", "conversational"]
# `role`, `content` (null where there are tool calls alone) and those of MESSAGE_KEYS it has.
Message = dict[str, Any]
Text = str | list[Message]
Tools = list[dict[str, Any]]

# What chat templates read of a message beside role and content: text, or any JSON.
TEXT_KEYS = (
    *("name", "tool_call_id", "recipient", "tool_plan"),
    *("reasoning_content", "reasoning", "thinking"),
)
MESSAGE_KEYS = (*TEXT_KEYS, "tool_calls", "tool_responses", "end_turn")
# `extra`: the other keys as JSON, null where there are none.
MESSAGES = pa.list_(
    pa.struct([("role", pa.string()), ("content", pa.string()), ("extra", pa.string())])
)
TEXTS = ("prompt", "response_a", "response_b")

SCORE_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("annotator", pa.string()),
        ("score_a", pa.float32()),
        ("score_b", pa.float32()),
    ]
)
REFERENCE_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("logp_a", pa.float32()),
        ("logp_b", pa.float32()),
        ("n_a", pa.int32()),
        ("n_b", pa.int32()),
    ]
)
TOKEN_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt", pa.list_(pa.int32())),
        ("answer_a", pa.list_(pa.int32())),
        ("answer_b", pa.list_(pa.int32())),
    ]
)
PROMPT_SCHEMA = pa.schema([("pair_id", pa.string()), ("tokens", pa.list_(pa.int32()))])
ANSWER_SCHEMA = pa.schema([("pair_id", pa.string()), ("answer", pa.string())])
REJECT_SCHEMA = pa.schema(
    [
        ("reason", pa.string()),
        ("found", pa.string()),
        ("source", pa.string()),
        ("position", pa.int64()),
        ("row", pa.string()),
    ]
)


_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False)


class RecordError(ValueError):
    """A table does not follow its schema; the message names the column and the remedy."""


class Prompt(NamedTuple):
    """A prompt, and the tools that its template is given with it."""

    text: Text
    tools: Tools | None = None


def pair_schema(kind: Kind, keep: pa.Schema | None = None) -> pa.Schema:
    """The pair record, with the user's `keep_columns` at its end.

    `tools` is JSON, null where there are none. `tie` says that people found the answers equal:
    `label` is then null. `votes_tie` are the votes for neither. `weight`, `confidence` and the
    scores are the data's own: null where they have none.
    """
    text = pa.string() if kind == "text" else MESSAGES
    return pa.schema(
        [
            ("pair_id", pa.string()),
            ("prompt", text),
            ("response_a", text),
            ("response_b", text),
            ("tools", pa.string()),
            ("label", pa.string()),
            ("tie", pa.bool_()),
            ("votes_a", pa.int32()),
            ("votes_b", pa.int32()),
            ("votes_tie", pa.int32()),
            ("weight", pa.float64()),
            ("confidence", pa.float64()),
            ("score_a", pa.float64()),
            ("score_b", pa.float64()),
            ("split", pa.string()),
            ("source", pa.string()),
            *(keep or []),
        ]
    )


def preference_schema(kind: Kind, *, keys: bool = False, tools: bool = False) -> pa.Schema:
    """The preference record: TRL's names and format, with margin, confidence and weight.

    `label` says which answer of the pair was chosen (`a`, `b`); `probability` is the annotator's
    that the chosen one is better. It, margin and confidence (C) are null where a human chose, or
    where the data's own weight says how much; disagreement also where there is one annotator alone.

    `weight` is what multiplies the pair's loss: Σ weight·loss over a batch, divided by its pairs.
    Of arms that are normalised by the data set's mean it is divided by that already; of those
    normalised by batch, and of those that draw pairs in proportion, it is the weight before that.

    Messages are objects of role and content. Where any message of the run has more (`tool_calls`,
    `reasoning_content`, …), all of them are Arrow's JSON: `datasets` gives each as the object that
    the models' templates were given, with its own keys alone, other readers as JSON text; so are
    `tools`, as a list of tools, in a column that is there where any pair has some.

    Args:
        kind: text or conversational.
        keys: whether any message has more than role and content.
        tools: whether any pair has tools.
    """
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    text = pa.string() if kind == "text" else pa.list_(pa.json_() if keys else message)
    return pa.schema(
        [
            ("pair_id", pa.string()),
            ("prompt", text),
            ("chosen", text),
            ("rejected", text),
            *([("tools", pa.json_())] if tools else []),
            ("label", pa.string()),
            ("margin", pa.float32()),
            ("disagreement", pa.float32()),
            ("probability", pa.float32()),
            ("confidence", pa.float32()),
            ("weight", pa.float64()),  # the data's own stay what they are, to the bit
        ]
    )


def kind_of(table: pa.Table) -> Kind:
    """Whether a table's prompts are text or conversations."""
    return "text" if pa.types.is_string(table.schema.field("prompt").type) else "conversational"


def pair_id(prompt: Any, first: Any, second: Any, tools: Any = None) -> str:
    """32 hex digits of the content's hash, the same whichever answer comes first."""
    answers = sorted([canonical(first), canonical(second)])
    given = [] if tools is None else [canonical(tools)]
    content = "\x1e".join([canonical(prompt), *answers, *given])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def canonical(text: Any) -> str:
    """One spelling of a prompt or answer for hashing: JSON, keys sorted."""
    return _ENCODER.encode(text)


def content_hash(text: Any) -> str:
    """32 hex digits of the hash of one prompt or answer."""
    return hashlib.blake2b(canonical(text).encode(), digest_size=16).hexdigest()


def unit_hash(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends on (seed, parts) alone."""
    text = "\x1f".join([str(seed), *parts])
    value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return value / 2**64


def check(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """The table with exactly the schema's columns, cast.

    Raises:
        RecordError: for a missing column or one of another type.
    """
    for field in schema:
        if field.name not in table.column_names:
            raise RecordError(
                f"{where}: no column {field.name!r}; it has {', '.join(table.column_names)}"
            )
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise RecordError(f"{where}: {error}; rewrite it with the stage that made it") from None


def read_records(
    store: Store, name: str, schema: pa.Schema, columns: Sequence[str] | None = None
) -> pa.Table:
    """A file of records, or some of its columns, checked: the door through which stages read.

    Raises:
        RecordError: for a file that does not follow its schema.
    """
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    return check(_read(store, name, wanted.names), wanted, store.path(name))


def read_pairs(store: Store, name: str, columns: Sequence[str]) -> pa.Table:
    """Columns of a file of pairs, checked; prompt and answers are of the kind that they are.

    `stored.pair_rows` gives its rows.
    """
    table = _read(store, name, columns)
    text = [column for column in TEXTS if column in columns]
    messages = bool(text) and all(
        pa.types.is_list(field.type) for field in table.schema if field.name in text
    )
    schema = pair_schema("conversational" if messages else "text")
    wanted = pa.schema([schema.field(column) for column in columns])
    return check(table, wanted, store.path(name))


def _read(store: Store, name: str, columns: Sequence[str]) -> pa.Table:
    try:
        return store.read_table(name, list(columns))
    except pa.ArrowInvalid as error:  # a column that is missing, or no Parquet at all
        what = str(error).splitlines()[0]
        raise RecordError(
            f"{store.path(name)}: cannot read {', '.join(columns)}: {what}; rewrite it with the "
            "stage that made it"
        ) from None
