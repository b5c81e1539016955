"""Scores by two ranks that share a reward model (ZeRO-3): one process's, also after a kill.

As a script it is a rank: FOLDER RANK ATTEMPT.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from tiny import tiny_classifier, tiny_tokenizer
from zero_cases import Case

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.loading import save
from cwpo_dist.pairs.stored import pairs_of, whole_schema, write_pairs
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.earlier_scores import EarlierScores, NewAnswersWorker
from cwpo_dist.scoring.pipeline import ShardJob, committed_counts
from cwpo_dist.scoring.retries import ShardOutput
from cwpo_dist.scoring.scorers import RewardWorker, reward_module
from cwpo_dist.scoring.sharded import Together
from cwpo_dist.storage import Store
from cwpo_dist.training.frozen import FrozenSpec
from cwpo_dist.training.lease import LeaseToken
from cwpo_dist.training.rank import rank_process

WORLD, SHARDS, PAIRS = 2, 4, 7
CPU = torch.device("cpu")


class Slow(NewAnswersWorker):
    """So that a kill comes between two shards."""

    def __call__(self, index: int, rows: Any) -> ShardOutput:
        time.sleep(1.0)
        return super().__call__(index, rows)


def model_of(folder: Path) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(folder / "model"), max_length=64)


def job_of(folder: Path, name: str = "ranks") -> ShardJob:
    answers, model = AnswersIn(Store(str(folder))), model_of(folder)
    scorer = partial(RewardWorker, answers, model, "rm", 100)
    worker = partial(Slow, EarlierScores(()), answers, scorer)
    return ShardJob("scores", Store(str(folder / name)), SHARDS, worker)


def rank(folder: Path, number: int, attempt: str) -> None:
    """What Ray Train's worker does, but for Ray."""
    torch.set_num_threads(1)
    met = f"file://{folder}/rendezvous-{attempt}"
    dist.init_process_group("gloo", init_method=met, rank=number, world_size=WORLD)
    job, config = job_of(folder), Case("annotate", 3).config()
    spec = FrozenSpec(
        "annotate", job.output, config, model_of(folder), reward_module, Together(job)
    )
    with rank_process(config, CPU) as watchdog:
        spec.run(LeaseToken(job.output, 0), CPU, watchdog)


def started(folder: Path, attempt: str) -> list[subprocess.Popen[bytes]]:
    ranks = []
    for number in range(WORLD):
        ids = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(WORLD)}
        log = (folder / f"log-{attempt}-{number}").open("wb")
        command = [sys.executable, __file__, str(folder), str(number), attempt]
        ranks.append(subprocess.Popen(command, env=os.environ | ids, stdout=log, stderr=log))
    return ranks


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_two_ranks_score_as_one_process_and_go_on_after_a_kill(tmp_path: Path) -> None:
    save(tiny_classifier("llama"), tiny_tokenizer(), tmp_path / "model")
    for index in range(SHARDS):
        rows = [
            {
                "pair_id": f"{index}-{k}",
                "split": "unlabelled",
                "prompt": f"question {index} {k}",
                "response_a": "a" * (k + 1),
                "response_b": f"another {k}",
            }
            for k in range(PAIRS)
        ]
        write_pairs(
            Store(str(tmp_path)), index, pairs_of(pa.Table.from_pylist(rows, whole_schema("text")))
        )
    job, killed = job_of(tmp_path), started(tmp_path, "first")
    while not job.output.names("scores"):
        logs = [(tmp_path / f"log-first-{number}").read_text() for number in range(WORLD)]
        assert all(process.poll() is None for process in killed), logs
        time.sleep(0.05)
    for process in killed[::-1]:
        process.kill()
        process.wait()
    done = {name: job.output.read(name) for name in job.output.names("scores")}
    assert 0 < len(done) < SHARDS
    for number, process in enumerate(started(tmp_path, "second")):
        assert process.wait() == 0, (tmp_path / f"log-second-{number}").read_text()

    assert all(job.output.read(name) == data for name, data in done.items())
    counts, worker = committed_counts(job), job_of(tmp_path, "alone").make_worker()
    for index in range(SHARDS):
        got, wanted = job.output.read_table(job.file(index)), worker(index, worker.read(index))
        assert got["answer_id"] == wanted.rows["answer_id"]
        assert got.num_rows == 2 * PAIRS
        np.testing.assert_allclose(got["score"], wanted.rows["score"], rtol=0, atol=1e-6)
        assert counts[index] == wanted.counts


if __name__ == "__main__":
    rank(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    os._exit(0)  # past the interpreter's end, as in zero_ranks.py
