"""Follows a training by pairs that it does not train on, so that overfitting is seen while it runs.

A held-out task and the model in training in; its loss and metrics out, by TRL's names.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cwpo_dist.lm.recompute import start_training
from cwpo_dist.training.loop import Engine, Run, finite_loss
from cwpo_dist.training.micro_batches import fed
from cwpo_dist.training.tasks import Task

_OF_TRAINING = ("weight", "flipped")  # metrics that say nothing of what is held out
BATCH = 64  # rows at a time, over all ranks


def evaluate(
    task: Task, engine: Engine, run: Run, step: int, alive: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """`eval_loss` and `eval_…` of the task's metrics; a collective of all ranks.

    No gradient, no dropout, and no random number is drawn: training goes on as if it had not been.

    Args:
        task: what is held out; its weights are 1.
        engine: with the model as it is now.
        run: layout, pad, budget.
        step: after how many steps, for messages.
        alive: called after each batch: many pairs may take longer than any step.

    Raises:
        NonFiniteLoss: naming step and pairs.
    """
    every = list(range(len(task.rows)))
    outputs_NK = torch.zeros(len(every), *task.outputs, dtype=torch.float64, device=engine.device)
    engine.module.eval()
    with torch.no_grad():
        for start in range(0, len(every), BATCH):
            indices = every[start : start + BATCH]
            for micro in fed(task, engine, run, [indices]):
                output_PK = micro.by_pair(engine.forward(micro.batch.to(engine.device)))
                micro.tell(output_PK, outputs_NK[start : start + BATCH])
            alive()
    start_training(engine.module)
    outputs_NK = engine.total(outputs_NK.flatten()).reshape(outputs_NK.shape)
    if task.looks_ahead:
        task.learn(outputs_NK, every)
    loss = finite_loss(task, step - 1, every, outputs_NK) / task.denominator(every)
    metrics = {"loss": loss, **task.metrics(outputs_NK, every)}
    return {f"eval_{name}": value for name, value in metrics.items() if name not in _OF_TRAINING}
