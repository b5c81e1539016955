"""Preferences over a tiny model in plain torch, and hooks that keep what the loop says of them."""

from __future__ import annotations

from typing import Any

import tiny
import torch
import zero_cases

from cwpo_dist.config import TrainingConfig
from cwpo_dist.lm.modules import AnswerLogProbs
from cwpo_dist.lm.rows import collate
from cwpo_dist.training.loop import Hooks, Run
from cwpo_dist.training.tasks import Preference
from cwpo_dist.training.torch_engine import TorchEngine

ROWS = zero_cases.make_rows()
IDS = [f"pair{i}" for i in range(len(ROWS))]
WEIGHTS = [0.1 + 0.9 * i / len(ROWS) for i in range(len(ROWS))]


def make_config(**changes: Any) -> TrainingConfig:
    given = {"learning_rate": 0.05, "max_steps": 4, "global_batch_size": 8, "optim": "sgd"}
    return TrainingConfig(**(given | {"lr_scheduler_type": "constant"} | changes))


def make_run(budget: int = 10**6, **changes: Any) -> Run:
    return Run(make_config(max_tokens_per_micro_batch=budget, **changes), 3, "shared", 2)


def make_engine(config: TrainingConfig | None = None, seed: int = 0) -> TorchEngine:
    model = tiny.tiny_causal_lm("llama", seed, tie_word_embeddings=True)
    return TorchEngine(AnswerLogProbs(model), config or make_config())


def make_task(normalization: str = "none", **changes: Any) -> Preference:
    """Preferences whose reference is the untrained model of seed 0.

    `dataset`: with weights as `weigh` leaves them then, divided by their mean.
    """
    with torch.no_grad():
        logps = make_engine().module(collate(ROWS, "shared", 2)).view(-1, 2).tolist()
    given = {
        "rows": ROWS,
        "pair_ids": IDS,
        "weights": WEIGHTS,
        "references": logps,
        "loss_type": "sigmoid",
        "beta": 0.5,
        "normalization": "batch" if normalization == "batch" else "none",
    }
    given |= changes
    if normalization == "dataset":
        mean = sum(given["weights"]) / len(given["weights"])
        given["weights"] = [weight / mean for weight in given["weights"]]
    return Preference(**given)


class Record(Hooks):
    """Keeps what the loop says; stops where told to."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.records: list[dict[str, float]] = []
        self.saves: list[int] = []
        self.steps: list[int] = []
        self.stop_at = stop_at

    def before_step(self, step: int) -> None:
        self.steps.append(step)

    def wants_stop(self) -> bool:
        return self.steps[-1:] == [self.stop_at]

    def log(self, record: dict[str, float]) -> None:
        self.records.append(record)

    def save(self, step: int) -> None:
        self.saves.append(step)
