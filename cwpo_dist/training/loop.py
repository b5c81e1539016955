"""A task, an engine and a start step in; optimizer steps, log records and checkpoints out.

The one training loop of `fit`, `sft` and `align`. It knows neither Ray nor DeepSpeed. What a step
computes depends on (seed, step) alone: world size and micro-batches change only who computes it.

Shapes: P = rows of a micro-batch or global batch, K = answers a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cwpo_dist.config import TrainingConfig
from cwpo_dist.lm.batches import global_batch, steps_per_epoch, total_steps
from cwpo_dist.lm.feeding import moved
from cwpo_dist.lm.flops import UsefulFlops
from cwpo_dist.lm.recompute import recompute
from cwpo_dist.lm.rows import Layout, Row, RowBatch
from cwpo_dist.lm.sequence import SequenceGroup
from cwpo_dist.stop_signals import Preempted
from cwpo_dist.training.meter import Meter
from cwpo_dist.training.micro_batches import Limits, MicroBatch, fed, next_pass
from cwpo_dist.training.optim import learning_rates
from cwpo_dist.training.shards import Share
from cwpo_dist.training.tasks import Indices, Task


class NonFiniteLoss(ArithmeticError):
    """The loss or gradient of a step is NaN or infinite; the last checkpoint stays good."""


class Engine(Protocol):
    """A module, its optimizer, and the ranks that share them.

    Attributes:
        module: rows in, one number per answer out.
        device: where batches go.
        rank: of this process.
        world_size: how many ranks there are.
        state_keys: names of the optimizer's state per parameter.
        replicated: whether each rank keeps all of every parameter and state.
        sequence: the ranks with which this one shares its micro-batches.
    """

    module: nn.Module
    device: torch.device
    rank: int
    world_size: int
    state_keys: tuple[str, ...]
    replicated: bool
    sequence: SequenceGroup

    def forward(self, batch: RowBatch) -> Tensor:
        """One number an answer [A], in the order of the rows."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the loss's gradient, averaged over ranks; `last` on a step's last micro-step."""

    def step(self, learning_rate: float) -> float:
        """Clips, updates, forgets gradients; returns the gradient norm before clipping."""

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over ranks of a small float64 tensor, on the CPU: here the host waits."""

    def shares(self, key: str | None) -> Iterator[Share]:
        """What this rank keeps of each trainable fp32 parameter (key None) or of its state."""

    def publish(self) -> None:
        """Tells the module of parameters that were written into `shares`; a collective."""

    def start_at(self, step: int) -> None:
        """Tells the optimizer that its state has seen `step` updates."""


@dataclass(frozen=True)
class Run:
    """What one run of the loop is told beside task and engine.

    Attributes:
        config: schedule, batch, logging.
        seed: of order and dropout.
        layout: how pairs are laid out for the model.
        pad_id: the tokenizer's pad.
        flops: what a forward pass costs, for the log; None: not said.
        longest_shared: tokens of a row that several pairs share, at most, under a dense mask.
    """

    config: TrainingConfig
    seed: int
    layout: Layout
    pad_id: int
    flops: UsefulFlops | None = None
    longest_shared: float = math.inf

    @property
    def limits(self) -> Limits:
        """Of a micro-batch."""
        return Limits(self.layout, self.config.max_tokens_per_micro_batch, self.longest_shared)


class Hooks:
    """What surrounds the loop; the base class does nothing."""

    def before_step(self, step: int) -> None:
        """Called before each step: a sign of life."""

    def wants_stop(self) -> bool:
        """True on a rank that was told to stop; one suffices for all to stop."""
        return False

    def wants_poll(self) -> bool:
        """True on a rank that wants all ranks to call `poll` after this step."""
        return False

    def poll(self) -> bool:
        """Called on all ranks together; True asks for a checkpoint now."""
        return False

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out numbers after `step` steps, every `eval_steps`; called on all ranks together."""
        return {}

    def log(self, record: dict[str, float]) -> None:
        """Takes the numbers of a step; called on rank 0."""

    def save(self, step: int) -> None:
        """Makes a checkpoint after `step` steps; called on all ranks."""


