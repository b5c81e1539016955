"""Counted pairs and answers, token lengths, model sizes in; what a stage costs, roughly, out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from cwpo_dist.config import AlignConfig, Config, TrainingConfig
from cwpo_dist.graph import STAGES
from cwpo_dist.lm.batches import total_steps
from cwpo_dist.objectives import OBJECTIVES
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.placement import Machine, gpus, uses_gpu
from cwpo_dist.planning.memory import (
    Memory,
    by_zero_stage,
    data_memory,
    generating_memory,
    scoring_memory,
    training_memory,
)
from cwpo_dist.runs.checks import Checked
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node
from cwpo_dist.runs.sizes import ModelSize
from cwpo_dist.runs.stage import Generating, Scoring, Training, Work
from cwpo_dist.storage import Store

Kind = Literal["train", "score", "generate"]

# Of the rate of a large matrix product, what a transformer reaches: on CPUs as the comparisons of
# REPRODUCTION.md took their time, on GPUs, where nothing was measured, as is usual.
UTILISATION: dict[str, dict[Kind, float]] = {
    "cpu": {"train": 0.6, "score": 0.5, "generate": 0.1},
    "cuda": {"train": 0.4, "score": 0.5, "generate": 0.1},
}
START_S: dict[Kind, float] = {
    "train": 30.0,
    "score": 10.0,
    "generate": 10.0,
}  # actors, workers, models
TOLD_BYTES = 2**27  # data of fewer are not worth a line


@dataclass(frozen=True)
class AnswerLengths:
    """The prompts and answers of the sampled pairs, each once, in one model's tokens.

    Attributes:
        fits: the share of the answers that fits `max_length` with its prompt.
        prompt: mean tokens of a prompt; none of one whose answers do not fit.
        answer: mean tokens of an answer; none of one that does not fit.
    """

    fits: float
    prompt: float
    answer: float

    def tokens(self, prompts: int, answers: int) -> float:
        """Of so many prompts and their answers: all that fit, a prompt once for its answers."""
        return prompts * self.prompt + answers * self.answer


@dataclass(frozen=True)
class Lengths:
    """The sampled pairs in one model's tokens: what trainings read.

    Attributes:
        fits: the share that fits `max_length`.
        shared: mean tokens of a row that fits: the prompt once and both answers.
        longest: mean tokens of prompt and longer answer.
        answers: mean tokens of both answers.
        each: of their prompts and answers, each once: what scoring reads.
    """

    fits: float
    shared: float
    longest: float
    answers: float
    each: AnswerLengths


@dataclass(frozen=True)
class Cost:
    """What one stage output takes.

    Attributes:
        work: in words.
        tokens: that go through a model.
        flops: floating-point operations.
        kind: of work, which decides how close it comes to the machine's rate.
        side_by_side: workers or actors that share it.
        memory: bytes of one of them; of each of its GPUs, where it has several.
        at_least: that is not all of it: a part is unknown, as `details` say.
        details: of a training stage's memory, a line each.
    """

    work: str
    tokens: int = 0
    flops: float = 0.0
    kind: Kind = "score"
    side_by_side: int = 1
    memory: int | None = None
    at_least: bool = False
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """Numbers of pairs, answers, tokens and parameters, put together stage by stage.

    Attributes:
        config: the run.
        counted: what its sources hold.
        checked: its models.
        lengths: of what each of these reads.
        foreseen: what of it earlier outputs will have said, as `Context` has it.
    """

    config: Config
    counted: Census
    checked: Checked
    lengths: Mapping[str, Lengths]
    foreseen: dict[str, set[str]] = field(default_factory=dict)

    def work(self, node: Node) -> Work:
        """What there is to do for one stage output."""
        context = Context(Store(self.config.output_dir), self.foreseen)
        return STAGES[node.stage].work(context, node, self.counted)

    def cost(self, work: Work) -> Cost:
        """What that takes."""
        match work:
            case Scoring():
                return self._scoring(work)
            case Training():
                return self._training(work)
            case Generating():
                return self._generating(work)
            case _:
                return Cost(work.text)

    def trained_on(self, work: Training) -> int:
        """The pairs of a training: those that fit its model."""
        return round(round(work.pairs * self.lengths[named(work.model)].fits) * work.kept)

    def _scoring(self, work: Scoring) -> Cost:
        size, each = self.checked.sizes[named(work.model)], self.lengths[named(work.model)].each
        tokens = round(each.tokens(work.prompts, work.answers))
        flops, by = _flops(size, tokens, work.answers * each.answer), work.by
        batch, there = by.section.max_tokens_per_batch, gpus(self.checked.machines)
        on_gpu = there > 0 if by.workers is None else uses_gpu(by.workers, there)
        memory = scoring_memory(size, batch, by.workers, on_gpu=on_gpu)
        return Cost(work.text, tokens, flops, "score", by.number, memory)

    def _generating(self, work: Generating) -> Cost:
        size, tokens = self.checked.sizes[named(work.model)], work.prompts * work.new_tokens
        return Cost(
            work.text,
            tokens,
            2.0 * (size.matmul + size.head) * tokens,
            "generate",
            work.pool.most_actors,
            generating_memory(
                size,
                min(work.prompts, work.together),
                work.longest,
                work.pool.fewest_gpus,
                on_gpu=gpus(self.checked.machines) > 0,
            ),
        )

    def _training(self, work: Training) -> Cost:
        training, pairs = work.training, self.trained_on(work)
        size, lengths = self.checked.sizes[named(work.model)], self.lengths[named(work.model)]
        if work.chosen_alone:
            lengths = replace(lengths, shared=lengths.longest, answers=lengths.answers / 2)
        data = data_memory(pairs, pairs * lengths.shared)
        if work.prompts and pairs:
            lengths = together(lengths, work, pairs)
        steps = total_steps(training, pairs)
        epochs, rest = divmod(steps, max(1, -(-pairs // training.global_batch_size)))
        seen = epochs * pairs + min(pairs, rest * training.global_batch_size)
        tokens = round(seen * lengths.shared)
        # A forward pass; a backward one of twice that, half of it for weights that LoRA freezes;
        # and another forward pass where activations are computed again, and where a loss looks
        # ahead at all outputs of a step.
        passes = (3 if training.lora is None else 2) + training.gradient_checkpointing
        passes += _looks_ahead(training)
        kind = "LoRA" if training.lora is not None else "full"
        memory, details = self._needs(training, size)
        if data.node >= TOLD_BYTES:
            details = (
                *details,
                f"and up to {_gib(data.node)} GiB of token ids on each node's disk (TMPDIR), which "
                f"its workers read together, with {_gib(data.worker)} GiB of memory in each",
            )
        text = f"{pairs:,} pairs, {steps:,} steps of {training.global_batch_size} ({kind})"
        if work.sampled and training.max_steps <= 0:  # of C nothing is known
            text += " at most; times the mean confidence"
        return Cost(
            text,
            tokens,
            passes * _flops(size, tokens, seen * lengths.answers),
            "train",
            training.max_workers,
            memory.total,
            memory.activations is None,
            details,
        )

    def _needs(self, training: TrainingConfig, size: ModelSize) -> tuple[Memory, tuple[str, ...]]:
        """Bytes of a worker, and what to know of them."""
        on_gpu = uses_gpu(training, gpus(self.checked.machines))
        memory = training_memory(training, size, on_gpu=on_gpu)
        known = {name: held for name, held in memory.parts().items() if held is not None}
        parts = ", ".join(f"{name} {_gib(held)}" for name, held in known.items())
        by_stage = by_zero_stage(training, size, on_gpu=on_gpu)
        stages, totals = " / ".join(map(str, by_stage)), [_gib(m.total) for m in by_stage.values()]
        trained = size.of(training)
        unknown = f"; its activations are unknown ({trained.unknown})" if trained.unknown else ""
        lines = (
            f"{size.parameters / 1e6:,.1f} M parameters, {trained.parameters / 1e6:,.1f} M of them "
            f"trained; a worker holds {parts} GiB{unknown}",
            *_shared(training, size),
            f"under ZeRO {stages} (num_workers {training.min_workers}): {' / '.join(totals)} GiB",
        )
        return memory, lines


def _shared(training: TrainingConfig, size: ModelSize) -> Iterator[str]:
    """How workers share micro-batches, where they do."""
    shared, heads = training.sequence_parallel_size, size.attention_heads
    if shared > 1:
        yield (
            f"sequence_parallel_size {shared}: {training.min_workers} workers are "
            f"{training.min_workers // shared} x {shared}, of which {shared} share a micro-batch: "
            f"1/{shared} of its tokens and {heads // shared} of {heads} attention heads "
            "each"
        )


def _looks_ahead(training: TrainingConfig) -> bool:
    return isinstance(training, AlignConfig) and OBJECTIVES[training.loss_type].looks_ahead


def together(lengths: Lengths, work: Training, pairs: int) -> Lengths:
    """About how many tokens a pair takes where those of a prompt lie side by side in an epoch.

    A prompt of n pairs touches 1 + (n − 1) / B batches of B in the mean, in each of which its
    answers are computed once. What is cut further, for a micro-batch or for ranks, is not counted.

    Args:
        lengths: of pairs by themselves.
        work: with the prompts and answers of its pairs.
        pairs: those that are trained on.
    """
    batches = 1 + max(0.0, pairs / work.prompts - 1) / work.training.global_batch_size
    every = batches * lengths.each.tokens(work.prompts, work.answers)
    answers = batches * work.answers * lengths.each.answer
    return replace(
        lengths,
        shared=min(lengths.shared, every / pairs),
        answers=min(lengths.answers, answers / pairs),
    )


def named(field: str | None) -> str:
    """The field of a model that work reads."""
    assert field is not None, "its stage says which"
    return field


def _flops(size: ModelSize, tokens: float, of_answers: float) -> float:
    """Of one forward pass over so many tokens: only those of answers reach the output layer."""
    return 2.0 * (size.matmul * tokens + size.head * of_answers)


class Rates:
    """How fast this machine multiplies, measured once; nothing is known of others."""

    def __init__(self, machines: Sequence[Machine]) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.utilisation = UTILISATION[device.type]
        known = device.type == "cuda" or not gpus(machines)
        self.flops = measured_rate(device) if known else None

    def seconds(self, cost: Cost) -> float | None:
        """About how long a stage takes here; None for a cluster whose GPUs we cannot ask."""
        if not cost.flops:
            return 0.0
        if self.flops is None:
            return None
        rate = self.flops * self.utilisation[cost.kind] * cost.side_by_side
        return START_S[cost.kind] + cost.flops / rate


def measured_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product, in the precision used there; one thread on a CPU."""
    on_gpu = device.type == "cuda"
    size, number = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    matrix = torch.randn(size, size, device=device, dtype=number)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = min(timed(device, lambda: matrix @ matrix) for _ in range(5))
    finally:
        torch.set_num_threads(threads)
    return float(2 * size**3 / best)


def timed(device: torch.device, act: Callable[[], object]) -> float:
    """Seconds until the device is done with it."""
    _wait(device)
    started = time.perf_counter()
    act()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f}"
