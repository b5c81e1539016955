"""A model's sizes and a training's settings in; the bytes that one worker holds, part by part, out.

The constants are of DeepSpeed's ZeRO and of stock Hugging Face decoders under autograd;
`benchmarks/memory.py` holds them against what a worker on CPU really takes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from cwpo_dist.config import TrainingConfig
from cwpo_dist.scoring.placement import Machine
from cwpo_dist.stages.checks import ModelSize

# Autograd keeps about the inputs and outputs of a layer's linear maps: of norms, of attention and
# of the activation function there are few more. In numbers a token, over their sum.
KEPT = 1.1
IMPORTS = 2**30  # what torch, transformers, deepspeed and Ray take in a process, in bytes
# Of GPUs by Ray's names for them; the smallest where one name has several sizes.
GPU_GIB = {
    "T4": 15,
    "V100": 16,
    "A10G": 22,
    "L4": 22,
    "L40S": 44,
    "A100-40G": 39,
    "A100-80G": 79,
    "H100": 79,
    "H200": 140,
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker.

    Attributes:
        weights: of the model, whole under ZeRO 0 to 2.
        gradients: of what is trained.
        optimizer: AdamW's moments, and the fp32 copy of the weights that ZeRO keeps.
        activations: of a full micro-batch.
        update: the gradients once more, as ZeRO flattens them for a step, when no activations are
            held.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    update: int

    @property
    def total(self) -> int:
        """At the peak."""
        held = self.weights + self.gradients + self.optimizer
        return held + max(self.activations, self.update)

    def parts(self) -> dict[str, int]:
        """Those that a reader knows, by name."""
        return {name: held for name, held in asdict(self).items() if name != "update"}


def training_memory(training: TrainingConfig, size: ModelSize, number: int) -> Memory:
    """What one worker of a training stage holds at its peak, about.

    Args:
        training: its settings.
        size: of its model.
        number: bytes of a weight, 4 or 2.
    """
    trained, workers, zero = size.trained(training), training.min_workers, training.zero_stage
    adapter = trained if training.lora is not None else 0
    shard = trained / (workers if zero >= 1 else 1)
    return Memory(
        weights=round(number * (size.parameters + adapter) / (workers if zero >= 3 else 1)),
        gradients=round(number * trained / (workers if zero >= 2 else 1)),
        optimizer=round(4 * shard * (3 if zero >= 1 else 2)),
        activations=round(
            training.max_tokens_per_micro_batch * activation_bytes(training, size, number)
        ),
        update=round(4 * shard) if zero >= 1 else 0,
    )


def activation_bytes(training: TrainingConfig, size: ModelSize, number: int) -> float:
    """Bytes of activations a token of a micro-batch."""
    kept = KEPT * sum(size.linear)
    if training.gradient_checkpointing:
        kept = kept / size.layers + size.layers * size.width
    return number * kept


def by_zero_stage(training: TrainingConfig, size: ModelSize, number: int) -> tuple[Memory, ...]:
    """The same under ZeRO 0, 1, 2 and 3."""
    stages = (training.model_copy(update={"zero_stage": stage}) for stage in range(4))
    return tuple(training_memory(stage, size, number) for stage in stages)


def largest_budget(training: TrainingConfig, size: ModelSize, number: int, room: int) -> int:
    """The largest `max_tokens_per_micro_batch` that fits in so many bytes, about; 0: none does."""
    empty = training.model_copy(update={"max_tokens_per_micro_batch": 0})
    needs = training_memory(empty, size, number)
    if needs.total > room:
        return 0
    return int((room - needs.total + needs.update) / activation_bytes(training, size, number))


def room(training: TrainingConfig, machines: Sequence[Machine], on_gpu: bool) -> int | None:
    """Bytes of one worker's device: its GPU, or its share of a node; None where nobody knows."""
    if not on_gpu:
        return min((_share_of_node(training, machine) for machine in machines), default=None)
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    kinds = {name for machine in machines for name in machine.resources or {}}
    known = [size for name, size in GPU_GIB.items() if f"accelerator_type:{name}" in kinds]
    return min(known) * 2**30 if known else None


def _share_of_node(training: TrainingConfig, machine: Machine) -> int:
    """What is left of a node's memory for each worker, when as many work there as have place."""
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    whole = (machine.resources or {}).get("memory", here)
    workers = min(training.min_workers, max(1, int(machine.cpus / training.cpus_per_worker)))
    return int(whole / workers) - IMPORTS
