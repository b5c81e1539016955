"""Preferences and scored answers, the products: records and Arrow schemas that others read.

Messages have role and content alone, or are whole messages as JSON; columns have TRL's names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa

from cwpo_dist.pairs.chosen import Label
from cwpo_dist.pairs.packing import as_json
from cwpo_dist.pairs.records import Kind, R, Text, Tools, read_rows
from cwpo_dist.storage import Store


def preference_schema(kind: Kind, *, keys: bool = False, tools: bool = False) -> pa.Schema:
    """The columns of a `Preference`: TRL's names and format, with margin, confidence and weight.

    Messages are objects of role and content. Where any message of the run has more (`tool_calls`,
    `reasoning_content`, …), all of them are Arrow's JSON: `datasets` gives each as the object that
    the models' templates were given, with its own keys alone, other readers as JSON text; so are
    `tools`, as a list of tools, in a column that is there where any pair has some.

    Args:
        kind: text or conversational.
        keys: whether any message has more than role and content.
        tools: whether any pair has tools.
    """
    text = _text(kind, keys)
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


def _text(kind: Kind, keys: bool) -> pa.DataType:
    """The type of a prompt or answer."""
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.string() if kind == "text" else pa.list_(pa.json_() if keys else message)


class Preference(NamedTuple):
    """A pair that was decided: what a policy is aligned on.

    Attributes:
        pair_id: of the pair.
        prompt: text or messages, as the answers are.
        chosen: the better answer.
        rejected: the other.
        tools: what the conversation could call.
        label: which answer of the pair is the chosen one, `a` or `b`.
        margin: m, the annotator's score of the chosen answer less that of the other, divided by the
            temperature where one was fitted; below 0 where annotators deny a person's label. Like
            probability and confidence null where people chose, or the data's own weight counts.
        disagreement: the standard deviation of several annotators' margins; null of one.
        probability: σ(m), the annotator's that the chosen answer is better, from 0 to 1.
        confidence: C = 2·(σ(m) − ½), from 0 to 1; 0 where the margin is below 0.
        weight: what multiplies the pair's loss: Σ weight·loss over a batch, divided by its pairs.
            Of arms that are normalised by the data set's mean it is divided by that already; of
            those normalised by batch, and of those that draw pairs in proportion, it is the weight
            before that.
    """

    pair_id: str
    prompt: Text
    chosen: Text
    rejected: Text
    tools: Tools | None
    label: Label
    margin: float | None
    disagreement: float | None
    probability: float | None
    confidence: float | None
    weight: float

    def as_messages(self) -> Preference:
        """Of a text: as every other trainer renders it by the policy's template, too."""
        return self._replace(
            prompt=[{"role": "user", "content": self.prompt}],
            chosen=[{"role": "assistant", "content": self.chosen}],
            rejected=[{"role": "assistant", "content": self.rejected}],
        )


def scored_schema(kind: Kind, *, keys: bool = False, tools: bool = False) -> pa.Schema:
    """The columns of a `ScoredAnswer`; arguments and messages as of `preference_schema`."""
    text = _text(kind, keys)
    return pa.schema(
        [
            ("answer_id", pa.string()),
            ("prompt", text),
            ("answer", text),
            *([("tools", pa.json_())] if tools else []),
            ("annotator", pa.string()),
            ("score", pa.float32()),
        ]
    )


class ScoredAnswer(NamedTuple):
    """An answer with its score, as it is exported.

    Attributes:
        answer_id: the content's hash, which begins with the prompt's.
        prompt: text or messages, as the answer is.
        answer: it.
        tools: what the conversation could call.
        annotator: who scored: `fit/` and the key of its training, or the name of a ready model.
        score: the reward model's number; of a model that `fit` made, the difference of two answers'
            scores is the log-odds that the first is better.
    """

    answer_id: str
    prompt: Text
    answer: Text
    tools: Tools | None
    annotator: str
    score: float


class Choice(NamedTuple):
    """What of a `Preference` training reads: its texts are tokens elsewhere."""

    pair_id: str
    label: Label
    weight: float
    probability: float | None = None


def read_choices(store: Store, name: str) -> list[Choice]:
    """Those of a file of preferences.

    Raises:
        RecordError: for a file that does not follow its schema.
    """
    return read_rows(store, name, Choice, preference_schema("text"))


def product_table(record: type[R], rows: Sequence[R], schema: pa.Schema) -> pa.Table:
    """Records as their schema has them."""
    plain = pa.schema([pa.field(field.name, _without_json(field.type)) for field in schema])
    places = [record._fields.index(name) for name in schema.names]
    columns = {
        field.name: [_spelled(row[place], field.type) for row in rows]
        for field, place in zip(schema, places, strict=True)
    }
    return pa.table(columns, schema=plain).cast(schema)


def _without_json(kind: pa.DataType) -> pa.DataType:
    """The type with strings for JSON: Arrow makes JSON of strings, but not of Python's values."""
    if pa.types.is_list(kind):
        return pa.list_(_without_json(kind.value_type))
    return pa.string() if kind == pa.json_() else kind


def _spelled(value: object, kind: pa.DataType) -> object:
    """A value with the text of what is JSON in its type."""
    if isinstance(value, list) and pa.types.is_list(kind):
        return [_spelled(each, kind.value_type) for each in value]
    return as_json(value) if kind == pa.json_() else value
