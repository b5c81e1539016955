"""Log-probs and scores by ranks that share a frozen model (ZeRO-3): what one actor gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zero_cases
import zero_ranks
from small_run import small_config
from tiny import tiny_classifier, tiny_tokenizer

from cwpo_dist.config import Config
from cwpo_dist.execution.run import run
from cwpo_dist.graph import graph
from cwpo_dist.lm.loading import save
from cwpo_dist.pairs.records import LOG_PROB_SCHEMA, SCORE_SCHEMA
from cwpo_dist.scoring.pipeline import committed_counts
from cwpo_dist.storage import Store

SCHEMAS = {"reference": LOG_PROB_SCHEMA, "scores": SCORE_SCHEMA}


def assert_same(ours: Store, theirs: Store, folder: str) -> int:
    """Compares all files of two outputs; how many rows they have."""
    names = ours.names(folder)
    assert names == theirs.names(folder)
    rows = 0
    for name in names:
        got, wanted = ours.read_table(name), theirs.read_table(name)
        assert got.schema.remove_metadata() == SCHEMAS[folder]
        for column in {"logp", "score", "tokens"} & {*got.schema.names}:
            np.testing.assert_allclose(got[column], wanted[column], rtol=0, atol=1e-5)
        assert got["answer_id"] == wanted["answer_id"]
        rows += got.num_rows
    return rows


@pytest.mark.usefixtures("rank_results")
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
@pytest.mark.parametrize(
    ("stage", "arm", "training", "folder"),
    [("reference", "human", "align", "reference"), ("annotate", "cw", "fit", "scores")],
)
def test_a_whole_stage_by_sharded_workers(
    tmp_path: Path, stage: str, arm: str, training: str, folder: str
) -> None:
    """The same files under the same key, by actors and by the workers of a training."""
    save(tiny_classifier("llama"), tiny_tokenizer(), tmp_path / "rm")
    ready = {"model_name_or_path": str(tmp_path / "rm"), "max_length": 400}
    outputs = []
    for name, sharded in (("actors", False), ("workers", True)):
        config = small_config(
            tmp_path / "in",
            str(tmp_path / name),
            arms=[arm],
            sft=None,
            annotate__model=ready,
            **{f"{training}__num_workers": 2},
        )
        config[stage]["sharded"] = sharded
        checked = Config.model_validate(config)
        run(checked, until=stage)
        outputs.append(Store(checked.output_dir).child(*graph(checked, arm)[stage].path.split("/")))
    assert assert_same(*outputs, folder) > 40
