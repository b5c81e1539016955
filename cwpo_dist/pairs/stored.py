"""Pairs: their records and Arrow schemas; a shard of them in three files, and whole again.

A shard of pairs is three files: a prompt and an answer are stored once, in however many pairs they
stand. Pairs name them by their ids, and are read whole again, with the texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cwpo_dist.config import Split
from cwpo_dist.pairs.chosen import OTHER, Label, chosen_first
from cwpo_dist.pairs.packing import as_json, packed, tools_of, unpacked
from cwpo_dist.pairs.records import (
    MESSAGES,
    Kind,
    RecordError,
    Text,
    Tools,
    answer_id,
    check,
    prompt_id,
    read_rows,
    table_of,
)
from cwpo_dist.storage import Store

TEXTS = ("prompt", "response_a", "response_b")


_TOLD = pa.schema(
    [
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
    ]
)
# What a pair stands for: the ids of its prompt and answers.
IDS = pa.schema([("prompt_id", pa.string()), ("answer_a", pa.string()), ("answer_b", pa.string())])


def _text(kind: Kind) -> pa.DataType:
    return pa.string() if kind == "text" else MESSAGES


def prompt_schema(kind: Kind) -> pa.Schema:
    """The columns of `prompts/`.

    Columns:
        prompt_id: hash of prompt and tools, 18 hex digits.
        prompt: text, or messages; `extra` has a message's other keys as JSON, null where none.
        tools: JSON; null where there are none.
    """
    return pa.schema([("prompt_id", pa.string()), ("prompt", _text(kind)), ("tools", pa.string())])


def answer_schema(kind: Kind, alone: pa.Schema | None = None) -> pa.Schema:
    """The columns of `answers/`.

    Columns:
        answer_id: the prompt's id and a hash of the answer, 32 hex digits.
        prompt_id: the prompt's id.
        answer: what was answered, as `prompt`.
        source: the first source's `path`.
        split: where some source has one response a row, of an answer that stands in no pair; null
            for the others.
        keep_columns: the user's own names, there too: those of its row.

    Args:
        kind: text or conversational.
        alone: the user's `keep_columns`, where answers may come in rows of their own: these are of
            such rows, and `split` of those that stand in no pair; null for the others.
    """
    ids = [("answer_id", pa.string()), ("prompt_id", pa.string())]
    own = [] if alone is None else [("split", pa.string()), *alone]
    return pa.schema([*ids, ("answer", _text(kind)), ("source", pa.string()), *own])


def pair_schema(kept: pa.Schema | None = None) -> pa.Schema:
    """The columns of `pairs/`, sorted by `pair_id`; most are the fields of a `Pair`.

    Columns:
        pair_id: the prompt's id and a hash of both answers, 32 hex digits.
        prompt_id: the prompt's id.
        answer_a, answer_b: ids of the two answers; which is `a` is drawn by a hash of the content.
        keep_columns: the user's own names, at the end.
    """
    return pa.schema([("pair_id", pa.string()), *IDS, *_TOLD, *(kept or [])])


def whole_schema(kind: Kind) -> pa.Schema:
    """The columns of a `Pair`: a row with its texts."""
    texts = [(name, _text(kind)) for name in TEXTS]
    return pa.schema([("pair_id", pa.string()), *texts, ("tools", pa.string()), *_TOLD])


class Pair(NamedTuple):
    """Two answers to one prompt, and what people and the data say of them; None: nothing.

    Attributes:
        pair_id: the content's hash.
        prompt: text or messages, as the answers are.
        response_a: one answer; which one it is says nothing.
        response_b: the other.
        tools: what the conversation could call.
        label: the answer that people chose, `a` or `b`.
        tie: whether people found them equal; `label` is then null.
        votes_a: how many people chose response_a.
        votes_b: how many chose the other.
        votes_tie: how many chose neither.
        weight: the data's own, that multiplies the pair's loss.
        confidence: the data's own C of the label.
        score_a: the data's own score of response_a.
        score_b: of the other.
        split: `labelled`, `unlabelled`, `validation` or `test`.
        source: the `path` of the source that it came from.
    """

    pair_id: str
    prompt: Text
    response_a: Text
    response_b: Text
    tools: Tools | None = None
    label: Label | None = None
    tie: bool | None = None
    votes_a: int | None = None
    votes_b: int | None = None
    votes_tie: int | None = None
    weight: float | None = None
    confidence: float | None = None
    score_a: float | None = None
    score_b: float | None = None
    split: Split | None = None
    source: str | None = None

    @property
    def answers(self) -> tuple[Text, Text]:
        """(a, b)."""
        return self.response_a, self.response_b

    @property
    def chosen(self) -> Text:
        """The answer that the label names."""
        assert self.label is not None, self.pair_id
        return chosen_first(self.label, *self.answers)[0]

    @property
    def rejected(self) -> Text:
        """The other one."""
        assert self.label is not None, self.pair_id
        return chosen_first(self.label, *self.answers)[1]

    @property
    def told(self) -> Told:
        """What people and the data say of it."""
        return Told(*self[5:14])

    def swap(self) -> Pair:
        """The same pair with its answers the other way round, and all that belongs to each."""
        return self._replace(
            response_a=self.response_b,
            response_b=self.response_a,
            label=None if self.label is None else OTHER[self.label],
            votes_a=self.votes_b,
            votes_b=self.votes_a,
            score_a=self.score_b,
            score_b=self.score_a,
        )


class Told(NamedTuple):
    """What of a `Pair` people and the data say: all in which copies of one pair may differ."""

    label: Label | None
    tie: bool | None
    votes_a: int | None
    votes_b: int | None
    votes_tie: int | None
    weight: float | None
    confidence: float | None
    score_a: float | None
    score_b: float | None


class Judgement(NamedTuple):
    """What of a `Pair` decides which answer is the chosen one: it is read without the texts."""

    pair_id: str
    label: Label | None = None
    split: Split | None = None
    weight: float | None = None
    confidence: float | None = None


def read_pairs(store: Store, index: int) -> list[Pair]:
    """The pairs of a shard.

    Args:
        store: the output folder of `prepare`, or any with shards by `write_shard`.
        index: the shard's number.

    Raises:
        RecordError: for a file that does not follow its schema.
    """
    table = read_whole(store, index)
    return pairs_of(
        check(table, whole_schema(_kind(table)), store.path(shard_file("pairs", index)))
    )


def read_whole(store: Store, index: int) -> pa.Table:
    """A shard's pairs, with texts in the place of their ids, and with kept columns.

    Raises:
        RecordError: for a pair that names what is not there.
    """
    names = {folder: shard_file(folder, index) for folder in ("prompts", "answers", "pairs")}
    prompts, answers, pairs = map(store.read_table, names.values())
    columns = {"pair_id": pairs["pair_id"]}
    at = places_of(pairs["prompt_id"], prompts["prompt_id"], store.path(names["prompts"]))
    columns["prompt"] = prompts["prompt"].take(at)
    for ids, text in zip(IDS.names[1:], TEXTS[1:], strict=True):
        places = places_of(pairs[ids], answers["answer_id"], store.path(names["answers"]))
        columns[text] = answers["answer"].take(places)
    columns["tools"] = prompts["tools"].take(at)
    others = pairs.drop_columns(["pair_id", *IDS.names])
    return pa.table(columns | dict(zip(others.column_names, others.columns, strict=True)))


def places_of(named: pa.ChunkedArray, ids: pa.ChunkedArray, where: str) -> pa.Array:
    """Where each id stands among others.

    Args:
        named: ids.
        ids: among which they are looked for, once each.
        where: their file, for messages.

    Raises:
        RecordError: for one that is not there.
    """
    found = pc.index_in(named, value_set=ids.combine_chunks())
    if found.null_count:
        missing = named.filter(pc.is_null(found))[0]
        raise RecordError(f"{where}: {missing} is not in it, but others name it; make it again")
    return found


def write_shard(
    store: Store,
    index: int,
    whole: pa.Table,
    kept: pa.Schema | None = None,
    *,
    alone: bool = False,
) -> None:
    """Writes a shard's prompts, answers and pairs, each unless it is there.

    Args:
        store: where its folders lie.
        index: the shard's number.
        whole: pairs with their texts, ids and kept columns.
        kept: types of the latter.
        alone: whether some are pairs of an answer with itself, as it came in a row of its own;
            such go first, and have the texts that the others lack.
    """
    kind, pairs, own = _kind(whole), whole, list[pa.ChunkedArray]()
    asked, answers = whole.select(prompt_schema(kind).names), answer_schema(kind)
    # What `prepare` did not make may compare an answer with itself: two models wrote the same.
    if alone:
        single = pc.equal(whole["answer_a"], whole["answer_b"])
        pairs, answers = whole.filter(pc.invert(single)), answer_schema(kind, kept or [])
        columns = [whole["split"], *(whole[field.name] for field in kept or [])]
        own = [pc.if_else(single, each, pa.scalar(None, each.type)) for each in columns]
    told = [
        pa.table([*whole.select([ids, "prompt_id", text, "source"]).columns, *own], answers)
        for ids, text in zip(IDS.names[1:], TEXTS[1:], strict=True)
    ]
    for folder, table, schema in (
        ("prompts", _first_of_each(asked, "prompt_id"), prompt_schema(kind)),
        ("answers", _first_of_each(pa.concat_tables(told), "answer_id"), answers),
        ("pairs", pairs, pair_schema(kept)),
    ):
        store.create_table(shard_file(folder, index), table.select(schema.names).cast(schema))


def write_pairs(store: Store, index: int, pairs: Sequence[Pair]) -> None:
    """Writes a shard of pairs that `prepare` did not make."""
    kind: Kind = "conversational" if pairs and not isinstance(pairs[0].prompt, str) else "text"
    whole = pair_table(pairs, whole_schema(kind))
    asked = [prompt_id(pair.prompt, pair.tools) for pair in pairs]
    ids = [
        [answer_id(of, p.answers[n]) for of, p in zip(asked, pairs, strict=True)] for n in (0, 1)
    ]
    for field, values in zip(IDS, (asked, *ids), strict=True):
        whole = whole.append_column(field, pa.array(values, pa.string()))
    write_shard(store, index, whole)


def _first_of_each(table: pa.Table, column: str) -> pa.Table:
    """The first row of each value, sorted by them."""
    places = table.select([column]).append_column("place", pa.array(np.arange(len(table))))
    first = places.group_by(column).aggregate([("place", "min")]).sort_by(column)
    return table.take(first["place_min"])


def _kind(table: pa.Table) -> Kind:
    return "text" if pa.types.is_string(table.schema.field("prompt").type) else "conversational"


def shard_file(folder: str, index: int) -> str:
    """One of the three files of a shard."""
    return f"{folder}/part-{index:05d}.parquet"


def read_judgements(store: Store, name: str) -> list[Judgement]:
    """What decides, of the pairs of a file.

    Raises:
        RecordError: for a file that does not follow its schema.
    """
    return read_rows(store, name, Judgement, pair_schema())


def pairs_of(table: pa.Table) -> list[Pair]:
    """The pairs of a table; `pair_table` turns it round."""
    special = dict.fromkeys(TEXTS, unpacked) | {"tools": tools_of}
    columns = [special.get(name, pa.ChunkedArray.to_pylist)(table[name]) for name in Pair._fields]
    return list(map(Pair._make, zip(*columns, strict=True)))


def pair_table(pairs: Iterable[Pair], schema: pa.Schema) -> pa.Table:
    """Pairs as a schema of theirs has them."""
    rows = [
        (pair.pair_id, *map(packed, (pair.prompt, *pair.answers)), as_json(pair.tools), *pair[5:])
        for pair in pairs
    ]
    return table_of(rows, schema)
