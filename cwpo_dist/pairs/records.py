"""The records that stages exchange: a typed row and an Arrow schema each, checked when read.

A stage names fields that a type checker knows, and never looks into a row by a string. Pairs and
preferences, whose messages need packing, stand in `stored`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

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


class Prompt(NamedTuple):
    """A prompt, and the tools that its template is given with it."""

    text: Text
    tools: Tools | None = None


SCORE_SCHEMA = pa.schema(
    [
        ("answer_id", pa.string()),
        ("annotator", pa.string()),
        ("score", pa.float32()),
        ("tokens_hash", pa.int64()),
    ]
)


class Score(NamedTuple):
    """What an annotator gave an answer.

    Attributes:
        answer_id: whose.
        annotator: who scored: `fit/` and the key of its training, or the name of a ready model.
        score: the reward model's number.
        tokens_hash: of the tokens that were read: of two answers with the same one a model cannot
            say which is better, and that must not hang on which of them was scored when.
    """

    answer_id: str
    annotator: str
    score: float
    tokens_hash: int | None = None


# Of an annotator with several heads: their mean is the score.
HEADS_SCHEMA = SCORE_SCHEMA.append(pa.field("heads", pa.list_(pa.float32())))


class HeadScores(NamedTuple):
    """What each head of an annotator gave an answer.

    Attributes:
        heads: of an annotator with several heads, what each gave, whose mean is `score`; no such
            column otherwise.
    """

    answer_id: str
    annotator: str
    score: float
    tokens_hash: int | None
    heads: list[float]


LOG_PROB_SCHEMA = pa.schema(
    [
        ("answer_id", pa.string()),
        ("logp", pa.float32()),
        ("tokens", pa.int32()),
        ("tokens_hash", pa.int64()),
    ]
)


class LogProb(NamedTuple):
    """The log-prob of an answer under a model.

    Attributes:
        answer_id: whose.
        logp: the log-probability of the whole answer, in nats.
        tokens: of how many tokens.
        tokens_hash: as of scores.
    """

    answer_id: str
    logp: float
    tokens: int
    tokens_hash: int | None = None


TOKEN_SCHEMA = pa.schema(
    [
        ("answer_id", pa.string()),
        ("prompt", pa.list_(pa.int32())),
        ("answer", pa.list_(pa.int32())),
        ("cut", pa.bool_()),
    ]
)


class AnswerTokens(NamedTuple):
    """Token ids of an answer, and of the prompt before it.

    Attributes:
        answer_id: whose.
        prompt: ids, up to where the conversation leaves the prompt alone.
        answer: ids of the rest, EOS with them.
        cut: whether some were taken off, as they were more than `max_length`.
    """

    answer_id: str
    prompt: list[int]
    answer: list[int]
    cut: bool = False


PROMPT_SCHEMA = pa.schema([("pair_id", pa.string()), ("tokens", pa.list_(pa.int32()))])


class PromptTokens(NamedTuple):
    """Token ids of a prompt that a model is to answer, with the id of a pair that it is of."""

    pair_id: str
    tokens: list[int]


ANSWER_SCHEMA = pa.schema([("pair_id", pa.string()), ("answer", pa.string())])


class SampledAnswer(NamedTuple):
    """What a model answered to the prompt of a pair.

    Attributes:
        pair_id: of the pair whose prompt it was given.
        answer: what it wrote.
    """

    pair_id: str
    answer: str


REJECT_SCHEMA = pa.schema(
    [
        ("reason", pa.string()),
        ("found", pa.string()),
        ("source", pa.string()),
        ("position", pa.int64()),
        ("row", pa.string()),
    ]
)


class Reject(NamedTuple):
    """A row that was set aside.

    Attributes:
        reason: why.
        found: what stood there, of a response in a list its place before it; null where the reason
            says it all.
        source: the file that it came from.
        position: which line or row of the file: of a source from 1, of a file of ours from 0.
        row: its text, or the id of a pair or answer.
    """

    reason: str
    found: str | None
    source: str
    position: int
    row: str


# Ids are hashes. Those of answers and pairs begin with their prompt's: what is sorted by any id has
# all of a prompt side by side, and a range of ids is a range of prompts. Of 10^8 prompts two are
# taken for one with odds of one in a million; of 1,000 answers to one prompt with fewer.
ID_DIGITS, PROMPT_DIGITS = 32, 18

_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False)

R = TypeVar("R", bound=NamedTuple)
T = TypeVar("T")


class RecordError(ValueError):
    """A table does not follow its schema; the message names the column and the remedy."""


def prompt_id(prompt: object, tools: object = None) -> str:
    """18 hex digits of the hash of a prompt with its tools."""
    given = [] if tools is None else [canonical(tools)]
    return _hash(canonical(prompt), *given)[:PROMPT_DIGITS]


def answer_id(prompt: str, answer: object) -> str:
    """The id of the prompt, then digits of the answer's hash: 32 in all."""
    return prompt + _hash(canonical(answer))[PROMPT_DIGITS:]


