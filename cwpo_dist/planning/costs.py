"""Counted pairs, token lengths and model sizes in; what a stage costs, roughly, out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from cwpo_dist.config import Config, PoolConfig, TrainingConfig
from cwpo_dist.lm.batches import total_steps
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.records import pair_id
from cwpo_dist.placement import Machine
from cwpo_dist.planning.memory import (
    Memory,
    by_zero_stage,
    generating_memory,
    rows_memory,
    training_memory,
)
from cwpo_dist.runs.checks import Checked
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.graph import Node, ready_model, teacher_config
from cwpo_dist.runs.own_numbers import chosen
from cwpo_dist.runs.sizes import ModelSize
from cwpo_dist.stages.annotate import earlier_scores
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
TOLD_BYTES = 2**27  # token ids of fewer are not worth a line
LOOKED_UP = 64  # sampled pairs, each perhaps in a file of scores of its own


@dataclass(frozen=True)
class Lengths:
    """The sampled pairs in one model's tokens.

    Attributes:
        fits: the share that fits `max_length`.
        shared: mean tokens of a row that fits: the prompt once and both answers.
        longest: mean tokens of prompt and longer answer.
        answers: mean tokens of both answers.
    """

    fits: float
    shared: float
    longest: float
    answers: float


@dataclass(frozen=True)
class Cost:
    """What one stage output takes.

    Attributes:
        work: in words.
        tokens: that go through a model.
        flops: floating-point operations.
        kind: of work, which decides how close it comes to the machine's rate.
        side_by_side: workers or actors that share it.
        memory: bytes of one of them.
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
    """Numbers of pairs, tokens and parameters, put together stage by stage."""

    config: Config
    counted: Census
    checked: Checked
    lengths: Mapping[str, Lengths]

    def of(self, node: Node) -> Cost:
        """The cost of one stage output."""
        makers = {
            "prepare": self._prepare,
            "tokens": self._tokens,
            "fit": self._fit,
            "annotate": self._annotate,
            "sft": self._sft,
            "reference": self._log_probs,
            "weigh": self._weigh,
            "align": self._align,
            "generate": self._answers,
            "evaluate": self._evaluate,
            "implicit": self._implicit,
        }
        return makers[node.stage](node)

    def _prepare(self, node: Node) -> Cost:
        splits = ", ".join(f"{n:,} {name}" for name, n in sorted(self.counted.splits.items()))
        own = "".join(
            f"; {kind} of its own: {sum(found.values()):,} pairs"
            for kind, found in self.counted.own.items()
        )
        copies = f"; {self.counted.merged:,} copies merged" if self.counted.merged else ""
        return Cost(f"{splits}{copies}; {self.counted.rejects:,} set aside{own}")

    def _tokens(self, node: Node) -> Cost:
        return Cost(f"{sum(self.counted.splits.values()):,} pairs, tokenised once")

    def _weigh(self, node: Node) -> Cost:
        return Cost(f"{self._decided(node):,} pairs")

    def _evaluate(self, node: Node) -> Cost:
        split = self.config.evaluate.split
        return Cost(f"{self.counted.labelled_pairs(split):,} {split} pairs with a label")

    def _decided(self, node: Node) -> int:
        """The pairs of which an arm's labels say which answer is chosen."""
        labels, splits = node.settings["labels"], node.settings["splits"]
        counted = self.counted
        if labels == "own":
            return counted.own_pairs(chosen(node.settings["column"], counted.own), *splits)
        return counted.labelled_pairs(*splits) if labels == "human" else counted.pairs(*splits)

    def trained_on(self, node: Node) -> int:
        """The pairs of a training stage: those that fit its model."""
        if node.stage == "fit":
            return self._fitting("weak", self.counted.pairs("labelled"))
        if node.stage == "sft":
            return self._fitting(node.of, self._decided(node))
        weigh = node.inputs["weigh"]
        kept: float = weigh.settings["top_fraction"] or 1.0
        return round(self._fitting(node.of, self._decided(weigh)) * kept)

    def _fit(self, node: Node) -> Cost:
        size, pairs = self.checked.sizes["weak"], self.trained_on(node)
        return self._training(self.config.fit, size, pairs, self.lengths["weak"])

    def _config(self, node: Node) -> Config:
        """The run as the node sees it, whose policy may be the weak model."""
        return self.config if node.of == "policy" else teacher_config(self.config)

    def _implicit(self, node: Node) -> Cost:
        return Cost(f"{self.counted.pairs(*self.config.annotate.scored_splits()):,} pairs")

    def _sft(self, node: Node) -> Cost:
        sft = self._config(node).sft
        assert sft is not None, "graph() makes no sft node without its section"
        both = self.lengths[node.of]
        chosen = replace(both, shared=both.longest, answers=both.answers / 2)
        return self._training(sft, self.checked.sizes[node.of], self.trained_on(node), chosen)

    def _align(self, node: Node) -> Cost:
        sizes, lengths = self.checked.sizes[node.of], self.lengths[node.of]
        align = self._config(node).align
        cost = self._training(align, sizes, self.trained_on(node), lengths)
        if node.settings["sampling"] and align.max_steps <= 0:  # of C nothing is known
            return replace(cost, work=f"{cost.work} at most; times the mean confidence")
        return cost

    def _annotate(self, node: Node) -> Cost:
        field = "weak" if "fit" in node.inputs else ready_model(self.config, node)[0]
        pairs = self.counted.pairs(*self.config.annotate.scored_splits())
        before = min(pairs, self._scored_before(node))
        cost = self._scoring(field, pairs - before, self.config.annotate)
        if not before:
            return cost
        return replace(cost, work=f"{pairs:,} pairs, about {before:,} of them scored before")

    def _scored_before(self, node: Node) -> int:
        """Pairs whose scores lie in this run directory already, by a look-up of sampled ones."""
        context = Context(self.config, Store(self.config.output_dir))
        earlier = earlier_scores(context, node)
        if not earlier.files or context.done(node):
            return 0
        ids = sorted(pair_id(p.prompt, p.first, p.second, p.tools) for p in self.counted.sample)
        ids = ids[:LOOKED_UP]  # ids are hashes: the first are as good as any, and lie close by
        found = int(earlier.of(ids).num_rows)
        return round(found / len(ids) * sum(self.counted.splits.values()))

    def _log_probs(self, node: Node) -> Cost:
        pairs = self.counted.pairs(*node.settings["splits"])
        return self._scoring(node.of, pairs, self.config.reference)

    def _answers(self, node: Node) -> Cost:
        evaluate, size = self.config.evaluate, self.checked.sizes["policy"]
        assert self.config.policy is not None, "graph() makes no such node without a policy"
        prompts = min(evaluate.num_prompts, self.counted.pairs(evaluate.split))
        tokens = prompts * evaluate.max_new_tokens
        return Cost(
            f"{prompts:,} prompts, at most {evaluate.max_new_tokens} new tokens each",
            tokens,
            2.0 * (size.matmul + size.head) * tokens,
            "generate",
            evaluate.most_actors,
            generating_memory(
                size,
                min(prompts, evaluate.generation_batch_size),
                self.config.policy.max_length + evaluate.max_new_tokens,
                on_gpu=gpus(self.checked.machines) > 0,
            ),
        )

    def _fitting(self, field: str, pairs: int) -> int:
        return round(pairs * self.lengths[field].fits)

    def _scoring(self, field: str, pairs: int, pool: PoolConfig) -> Cost:
        size, length = self.checked.sizes[field], self.lengths[field]
        tokens = round(self._fitting(field, pairs) * length.shared)
        each = self._number_bytes
        held = each * (size.parameters + 4 * pool.max_tokens_per_batch * size.width)
        flops = tokens * _flops(size, length)
        return Cost(f"{pairs:,} pairs", tokens, flops, "score", pool.most_actors, held)

    def _training(
        self, training: TrainingConfig, size: ModelSize, pairs: int, lengths: Lengths
    ) -> Cost:
        steps = total_steps(training, pairs)
        seen = min(steps * training.global_batch_size, pairs * training.num_train_epochs)
        tokens = round(seen * lengths.shared)
        # A forward pass; a backward one of twice that, half of it for weights that LoRA freezes;
        # and another forward pass where activations are computed again.
        passes = (3 if training.lora is None else 2) + training.gradient_checkpointing
        kind = "LoRA" if training.lora is not None else "full"
        memory, details = self._needs(training, size)
        if (rows := rows_memory(pairs * lengths.shared)) >= TOLD_BYTES:
            details = (*details, f"and {_gib(rows)} GiB of token ids, on the host")
        return Cost(
            f"{pairs:,} pairs, {steps:,} steps of {training.global_batch_size} ({kind})",
            tokens,
            passes * tokens * _flops(size, lengths),
            "train",
            training.max_workers,
            memory.total,
            memory.activations is None,
            details,
        )

    def _needs(self, training: TrainingConfig, size: ModelSize) -> tuple[Memory, tuple[str, ...]]:
        """Bytes of a worker, and what to know of them."""
        on_gpu = training.use_gpu is not False and gpus(self.checked.machines) > 0
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
            f"under ZeRO {stages} (num_workers {training.min_workers}): {' / '.join(totals)} GiB",
        )
        return memory, lines

    @property
    def _number_bytes(self) -> int:
        return 2 if gpus(self.checked.machines) else 4


def _flops(size: ModelSize, lengths: Lengths) -> float:
    """Of one forward pass, a token: only answer tokens reach the output layer."""
    return 2.0 * (size.matmul + size.head * lengths.answers / lengths.shared)


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


def gpus(machines: Sequence[Machine]) -> float:
    """GPUs of all nodes."""
    return sum(machine.gpus for machine in machines)
