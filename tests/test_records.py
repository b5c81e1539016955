"""Records at the door: what a stage reads follows its schema, or is refused by name."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from cwpo_dist.pairs.records import SCORE_SCHEMA, RecordError, read_pairs, read_records
from cwpo_dist.pairs.stored import pair_rows
from cwpo_dist.storage import Store

SCORE = {"pair_id": ["p"], "annotator": ["x"], "score_a": [1.0], "score_b": [2.0]}


def test_columns_come_in_the_schemas_types(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    narrow = pa.table(SCORE | {"score_a": pa.array([1], pa.int32()), "more": ["?"]})
    store.create_table("scores/part-00000.parquet", narrow)
    table = read_records(store, "scores/part-00000.parquet", SCORE_SCHEMA)
    assert table.schema.equals(SCORE_SCHEMA)
    some = read_records(store, "scores/part-00000.parquet", SCORE_SCHEMA, ["score_b", "pair_id"])
    assert some.to_pylist() == [{"score_b": 2.0, "pair_id": "p"}]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"score_b": None}, "cannot read .*score_b"), ({"score_b": ["high"]}, "high")],
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
    messages = [[{"role": "user", "content": "Hi"}]]
    for name, prompt in (("text", ["Hi"]), ("messages", messages)):
        store.create_table(f"{name}.parquet", pa.table({"pair_id": ["p"], "prompt": prompt}))
        table = read_pairs(store, f"{name}.parquet", ["pair_id", "prompt"])
        assert [row["prompt"] for row in pair_rows(table)] == prompt
    store.create_table("numbers.parquet", pa.table({"pair_id": ["p"], "prompt": [None]}))
    with pytest.raises(RecordError, match="split"):
        read_pairs(store, "numbers.parquet", ["pair_id", "split"])
