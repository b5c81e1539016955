"""A model's sizes and a training's settings in; the bytes that one worker holds, part by part, out.

What Python and its libraries take is not counted. `benchmarks/memory.py` measures what a worker
takes beside what is said here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from cwpo_dist.config import TrainingConfig
from cwpo_dist.config.deepspeed import said, zero_stage
from cwpo_dist.config.training import BUCKET_NUMBERS
from cwpo_dist.lm.vocabulary import KEPT_NUMBERS
from cwpo_dist.runs.sizes import ModelSize

# Of ZeRO-3, by default: so many numbers of gathered weights stay until they are used again.
LIVE_NUMBERS = 10**9
# On the host glibc holds on to what is freed between two live blocks: about half of the activations
# once more, as measured. CUDA's allocator is taken to use all of it again (not measured).
RETAINED = {False: 1.5, True: 1.0}  # by whether it is on GPUs
NUMBER_BYTES = {False: 4, True: 2}  # of a weight or activation, by the same: fp32 or bf16
FEWEST = {False: 0, True: 1}  # the lowest ZeRO stage, by whether it is on GPUs, in bf16
TOKEN_BYTES = 4  # of the file that a node's workers map
PAIR_BYTES = 100  # of that file: id, places, lengths, weight, log-probs of the reference
OWN_PAIR_BYTES = 64  # of each worker: the order of an epoch, and what is held while it is drawn


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker.

    Attributes:
        weights: of the model, whole under ZeRO 0 to 2; a shard, and those gathered, under ZeRO 3.
        gradients: of what is trained, and a bucket of them on its way.
        optimizer: AdamW's moments, and the fp32 copy of the weights that ZeRO keeps.
        activations: of a full micro-batch; None: not known, and 0 in the total.
        update: the gradients once more, as ZeRO flattens them for a step, when no activations are
            held.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    update: int

    @property
    def total(self) -> int:
        """At the peak; at least so much where activations are not known."""
        held = self.weights + self.gradients + self.optimizer
        return held + max(self.activations or 0, self.update)

    def parts(self) -> dict[str, int | None]:
        """Those that a reader knows, by name."""
        return {name: held for name, held in asdict(self).items() if name != "update"}


def training_memory(training: TrainingConfig, size: ModelSize, *, on_gpu: bool) -> Memory:
    """What one worker of a training stage holds at its peak, about.

    Args:
        training: its settings.
        size: of its model.
        on_gpu: in bf16 there, whose gradients are summed in fp32, else in fp32.
    """
    number, trained, workers = NUMBER_BYTES[on_gpu], size.of(training), training.min_workers
    asked = zero_stage(said(training.deepspeed_section()), training.zero_stage)
    zero = max(asked, FEWEST[on_gpu])
    changed = trained.parameters
    weights = size.parameters + (changed if training.lora is not None else 0)
    held = weights / workers + min(size.parameters, LIVE_NUMBERS) if zero >= 3 else weights
    shard = changed / (workers if zero >= 1 else 1)
    bucket = min(BUCKET_NUMBERS, changed) if zero >= 1 else 0
    kept = activations(training, size, on_gpu=on_gpu)
    return Memory(
        weights=round(number * held),
        gradients=round(4 * changed / (workers if zero >= 2 else 1) + number * bucket),
        optimizer=round(4 * shard * (3 if zero >= 1 else 2)),
        activations=None if kept is None else round(kept * RETAINED[on_gpu]),
        update=round(4 * shard) if zero >= 1 else 0,
    )


def activations(training: TrainingConfig, size: ModelSize, *, on_gpu: bool) -> float | None:
    """Bytes that a worker keeps of a full micro-batch for its backward pass; None: not known."""
    trained, layers, number = size.of(training), max(1, size.layers), NUMBER_BYTES[on_gpu]
    if trained.kept is None:
        return None
    kept = trained.kept.half_bytes if on_gpu else number * trained.kept.numbers
    copied = float(number * trained.copied)
    if training.gradient_checkpointing:
        kept, copied = kept / layers + number * layers * size.width, copied / layers
    tokens = training.max_tokens_per_micro_batch / training.sequence_parallel_size
    return tokens * kept + copied + 4 * min(KEPT_NUMBERS, tokens * size.words)  # logits are fp32


def by_zero_stage(training: TrainingConfig, size: ModelSize, *, on_gpu: bool) -> dict[int, Memory]:
    """The same under each ZeRO stage that there is: 0 cannot sum gradients of bf16 in fp32."""
    return {
        stage: training_memory(
            training.model_copy(update={"zero_stage": stage, "deepspeed": None}),
            size,
            on_gpu=on_gpu,
        )
        for stage in range(FEWEST[on_gpu], 4)
    }


def scoring_memory(
    size: ModelSize, tokens: int, workers: TrainingConfig | None, *, on_gpu: bool
) -> int:
    """Bytes of an actor with a model of its own, or of a worker that shares one, in one pass.

    The weights, whole or a share and those gathered, and the hidden states of all tokens.
    """
    held = size.parameters
    if workers is not None:
        held = held // workers.min_workers + min(held, LIVE_NUMBERS)
    return NUMBER_BYTES[on_gpu] * (held + 4 * tokens * size.width)


def generating_memory(
    size: ModelSize, prompts: int, tokens: int, parts: int, *, on_gpu: bool
) -> int:
    """Bytes of a device, of `parts` that hold a policy which answers prompts of so many tokens.

    The weights, keys and values of all tokens, with the answers, and one row of logits a prompt.
    """
    number = NUMBER_BYTES[on_gpu] * (size.parameters + prompts * tokens * size.cached)
    return number // parts + 4 * prompts * size.words


@dataclass(frozen=True)
class DataMemory:
    """Bytes that the data of a training take.

    Attributes:
        node: of a node's disk, and at most as many of its page cache, which its workers share.
        worker: of each worker's own memory.
    """

    node: int
    worker: int


def data_memory(pairs: int, tokens: float) -> DataMemory:
    """Of so many pairs with so many tokens in all; at most, as what repeats may be stored once."""
    return DataMemory(round(PAIR_BYTES * pairs + TOKEN_BYTES * tokens), OWN_PAIR_BYTES * pairs)
