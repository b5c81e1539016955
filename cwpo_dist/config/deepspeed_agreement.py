"""A DeepSpeed section and our own fields in; one line for each place where they contradict, out.

An equal value is taken, and so is `auto`, which leaves it to us.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from cwpo_dist.config.deepspeed import AUTO, REFUSED
from cwpo_dist.config.training import TrainingConfig

PRECISIONS = ("bf16", "bfloat16", "fp16")  # DeepSpeed's names, the old one among them
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# The schedules that a trainer fills in where a file says `auto`, and ours of the same shape.
SCHEDULES = {
    "WarmupLR": "constant_with_warmup",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}
# What torch's optimizers do here, by DeepSpeed's names; there are no fields of ours for it.
FIXED: Mapping[str, Mapping[str, object]] = {
    "adamw": {
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "amsgrad": False,
        "bias_correction": True,
        "adam_w_mode": True,
    },
    "sgd": {"momentum": 0, "dampening": 0, "nesterov": False},
}
HOW = {"torch_adam", "fused", "foreach"}  # an optimizer's parameters that change no number
OPTIMIZERS = {"adamw": {"adam", "adamw", AUTO}, "sgd": {"sgd", AUTO}}
_MISSING = object()


def contradictions(
    section: Mapping[str, object], config: TrainingConfig, half: bool
) -> Iterator[str]:
    """One line a fault: field, value, remedy.

    Args:
        section: as it was given.
        config: the training section that holds it.
        half: whether the weights will be bfloat16; else float32.
    """
    yield from _precision(section, half)
    yield from _batch(section, config)
    yield from _compared(section, {"gradient_clipping": "max_grad_norm"}, config)
    yield from _optimizer(section.get("optimizer", {}), config)
    yield from _scheduler(section.get("scheduler", {}), config)
    yield from _not_built(section)


def _precision(section: Mapping[str, object], half: bool) -> Iterator[str]:
    for name in PRECISIONS:
        value = section.get(name)
        if value in (None, AUTO):
            continue
        if not isinstance(value, Mapping):
            yield f"deepspeed.{name}: {value!r}; give a section, such as {{enabled: auto}}"
        elif value.get("enabled") is True and (name == "fp16" or not half):
            yield (
                f"deepspeed.{name}.enabled: True, but the weights will be "
                f"{'bfloat16' if half else 'float32'}; write 'auto', or set torch_dtype in the "
                "model's section (bfloat16 or float32; auto: bfloat16 on GPUs, float32 on CPUs)"
            )


def _batch(section: Mapping[str, object], config: TrainingConfig) -> Iterator[str]:
    """DeepSpeed completes its three numbers by each other; together they stand for one of ours."""
    given: dict[str, int] = {}
    for name in BATCH:
        number = section.get(name)
        if isinstance(number, int) and number >= 1:
            given[name] = number
        elif number not in (None, AUTO):
            yield f"deepspeed.{name}: {number!r}; give a whole number from 1, or 'auto'"
            return
    ours = {"train_batch_size": "global_batch_size"}
    if config.per_device_train_batch_size is not None:
        ours["train_micro_batch_size_per_gpu"] = "per_device_train_batch_size"
    if config.gradient_accumulation_steps is not None:
        ours["gradient_accumulation_steps"] = "gradient_accumulation_steps"
    yield from _compared(given, ours, config)
    if given.keys() == {BATCH[1]} and BATCH[2] not in section:  # as DeepSpeed reads it
        given[BATCH[2]] = config.gradient_accumulation_steps or 1
    yield from _accumulated(given.get(BATCH[1]), given.get(BATCH[2]), config)


def _accumulated(micro: int | None, steps: int | None, config: TrainingConfig) -> Iterator[str]:
    """Micro-batch × steps that sum it × ranks is our batch, or divides it where one is not told."""
    given = [number for number in (micro, steps) if number is not None]
    a_step = math.prod(given) * config.max_workers
    whole = len(given) == 2 and a_step == config.global_batch_size
    divides = len(given) == 1 and config.global_batch_size % a_step == 0
    if given and not (whole or divides):
        yield (
            f"deepspeed.train_micro_batch_size_per_gpu: {micro or 'auto'}, accumulated "
            f"{steps or 'auto'} times by num_workers {config.num_workers}, but global_batch_size "
            f"is {config.global_batch_size}; set that, and write 'auto' here"
        )


def _optimizer(optimizer: object, config: TrainingConfig) -> Iterator[str]:
    if optimizer in (None, AUTO):
        return
    typed = _typed(optimizer)
    if typed is None:
        yield f"deepspeed.optimizer: {optimizer!r}; give {{type: AdamW, params: {{lr: auto}}}}"
        return
    kind, params = typed
    if kind.lower() not in OPTIMIZERS[config.optim]:
        yield _differs("optimizer.type", kind, "optim", config.optim)
        return
    fields = {"lr": "learning_rate", "weight_decay": "weight_decay"}
    yield from _compared(params, fields, config, "optimizer.params.")
    rest = {name: value for name, value in params.items() if name not in {*fields, *HOW}}
    yield from _fixed(rest, FIXED[config.optim], "optimizer.params.")


def _scheduler(scheduler: object, config: TrainingConfig) -> Iterator[str]:
    """Its type is not compared: files that leave all else to the trainer have one, too."""
    if scheduler in (None, AUTO):
        return
    typed = _typed(scheduler)
    if typed is None:
        yield f"deepspeed.scheduler: {scheduler!r}; give {{type: WarmupLR, params: {{…: auto}}}}"
        return
    kind, params = typed
    if kind != AUTO and kind not in SCHEDULES:
        yield _differs("scheduler.type", kind, "lr_scheduler_type", config.lr_scheduler_type)
        return
    fields = {
        "warmup_num_steps": "warmup_steps",
        "warmup_max_lr": "learning_rate",
        "total_num_steps": "max_steps",
    }
    yield from _compared(params, fields, config, "scheduler.params.")
    fixed = {
        "warmup_min_lr": 0,
        "warmup_min_ratio": 0,
        "cos_min_ratio": 0,
        "warmup_type": "linear",
        "last_batch_iteration": -1,
    }
    rest = {name: value for name, value in params.items() if name not in fields}
    yield from _fixed(rest, fixed, "scheduler.params.")


def _typed(section: object) -> tuple[str, Mapping[str, object]] | None:
    """Type and parameters of what has the shape {type: str, params: {…}}, both optional."""
    if not isinstance(section, Mapping) or section.keys() - {"type", "params", "legacy_fusion"}:
        return None
    kind, params = section.get("type", AUTO), section.get("params", {})
    return (kind, params) if isinstance(kind, str) and isinstance(params, Mapping) else None


def _compared(
    section: Mapping[str, object],
    fields: Mapping[str, str],
    config: TrainingConfig,
    prefix: str = "",
) -> Iterator[str]:
    """What stands there otherwise than in a field of ours."""
    for name, field in fields.items():
        ours = getattr(config, field)
        if section.get(name, ours) not in (ours, AUTO):
            yield _differs(f"{prefix}{name}", section[name], field, ours)


def _differs(name: str, value: object, field: str, ours: object) -> str:
    return (
        f"deepspeed.{name}: {value!r}, but {field} is {ours!r}; set {field} to what it should be, "
        "and write 'auto' here"
    )


def _fixed(section: Mapping[str, object], ours: Mapping[str, object], prefix: str) -> Iterator[str]:
    """What stands there otherwise than it always is here."""
    for name, value in section.items():
        if name not in ours:
            yield (
                f"deepspeed.{prefix}{name}: {value!r}: there is no such parameter here, but "
                f"{', '.join(ours)}; remove it"
            )
        elif value not in (ours[name], AUTO):
            yield (
                f"deepspeed.{prefix}{name}: {value!r}, but it is {ours[name]!r} here; write 'auto'"
            )


def _not_built(section: Mapping[str, object]) -> Iterator[str]:
    for dotted, (taken, why) in REFUSED.items():
        value: object = section
        for name in dotted.split("."):
            value = value.get(name, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is not _MISSING and value not in (*taken, AUTO):
            yield f"deepspeed.{dotted}: {value!r} is not supported: {why}; remove it"