def train(task: Task, engine: Engine, run: Run, hooks: Hooks, start_step: int = 0) -> None:
    """Trains from `start_step` to the end; a checkpoint every `save_steps` and at the end.

    Args:
        task: rows and their loss.
        engine: of all ranks, restored to `start_step`.
        run: what is told beside these.
        hooks: of this rank.
        start_step: how many steps are done.

    Raises:
        NonFiniteLoss: naming step and pairs; no update was made with it.
        Preempted: when a rank was told to stop; a checkpoint has been made.
    """
    total = total_steps(run.config, task.order.drawn)
    rate = learning_rates(run.config, total)
    meter = Meter(engine.device, engine.world_size, run.flops, run.config.lora is not None)
    batches = (_rows_of(task, run, step) for step in range(start_step, total))
    feed = fed(task, engine, run, batches, 1 + task.looks_ahead)
    for step in range(start_step, total):
        hooks.before_step(step)
        meter.start()
        result = gradients(task, engine, run, step, _rows_of(task, run, step), feed, hooks, meter)
        grad_norm = engine.step(rate(step))
        meter.mark("optimizer")
        if not math.isfinite(grad_norm):
            raise NonFiniteLoss(
                f"step {step + 1}: gradient norm {grad_norm} over pairs "
                f"{_names(task, result.indices)}; the last checkpoint stays good: lower the "
                "learning rate, or look at these pairs"
            )
        meter.add(len(result.indices), result.rows, result.useful_tokens, result.padded_tokens)
        done = step + 1
        judged = _due(run.config.eval_steps, done, total)
        if judged or _due(run.config.logging_steps, done, total):
            epoch = done / steps_per_epoch(task.order.drawn, run.config.global_batch_size)
            record = {"step": done, "total_steps": total, "epoch": epoch, "loss": result.loss}
            record |= {"grad_norm": grad_norm, "learning_rate": rate(step), **meter.read()}
            record |= task.metrics(result.outputs_PK, result.indices)
            record |= hooks.evaluate(done) if judged else {}
            meter.begin()
            if engine.rank == 0:
                hooks.log(record)
        if not task.looks_ahead:
            task.learn(result.outputs_PK, result.indices)
        _checkpoint(run, hooks, result, done, total)


@dataclass(frozen=True)
class StepResult:
    """What all ranks know after the forward and backward passes of one step.

    Attributes:
        indices: rows of the global batch.
        outputs_PK: float64 outputs of all its rows, whichever rank computed them.
        rows: that went through the model for them.
        loss: of the global batch.
        useful_tokens: over all ranks.
        padded_tokens: over all ranks.
        stop: a rank was told to stop.
        poll: a rank asks all to poll.
    """

    indices: list[int]
    outputs_PK: Tensor
    rows: list[Row]
    loss: float
    useful_tokens: float
    padded_tokens: float
    stop: bool = False
    poll: bool = False


def gradients(
    task: Task,
    engine: Engine,
    run: Run,
    step: int,
    indices: list[int],
    feed: Iterator[MicroBatch] | None = None,
    hooks: Hooks | None = None,
    meter: Meter | None = None,
) -> StepResult:
    """Forward and backward over one global batch: leaves its gradient in the engine.

    Args:
        task: rows and their loss.
        engine: of all ranks.
        run: layout, budget, seed.
        step: from 0; with the seed and the rank it decides dropout.
        indices: rows of the global batch, the same on all ranks.
        feed: of `fed`, where its micro-batches come next; None: they are laid out now.
        hooks: asked whether this rank wants all to stop or to poll; None: it never does.
        meter: told when each part ends; None: nothing is measured.

    Raises:
        NonFiniteLoss: on all ranks alike.
    """
    hooks, meter = hooks or Hooks(), meter or Meter()
    feed = feed or fed(task, engine, run, [indices], 1 + task.looks_ahead)
    denominator = task.denominator(indices)
    shape = len(indices), *task.outputs
    if task.looks_ahead:
        task.learn(_ahead(engine, run, step, feed, shape), indices)
        meter.mark("forward")
    outputs_PK = torch.zeros(shape, dtype=torch.float64, device=engine.device)
    useful_tokens, padded_tokens = 0.0, 0
    for micro in next_pass(feed):
        meter.mark("data")
        output_PK = _forward(engine, run, step, micro)
        loss_P = task.losses(output_PK, [indices[p] for p in micro.positions])
        # DeepSpeed averages over ranks, hence × world size: ranks that share a sequence have each a
        # part of its gradient. A pad is a finite row times 0.
        loss = (loss_P.sum() * (micro.weight * engine.world_size)) / denominator
        meter.mark("forward")
        engine.backward(loss, last=micro.last)
        meter.mark("backward")
        micro.tell(output_PK, outputs_PK)
        useful_tokens += micro.batch.useful_tokens * micro.weight
        padded_tokens += micro.batch.padded_tokens
    told = hooks.wants_stop(), hooks.wants_poll(), useful_tokens, padded_tokens
    numbers = moved(torch.tensor(told, dtype=torch.float64), engine.device)
    # Each pair is told by one rank and is 0 on the others: the sum tells all of them all.
    summed = engine.total(torch.cat([numbers, outputs_PK.flatten()]))
    meter.mark("communication")
    outputs_PK = summed[4:].reshape(shape)
    return StepResult(
        indices=indices,
        outputs_PK=outputs_PK,
        rows=micro.step_rows,
        loss=finite_loss(task, step, indices, outputs_PK) / denominator,
        useful_tokens=float(summed[2]),
        padded_tokens=float(summed[3]),
        stop=bool(summed[0]),
        poll=bool(summed[1]),
    )


