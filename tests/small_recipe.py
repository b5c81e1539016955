"""A run directory in; prepare, tokens, scores, weights and a training there, in this process.

All code is the project's, over a real `Store`. What stands in for a cluster: tasks run one after
the other, scores come of texts by arithmetic, and the one rank of a training is this process.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from tiny import save_tiny

from cwpo_dist import node_disk
from cwpo_dist.config import Config
from cwpo_dist.config.load import parse_config
from cwpo_dist.execution import run
from cwpo_dist.graph import nodes_until
from cwpo_dist.pairs import cutting, pieces, sources
from cwpo_dist.pairs.records import REJECT_SCHEMA, SCORE_SCHEMA, Score, table_of
from cwpo_dist.runs import scored_by
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node
from cwpo_dist.scoring.answers_in import Answers, AnswersIn
from cwpo_dist.scoring.driver import run_here
from cwpo_dist.scoring.pipeline import ShardJob
from cwpo_dist.scoring.retries import ShardOutput
from cwpo_dist.stages import annotate, prepare
from cwpo_dist.storage import Store
from cwpo_dist.training import group, rank, rank_hooks
from cwpo_dist.training.lease import LeaseToken

UNREADABLE = "prompt 7 of file 1"  # fails whenever it is scored, and is set aside
STEPS = 4


def write_inputs(folder: Path) -> None:
    """Two files of pairs, with copies and bad rows among them, and tiny models."""
    folder.mkdir(parents=True)
    for number in range(2):
        rows: list[dict[str, Any]] = [
            {
                "prompt": f"prompt {i} of file {number}",
                "response_a": f"yes {i * 37 % 11}",
                "response_b": f"no {i * 17 % 7}",
                "label": "ab"[i % 2],
            }
            for i in range(16)
        ]
        rows += [rows[3], {"prompt": "no answers"}]
        lines = (json.dumps(row) + "\n" for row in rows)
        (folder / f"pairs-{number}.jsonl").write_text("".join(lines))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    save_tiny(folder / "policy", "llama", **small)
    save_tiny(folder / "reward", "llama", **small)  # known by its files, never loaded


def configured(inputs: Path, output_dir: str) -> Config:
    """The recipe's configuration."""
    return parse_config(
        {
            "output_dir": output_dir,
            "arms": ["cw"],
            "prepare": {
                "sources": [{"path": str(inputs / f"pairs-{n}.jsonl")} for n in range(2)],
                "rows_per_shard": 8,
                "test_fraction": 0.2,
                "labelled_fraction": 0.2,
                "max_reject_fraction": 0.2,
            },
            "annotate": {
                "model": {"model_name_or_path": str(inputs / "reward"), "max_length": 128},
                "max_reject_fraction": 0.2,
            },
            "policy": {
                "model_name_or_path": str(inputs / "policy"),
                "max_length": 128,
                "attn_implementation": "eager",
            },
            "sft": None,
            "align": {
                "loss_type": "simpo",
                "beta": 2.0,
                "learning_rate": 0.01,
                "warmup_steps": 0,
                "lora": None,
                "global_batch_size": 4,
                "max_steps": STEPS,
                "save_steps": 1,
                "zero_stage": 0,
                "report_to": [],
                "use_gpu": False,
            },
        }
    )


class PlainWorker:
    """Scores a text by its checksum; fails on one prompt."""

    def __init__(self, answers: AnswersIn, name: str) -> None:
        self.answers, self.name = answers, name

    def read(self, index: int) -> Answers:
        return self.answers.read(index)

    def __call__(self, index: int, rows: Answers) -> ShardOutput:
        if any(row.given.prompt == UNREADABLE for row in rows):
            raise ValueError("unreadable")
        scores = [
            Score(
                row.name,
                self.name,
                zlib.crc32(f"{row.given.prompt} {row.given.answer}".encode()) / 2**31,
            )
            for row in rows
        ]
        counts = {"rows_in": len(rows), "rows": len(rows), "rejects": 0, "over_length": 0}
        table = table_of(scores, SCORE_SCHEMA)
        return ShardOutput(table, REJECT_SCHEMA.empty_table(), counts)


def stand_in_for_a_cluster() -> None:
    """Patches this process, for good: it is a child that ends with its run."""

    def each(task: Callable[[int], None], count: int, num_cpus: float) -> None:
        for index in range(count):
            task(index)

    def shards(job: ShardJob, *_: Any) -> dict[str, Any]:
        return run_here(job)

    def worker(answers: AnswersIn, model: Any, name: str, *_: Any, **__: Any) -> PlainWorker:
        return PlainWorker(answers, name)

    class OneRank:
        """In Ray Train's place: a group of one rank, in this process."""

        def __init__(self, spec: Any, token: LeaseToken) -> None:
            self.run = partial(rank.run_rank, spec, token)

        def fit(self) -> Any:
            return SimpleNamespace(return_value=self.run())

    def here(*_: Any) -> Any:
        return nullcontext()

    changes: list[tuple[Any, str, Any]] = [
        (prepare, "run_tasks", each),
        (prepare, "_check_placement", lambda _: None),
        (scored_by, "run_shards", shards),
        (annotate, "RewardWorker", worker),
        (group, "check_placement", lambda *_: None),
        (group, "_trainer", OneRank),
        (group, "_start_timeout", here),
        (group, "_stop_on_signal", here),
        (group, "_told_while_waiting", here),
        (rank, "get_device", lambda: torch.device("cpu")),
        (rank_hooks, "ASK_RAY_S", math.inf),  # there is no Ray, however slow the machine is
        (node_disk, "STILL_S", 1.0),  # a stopped driver's
        (run, "device", lambda: "cpu"),
        (run, "versions", dict),
        # Small inputs are cut as if they were large.
        (sources, "BUCKET_BYTES", 1000),
        (cutting, "JOIN_BYTES", 1),
        (cutting, "CUT_BYTES", 700),
        (pieces, "CHUNK_ROWS", 20),
    ]
    for module, name, value in changes:
        assert hasattr(module, name), (module, name)
        setattr(module, name, value)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def nodes(config: Config) -> dict[str, Node]:
    """What is made, in order."""
    return nodes_until(config, "cw", "align")


def drive(config: Config) -> None:
    """What `cwpo run` does with one arm, up to `align`."""
    context = Context(Store(config.output_dir))
    context.root.sweep()
    for node in nodes(config).values():
        run.execute(context, node)
