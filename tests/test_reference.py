"""Log-probs of a frozen policy by ranks that share it (ZeRO-3): what one actor gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zero_cases
import zero_ranks
from small_run import small_config

from cwpo_dist.config import Config
from cwpo_dist.execution.run import run
from cwpo_dist.graph import graph
from cwpo_dist.pairs.records import LOG_PROB_SCHEMA
from cwpo_dist.scoring.pipeline import committed_counts
from cwpo_dist.storage import Store

pytestmark = pytest.mark.usefixtures("rank_results")


def assert_same(ours: Store, theirs: Store) -> int:
    """Compares all files of two outputs of `reference`; how many rows they have."""
    names = ours.names("reference")
    assert names == theirs.names("reference")
    rows = 0
    for name in names:
        got, wanted = ours.read_table(name), theirs.read_table(name)
        assert got.schema.remove_metadata() == LOG_PROB_SCHEMA
        for column in LOG_PROB_SCHEMA.names[1:]:
            np.testing.assert_allclose(got[column], wanted[column], rtol=0, atol=1e-5)
        assert got["answer_id"] == wanted["answer_id"]
        rows += got.num_rows
    return rows


def test_two_sharded_ranks_give_what_an_actor_gives() -> None:
    """Rows, numbers and counts of each shard; what was committed before is left alone."""
    job = zero_cases.reference_job(zero_ranks.results())
    worker = job.make_worker()
    counts = committed_counts(job)
    for index, number in enumerate(zero_cases.REFERENCE_SHARDS):
        got = job.output.read_table(job.file(index))
        if index == zero_cases.ALREADY_DONE:
            assert got.num_rows == 0
            continue
        wanted = worker(index, worker.read(index))
        assert got.num_rows == wanted.rows.num_rows == 2 * number
        assert got["answer_id"] == wanted.rows["answer_id"]
        for column in LOG_PROB_SCHEMA.names[1:]:
            np.testing.assert_allclose(got[column], wanted.rows[column], rtol=0, atol=1e-5)
        assert counts[index] == wanted.counts


@pytest.mark.long
@pytest.mark.usefixtures("ray_local")
def test_a_whole_stage_by_sharded_workers(tmp_path: Path) -> None:
    """The same files under the same key, by actors and by the workers of `align`."""
    outputs = []
    for name, sharded in (("actors", False), ("workers", True)):
        config = small_config(
            tmp_path / "in",
            str(tmp_path / name),
            arms=["human"],
            sft=None,
            align__num_workers=2,
            reference__sharded=sharded,
        )
        checked = Config.model_validate(config)
        run(checked, until="reference")
        outputs.append(
            Store(checked.output_dir).child(*graph(checked, "human")["reference"].path.split("/"))
        )
    assert assert_same(*outputs) > 40