def _forward(engine: Engine, run: Run, step: int, micro: MicroBatch) -> Tensor:
    """Outputs [P, K], with the dropout of this micro-batch."""
    torch.manual_seed(_dropout_seed(run.seed, step, engine.rank, micro.number))
    recompute(engine.module, on=run.config.gradient_checkpointing or micro.over_budget)
    return micro.by_pair(engine.forward(micro.batch.to(engine.device)))


@torch.no_grad()
def _ahead(
    engine: Engine, run: Run, step: int, feed: Iterator[MicroBatch], shape: tuple[int, ...]
) -> Tensor:
    """The outputs that a step is about to compute, float64 [P, K]; a collective."""
    outputs_PK = torch.zeros(shape, dtype=torch.float64, device=engine.device)
    for micro in next_pass(feed):
        output_PK = _forward(engine, run, step, micro)
        micro.tell(output_PK, outputs_PK)
    return engine.total(outputs_PK.flatten()).reshape(shape)


def _rows_of(task: Task, run: Run, step: int) -> list[int]:
    _, rows = global_batch(task.order, run.config.global_batch_size, run.seed, step)
    return list(map(int, rows))


def finite_loss(task: Task, step: int, indices: Indices, outputs_PK: Tensor) -> float:
    """Σ weight·ℓ of the global batch, not yet divided.

    Args:
        task: whose losses they are.
        step: from 0, for the message.
        indices: rows of the global batch.
        outputs_PK: theirs, [P, K].

    Raises:
        NonFiniteLoss: naming step and pairs, on all ranks alike, as all know all outputs.
    """
    loss_P = task.losses(outputs_PK, indices)
    finite_P = torch.isfinite(loss_P) & torch.isfinite(outputs_PK).flatten(1).all(dim=1)
    if not bool(finite_P.all()):
        bad = [indices[p] for p in torch.nonzero(~finite_P).flatten().tolist()]
        raise NonFiniteLoss(
            f"step {step + 1}: the loss is not finite for {len(bad)} of {len(indices)} pairs "
            f"({_names(task, bad)}); the last checkpoint stays good: lower the learning rate, or "
            "look at these pairs"
        )
    return float(loss_P.sum())


def _due(every: int | None, done: int, total: int) -> bool:
    """Whether what happens every so many steps happens now; at the end always, if ever."""
    return every is not None and (done % every == 0 or done == total)


def _checkpoint(run: Run, hooks: Hooks, result: StepResult, done: int, total: int) -> None:
    due = done % run.config.save_steps == 0 or done == total or result.stop
    if result.poll:
        due = hooks.poll() or due  # every rank polls
    if due:
        hooks.save(done)
    if result.stop and done < total:
        raise Preempted(f"told to stop: checkpoint at step {done} of {total}; a rerun resumes")


def _names(task: Task, indices: Indices, most: int = 8) -> str:
    names = ", ".join(task.pair_ids[i] for i in indices[:most])
    return names + (", …" if len(indices) > most else "")


def _dropout_seed(seed: int, step: int, rank: int, micro_step: int) -> int:
    state = np.random.SeedSequence([seed, step, rank, micro_step]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))  # torch takes 63 bits
