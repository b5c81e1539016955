"""A driver of its own for test_scoring_kills.py: `scoring_driver.py FOLDER OUTPUT RAY`.

It scores FOLDER/pairs with a real tiny model, slowly, and every shard leaves a mark when it begins.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from tiny import tiny_classifier, tiny_tokenizer

from cwpo_dist.config import ModelConfig, PoolConfig
from cwpo_dist.pairs.stored import pairs_of, whole_schema, write_pairs
from cwpo_dist.scoring.answers_in import Answers, AnswersIn
from cwpo_dist.scoring.driver import run_shards
from cwpo_dist.scoring.pipeline import ShardJob
from cwpo_dist.scoring.retries import ShardOutput, ShardWorker
from cwpo_dist.scoring.scorers import RewardWorker
from cwpo_dist.storage import Store

SHARDS = 16
ROWS = 40  # a shard; one of each three shards has a row that fails and one that is too long
POOL = PoolConfig(num_actors=2, cpus_per_actor=0.5)


class Marked(RewardWorker):
    """Marks the beginning of each shard with its number, process and driver; takes its time.

    None goes on while a file `held` lies beside the marks' folder.

    From shard `full_at` on its disk takes no more than small files: rejects, but not scores.
    """

    def __init__(self, marks: Path, driver: int, seconds: float, full_at: int, *args: Any) -> None:
        super().__init__(*args)
        self.marks, self.driver, self.seconds, self.full_at = marks, driver, seconds, full_at

    def __call__(self, index: int, rows: Answers) -> ShardOutput:
        (self.marks / f"{index}-{os.getpid()}-{self.driver}").touch()
        while held(self.marks).exists():
            time.sleep(0.05)
        time.sleep(self.seconds)
        output = super().__call__(index, rows)
        if index == self.full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2200, resource.RLIM_INFINITY))
        return output


def held(marks: Path) -> Path:
    """Where a file lies that holds all shards back."""
    return marks.with_name(f"{marks.name}-held")


def write_inputs(folder: Path) -> None:
    """A model, whose tokenizer knows a token that it does not, and pairs."""
    tiny_classifier("llama").save_pretrained(folder / "reward")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder / "reward")
    for index in range(SHARDS):
        rows = [
            {
                "pair_id": f"{index}-{i}",
                "prompt": f"Why {i}?",
                "response_a": f"a{index}",
                "response_b": "b",
            }
            for i in range(ROWS)
        ]
        if index % 3 == 0:
            rows[2]["response_a"], rows[4]["prompt"] = "a <new> word", "long " * 300
        table = pa.Table.from_pylist(rows, schema=whole_schema("text"))
        write_pairs(Store(str(folder)), index, pairs_of(table))


def make_job(folder: Path, output: str, seconds: float = 0.3, full_at: int = -1) -> ShardJob:
    """The answers of `folder` into `folder/output`; marks go beside it."""
    marks = folder / f"{output}-marks"
    marks.mkdir(exist_ok=True)
    model = ModelConfig(model_name_or_path=str(folder / "reward"), max_length=400)
    answers = AnswersIn(Store(str(folder)))
    worker = partial(_worker, marks, os.getpid(), seconds, full_at, answers, model, "tiny", 512)
    return ShardJob("scores", Store(str(folder / output)), SHARDS, worker)


def _worker(*args: Any) -> ShardWorker[Any]:
    return Marked(*args)


if __name__ == "__main__":
    ray.init(address=sys.argv[3])
    run_shards(make_job(Path(sys.argv[1]), sys.argv[2]), POOL)