def pair_id(prompt: str, first: object, second: object) -> str:
    """The id of the prompt, then digits that are the same whichever answer comes first."""
    return prompt + _hash(*sorted([canonical(first), canonical(second)]))[PROMPT_DIGITS:]


def prompt_of(name: str) -> str:
    """The id of the prompt of an answer or pair, by its own id."""
    return name[:PROMPT_DIGITS]


def prompts_of(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """The same of a column of ids, without a Python object each."""
    return pc.utf8_slice_codeunits(names, 0, PROMPT_DIGITS)


def one_a_prompt(given: Iterable[T], id_of: Callable[[T], str], most: int) -> list[T]:
    """So many at most, of as many prompts as there are: a second of one comes behind all firsts.

    What is sorted by id has all of a prompt side by side, so that the first by themselves would be
    of few prompts. No more is read than that takes.
    """
    firsts: dict[str, T] = {}
    others: list[T] = []
    for each in given:
        if (prompt := prompt_of(id_of(each))) not in firsts:
            firsts[prompt] = each
        elif len(others) < most:
            others.append(each)
        if len(firsts) == most:
            break
    return [*firsts.values(), *others][:most]


def _hash(*texts: str) -> str:
    content = "\x1e".join(texts).encode()
    return hashlib.blake2b(content, digest_size=ID_DIGITS // 2).hexdigest()


class Canonical(str):
    """What `canonical` spelled: of several ids that takes most of the time, so it is done once."""

    __slots__ = ()


def canonical(text: object) -> Canonical:
    """One spelling of a prompt or answer for hashing: JSON, keys sorted."""
    return text if isinstance(text, Canonical) else Canonical(_ENCODER.encode(text))


def content_hash(text: object) -> str:
    """32 hex digits of the hash of one prompt or answer."""
    return _hash(canonical(text))


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
    return check(read_columns(store, name, wanted.names), wanted, store.path(name))


def rows_of(record: type[R], table: pa.Table) -> list[R]:
    """A table's rows as records: its columns that are called as their fields are."""
    columns = [table[name].to_pylist() for name in record._fields]
    return list(map(record._make, zip(*columns, strict=True)))


def table_of(rows: Sequence[tuple[object, ...]], schema: pa.Schema) -> pa.Table:
    """Records as a table; their fields are the columns of its schema, in their order."""
    columns = {name: [row[k] for row in rows] for k, name in enumerate(schema.names)}
    return pa.table(columns, schema=schema)


def read_rows(store: Store, name: str, record: type[R], schema: pa.Schema) -> list[R]:
    """A file's rows as records.

    Raises:
        RecordError: for a file that does not follow its schema.
    """
    return rows_of(record, read_records(store, name, schema, record._fields))


def read_columns(store: Store, name: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of a file, whatever their types.

    Raises:
        RecordError: for a column that is missing.
    """
    try:
        return store.read_table(name, list(columns))
    except pa.ArrowInvalid as error:  # a column that is missing, or no Parquet at all
        what = str(error).splitlines()[0]
        raise RecordError(
            f"{store.path(name)}: cannot read {', '.join(columns)}: {what}; rewrite it with the "
            "stage that made it"
        ) from None
