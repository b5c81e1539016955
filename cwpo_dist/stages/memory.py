"""A model's sizes and a training's settings in; the bytes that one worker holds, part by part, out.

It is what must be there, and so a lower bound: what DeepSpeed, autograd and the allocator take on
the way is not counted. `benchmarks/memory.py` measures what a worker takes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from cwpo_dist.config import TrainingConfig
from cwpo_dist.stages.checks import ModelSize

# Autograd keeps about the inputs and outputs of a layer's linear maps: of norms, of attention and
# of the activation function there are few more. In numbers a token, over their sum.
KEPT = 1.1


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
