"""Records at the door: what a stage reads follows its schema, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cwpo_dist.pairs.answers import Compared
from cwpo_dist.pairs.chosen import chosen_first, signs
from cwpo_dist.pairs.preferences import Choice, Preference, preference_schema
from cwpo_dist.pairs.records import (
    ANSWER_SCHEMA,
    LOG_PROB_SCHEMA,
    PROMPT_SCHEMA,
    REJECT_SCHEMA,
    SCORE_SCHEMA,
    TOKEN_SCHEMA,
    AnswerTokens,
    LogProb,
    PromptTokens,
    RecordError,
    Reject,
    SampledAnswer,
    Score,
    read_records,
    read_rows,
    table_of,
)
from cwpo_dist.pairs.stored import (
    Judgement,
    Pair,
    Told,
    pair_schema,
    read_judgements,
    read_pairs,
    whole_schema,
    write_pairs,
)
from cwpo_dist.runs.joined import PairLogProbs
from cwpo_dist.runs.judged_answers import JUDGED_SCHEMA, JudgedAnswer
from cwpo_dist.stages.evaluate import ITEM_SCHEMA, MeasuredPair
from cwpo_dist.storage import Store

SCORE = {"answer_id": ["p"], "annotator": ["x"], "score": [2.0], "tokens_hash": [7]}


def test_columns_come_in_the_schemas_types(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    narrow = pa.table(SCORE | {"score": pa.array([2], pa.int32()), "more": ["?"]})
    store.create_table("scores/part-00000.parquet", narrow)
    table = read_records(store, "scores/part-00000.parquet", SCORE_SCHEMA)
    assert table.schema.equals(SCORE_SCHEMA)
    some = read_records(store, "scores/part-00000.parquet", SCORE_SCHEMA, ["score", "answer_id"])
    assert some.to_pylist() == [{"score": 2.0, "answer_id": "p"}]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"score": None}, "cannot read .*score"), ({"score": ["high"]}, "high")],
)
def test_other_tables_are_refused_by_name(tmp_path: Path, change: dict, named: str) -> None:
    store = Store(str(tmp_path))
    columns = {name: values for name, values in (SCORE | change).items() if values is not None}
    store.create_table("scores/part-00000.parquet", pa.table(columns))
    with pytest.raises(RecordError, match=named) as refused:
        read_records(store, "scores/part-00000.parquet", SCORE_SCHEMA)
    assert "part-00000.parquet" in str(refused.value)


def test_pairs_are_text_or_messages(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    messages: Any = [{"role": "user", "content": "Hi"}]
    for kind, text in (("text", "Hi"), ("conversational", messages)):
        pair = Pair("p", text, text, text, label="a", split="test")
        write_pairs(store.child(kind), 0, [pair])
        assert read_pairs(store.child(kind), 0) == [pair]
        judged = read_judgements(store.child(kind), "pairs/part-00000.parquet")
        assert judged == [Judgement("p", "a", "test")]
    store.create_table("numbers.parquet", pa.table({"pair_id": ["p"], "label": [None]}))
    with pytest.raises(RecordError, match="split"):
        read_judgements(store, "numbers.parquet")


@pytest.mark.parametrize(
    ("record", "schema"),
    [
        (Score, SCORE_SCHEMA),
        (LogProb, LOG_PROB_SCHEMA),
        (AnswerTokens, TOKEN_SCHEMA),
        (PromptTokens, PROMPT_SCHEMA),
        (SampledAnswer, ANSWER_SCHEMA),
        (Reject, REJECT_SCHEMA),
        (Pair, whole_schema("text")),
        (Preference, preference_schema("text", tools=True)),
        (MeasuredPair, ITEM_SCHEMA),
        (JudgedAnswer, JUDGED_SCHEMA),
    ],
)
def test_a_record_has_the_columns_of_its_schema_in_their_order(record: Any, schema: Any) -> None:
    assert list(record._fields) == schema.names


def test_parts_of_a_pair_are_read_from_its_own_columns() -> None:
    told = [name for name in Pair._fields if name in Told._fields]
    assert list(Told._fields) == told
    assert Pair(*range(16)).told == Told(*range(5, 14))  # type: ignore[arg-type]  # to be told apart
    assert set(Judgement._fields) <= set(Pair._fields)
    assert set(Compared._fields) <= set(pair_schema().names)
    assert set(Choice._fields) <= set(Preference._fields)


def test_records_come_back_as_they_went(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    scores = [Score("p", "x", 2.0), Score("q", "x", 0.25)]
    store.create_table("some.parquet", table_of(scores, SCORE_SCHEMA))
    store.create_table("none.parquet", table_of([], SCORE_SCHEMA))
    assert read_rows(store, "some.parquet", Score, SCORE_SCHEMA) == scores
    assert read_rows(store, "none.parquet", Score, SCORE_SCHEMA) == []


def test_a_swapped_pair_is_the_same_pair() -> None:
    pair = Pair("p", "?", "yes", "no", None, "a", False, 3, 1, 2, 0.5, 0.25, 1.5, -1.5, "test", "x")
    swapped = pair.swap()
    assert swapped[2:4] == ("no", "yes")
    assert (swapped.chosen, swapped.rejected) == (pair.chosen, pair.rejected) == ("yes", "no")
    assert swapped.told == Told("b", False, 1, 3, 2, 0.5, 0.25, -1.5, 1.5)
    assert swapped.swap() == pair
    unlabelled = pair._replace(label=None)
    assert unlabelled.swap().label is None
    with pytest.raises(AssertionError):
        _ = unlabelled.chosen


def test_the_chosen_comes_first_and_counts_up() -> None:
    assert [chosen_first(label, 1, 2) for label in ("a", "b", None)] == [(1, 2), (2, 1), (1, 2)]
    assert signs(["a", "b", None]).tolist() == [1.0, -1.0, 0.0]
    with pytest.raises(ValueError, match="'c' is unknown"):
        signs(["c"])  # type: ignore[list-item]  # what a file may hold


def test_log_probs_are_sums_or_means_of_tokens() -> None:
    found = PairLogProbs(LogProb("p", -6.0, 3), LogProb("q", -8.0, 2))
    assert found.sums == (-6.0, -8.0)
    assert found.means == (-2.0, -4.0)
