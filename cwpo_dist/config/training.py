"""Training: what `fit`, `sft` and `align` share, and what `sft` is told."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from cwpo_dist.config.base import Epochs, PositiveFloat, PositiveInt, Section
from cwpo_dist.config.deepspeed import decides_weights, read_section
from cwpo_dist.config.models import LoraConfig

Tracker = Literal["tensorboard", "mlflow", "wandb"]
BatchBy = Literal["pair", "prompt"]
_WHOLE: TypeAdapter[int] = TypeAdapter(PositiveInt)
BUCKET_NUMBERS = 2**24  # that DeepSpeed sends at once: 64 MiB in fp32; its 2 GB stall small devices


LearningRate = Annotated[
    float, Field(gt=0.0, description="of the optimizer, at the height of its schedule")
]
WarmupSteps = Annotated[
    int, Field(ge=0, description="steps in which the learning rate rises from 0; constant has none")
]
WeightDecay = Annotated[
    float,
    Field(ge=0, description="of AdamW, decoupled, of sgd L2; biases and norms have none; 0: none"),
]
Adapters = Annotated[
    LoraConfig | None,
    Field(description="adapters, trained alone (in `fit` with the head); null: all weights are"),
]
PairsAStep = Annotated[int, Field(gt=0, lt=2**63, description="pairs a step, over all workers")]


class TrainingConfig(Section):
    """What `fit`, `sft` and `align` share: schedule, batch, DeepSpeed and workers."""

    compute_fields: ClassVar[frozenset[str]] = frozenset(
        {
            "max_tokens_per_micro_batch",
            "gradient_checkpointing",
            "zero_stage",
            "deepspeed",
            "num_workers",
            "sequence_parallel_size",
            "use_gpu",
            "cpus_per_worker",
            "resources_per_worker",
            "save_steps",
            "save_minutes",
            "save_total_limit",
            "logging_steps",
            "report_to",
            "eval_steps",
            "eval_pairs",
            "max_failures",
            "step_timeout_s",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
        }
    )

    learning_rate: LearningRate
    num_train_epochs: Epochs = 1.0
    max_steps: int = Field(-1, description="stop after this many steps; -1: by num_train_epochs")
    global_batch_size: PairsAStep = 64
    per_device_train_batch_size: PositiveInt | None = Field(
        None,
        description="pairs, TRL's name: times gradient_accumulation_steps and num_workers it is "
        "global_batch_size; null: that is given",
    )
    gradient_accumulation_steps: PositiveInt | None = Field(
        None, description="see per_device_train_batch_size; null: 1"
    )
    max_tokens_per_micro_batch: PositiveInt = Field(
        4096,
        description="tokens, with any padding; a longer row goes alone, its activations recomputed",
    )
    optim: Literal["adamw", "sgd"] = Field(
        "adamw", description="AdamW with torch's betas, or gradient descent without momentum"
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine",
        description="how the learning rate goes on after its warm-up; the first two fall to 0",
    )
    warmup_steps: WarmupSteps = 0
    weight_decay: WeightDecay = 0.0
    max_grad_norm: PositiveFloat = Field(
        1.0, description="a step's gradient, all together, is cut to this length"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time"
    )
    lora: Adapters = None
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="what DeepSpeed divides among workers; 0: nothing, 1: the optimizer's state, "
        "2: also gradients, 3: also weights",
    )
    deepspeed: dict[str, object] | str | None = Field(
        None,
        description="a section, or a Hugging Face DeepSpeed JSON file, laid over ours; null: ours",
    )
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        1,
        description="workers: so many; [min, max]: as many as there is room for, fewer when nodes "
        "are lost, more when they come; the numbers stay the same, but for what dropout hides",
    )
    sequence_parallel_size: PositiveInt = Field(
        1,
        description="so many workers share each micro-batch, token by token, for pairs longer than "
        "one's memory; it divides num_workers and the model's attention heads; 1: none is shared",
    )
    use_gpu: bool | Literal["auto"] = Field(
        "auto", description="whether workers compute on GPUs; auto: when the cluster has some"
    )
    cpus_per_worker: PositiveFloat = Field(
        1.0, description="CPUs that one worker reserves, and threads with which it computes"
    )
    resources_per_worker: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="Ray resources of one worker, laid over its CPUs and GPU"
    )
    save_steps: PositiveInt = Field(
        100, description="a checkpoint every so many steps, and at the end"
    )
    save_minutes: PositiveFloat | None = Field(
        None, description="a checkpoint also when the last one is so many minutes old; null: no"
    )
    save_total_limit: PositiveInt = Field(2, description="checkpoints that are kept, the last ones")
    logging_steps: PositiveInt = Field(
        1, description="a line of metrics every so many steps, and at the end"
    )
    report_to: list[Tracker] = Field(
        ["tensorboard"], description="trackers; none: metrics.jsonl alone"
    )
    eval_steps: PositiveInt | None = Field(
        None, description="held-out loss and accuracy every so many steps; null: never"
    )
    eval_pairs: PositiveInt = Field(
        128,
        description="held-out pairs, of `validation`, else of evaluate.split; each time the same",
    )
    max_failures: Annotated[int, Field(ge=-1)] = Field(
        3, description="so often the workers are begun anew after a failure; -1: without end"
    )
    step_timeout_s: Annotated[PositiveFloat, Field(le=1e9)] = Field(  # what timers can count
        1800.0, description="seconds; no step for so long: stacks are dumped, the workers restarted"
    )

    @property
    def min_workers(self) -> int:
        """The fewest workers that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    def deepspeed_section(self) -> dict[str, object]:
        """The DeepSpeed section: as given, or read from the JSON file that it names.

        Raises:
            ConfigError: for a file that is missing or no JSON.
        """
        return read_section(self.deepspeed)

    def identity(self) -> dict[str, object]:
        """The settings that decide the weights, with what the DeepSpeed section adds to them.

        Raises:
            ConfigError: for a DeepSpeed file that is missing or no JSON.
        """
        added = decides_weights(self.deepspeed_section())
        return super().identity() | ({"deepspeed": added} if added else {})

    @model_validator(mode="after")
    def _workers_in_order(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers: {self.num_workers}; give [min, max], min first")
        shared = self.sequence_parallel_size
        if shared > 1 and (self.min_workers < self.max_workers or self.min_workers % shared):
            raise ValueError(
                f"num_workers: {self.num_workers}, of which sequence_parallel_size: {shared} share "
                f"each micro-batch; give one number that is a multiple of {shared}, or lower it"
            )
        return self

    @field_validator(
        "report_to",
        mode="before",
        json_schema_input_type=list[Tracker] | Tracker | Literal["none"] | None,
    )
    @classmethod
    def _one_or_none(cls, value: object) -> object:
        """`report_to: wandb` and `report_to: none` are how people write it."""
        if isinstance(value, str):
            return [] if value == "none" else [value]
        return value or []

    @model_validator(mode="before")
    @classmethod
    def _resolve_global_batch(cls, data: object) -> object:
        """TRL's per-device batch × accumulation × workers becomes one global batch, once."""
        if not isinstance(data, dict):
            return data
        if data.get("per_device_train_batch_size") is None:
            if data.get("gradient_accumulation_steps") is not None:
                raise ValueError(
                    "gradient_accumulation_steps is given without per_device_train_batch_size: "
                    "give both, or global_batch_size alone"
                )
            return data
        if isinstance(data.get("num_workers"), list | tuple):
            raise ValueError(
                "per_device_train_batch_size is given with num_workers [min, max], whose batch "
                "would change with the workers: give global_batch_size instead"
            )
        given = data.get("global_batch_size")
        each = (
            data["per_device_train_batch_size"],
            data.get("gradient_accumulation_steps") or 1,
            data.get("num_workers", 1),
        )
        try:
            total = math.prod(map(_WHOLE.validate_python, each))
            whole = total if given is None else _WHOLE.validate_python(given)
        except ValidationError:
            return data  # the field that is no number is refused by its own name
        if whole != total:
            raise ValueError(
                f"global_batch_size is {given}, but per_device_train_batch_size × "
                f"gradient_accumulation_steps × num_workers = {total}: give one of the two"
            )
        return {**data, "global_batch_size": total}


class SftConfig(TrainingConfig):
    """Supervised fine-tuning of the policy on the chosen answers (paper table 8)."""

    learning_rate: LearningRate = 1e-5
    num_train_epochs: Epochs = 3.0
    warmup_steps: WarmupSteps = 100
    weight_decay: WeightDecay = 0.05
    lora: Adapters = LoraConfig()
