"""A training section and a precision in; DeepSpeed's settings out, or each reason why not.

What a section may say is DeepSpeed's own knowledge: its configuration is built from the section,
which remembers what it was asked for. `plan` calls this just as ranks do.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Set
from functools import cache

import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cwpo_dist.config import ConfigError, TrainingConfig
from cwpo_dist.config.deepspeed import (
    AUTO,
    BFLOAT16,
    COMPARED,
    LOSS_SCALING,
    UNUSED,
    bf16_of,
    decides_weights,
    handed_on,
    inside,
    is_off,
    said,
    zero_stage,
)
from cwpo_dist.config.deepspeed_agreement import BATCH, PRECISIONS, SCHEDULES, contradictions
from cwpo_dist.config.training import BUCKET_NUMBERS

logger = logging.getLogger(__name__)
# It tells each configuration that it reads, and warns of old names that it takes all the same.
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

_COUNTERS = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
_READ_LATER = ("sequence_parallel_size", "data_parallel_size")  # by `deepspeed.initialize` alone
_READ_WHOLE = ("pipeline",)
_NO_MORE = {("aio", "thread_count")}  # older DeepSpeeds'; the documentation of transformers has it


def deepspeed_config(config: TrainingConfig, dtype: torch.dtype) -> dict[str, object]:
    """The DeepSpeed configuration: ours, with the user's section (or HF JSON) merged over it.

    Args:
        config: `zero_stage`, `max_grad_norm`, and `deepspeed`, a section or a JSON file whose
            `auto`s are left to us.
        dtype: of the model's weights.

    Raises:
        ConfigError: one line a fault: where the section contradicts other fields of ours, what
            DeepSpeed does not know or refuses, and what is not built here.
    """
    given, half = config.deepspeed_section(), dtype == torch.bfloat16
    faults = [*contradictions(given, config, half), *_refusals(given)]
    ours: dict[str, object] = _COUNTERS | {
        "gradient_clipping": config.max_grad_norm,
        "steps_per_print": 10**9,
        "bf16": {"enabled": half},
        "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": BUCKET_NUMBERS},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if half:  # gradients of many micro-batches are summed in fp32
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    merged = ours if faults else _merged(ours, handed_on(said(given)))
    faults = faults or [*_refusals_together(merged, half)]
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    if half and zero_stage(merged) == 0:
        logger.warning("zero_stage 0 cannot sum bfloat16 gradients in float32: stage 1 is used")
        merged = _merged(merged, {"zero_optimization": {"stage": 1}})
    return merged


def frozen_config(config: TrainingConfig, dtype: torch.dtype) -> dict[str, object]:
    """The same for a model that is only applied, under ZeRO-3.

    What changes numbers is left out: a reference's log-probs are the same, sharded or not.
    """
    settings = deepspeed_config(config, dtype)
    ours = {"bf16", "data_types", "zero_optimization"}
    for name in decides_weights(config.deepspeed_section()).keys() - ours:
        del settings[name]
    dropped = {"offload_optimizer", "cpu_offload"}  # there is no optimizer
    zero = {k: v for k, v in inside(settings, "zero_optimization").items() if k not in dropped}
    return settings | {"zero_optimization": zero | {"stage": 3}}


def _merged(ours: dict[str, object], theirs: Mapping[str, object]) -> dict[str, object]:
    merged = dict(ours)
    for name, value in theirs.items():
        inner = merged.get(name)
        if isinstance(value, dict) and isinstance(inner, dict):
            value = _merged(inner, value)
        merged[name] = value
    return merged


class _Watched(dict[str, object]):
    """A section that remembers what DeepSpeed asked it for; `auto` is as if it were not there."""

    def __init__(self, section: Mapping[str, object]) -> None:
        self.autos = {name for name, value in section.items() if value == AUTO}
        self.asked: set[str] = set()
        said = {name: value for name, value in section.items() if name not in self.autos}
        super().__init__({n: _Watched(v) if isinstance(v, Mapping) else v for n, v in said.items()})

    def get(self, name: str, default: object = None) -> object:
        self.asked.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> object:
        self.asked.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        """Only that it is ours: else `**section` would not come by `__getitem__`."""
        return super().__iter__()

    def unknown(self) -> Iterator[tuple[tuple[str, ...], object]]:
        """Where values stand that nothing asked for, and the values.

        A section that was asked for nothing was read by one of DeepSpeed's models, which refuse
        what they do not know, but never see an `auto`.
        """
        known = self.asked | _model_names()
        yield from (((name,), AUTO) for name in self.autos - known)
        for name, value in self.items():
            if self.asked and name not in self.asked:
                yield (name,), value
            elif isinstance(value, _Watched):
                yield from (((name, *path), inner) for path, inner in value.unknown())

    def names(self) -> set[str]:
        """All that was asked for, on any level."""
        below = (value.names() for value in self.values() if isinstance(value, _Watched))
        return self.asked.union(*below)


def _refusals(section: Mapping[str, object]) -> Iterator[str]:
    """What DeepSpeed does not know, or refuses, of each part of a section by itself."""
    for name, value in section.items():
        if name in PRECISIONS and isinstance(value, Mapping):
            rest = {n: v for n, v in value.items() if n not in LOSS_SCALING}
            yield from _refusals_of(name, rest)
        elif name not in (*PRECISIONS, *COMPARED, *_READ_LATER):
            yield from _refusals_of(name, value)


def _refusals_of(name: str, value: object) -> Iterator[str]:
    watched = _Watched(_COUNTERS | {name: value})
    off = is_off(said({name: value}).get(name))  # what DeepSpeed has no more, but nobody asks for
    try:
        DeepSpeedConfig(watched)
    except ValidationError as error:
        yield from (_as_told(name, value, fault) for fault in error.errors())
    # Its own kind, and what other shapes than it expects end in.
    except (DeepSpeedConfigError, ValueError, AssertionError, TypeError, AttributeError) as error:
        if not off:
            yield _says((name,), value, error)
    else:
        for path, inner in watched.unknown():
            if path not in _NO_MORE and (path[0] not in _READ_WHOLE or len(path) == 1):
                yield _unknown(path, inner, watched.names() | _model_names())


def _as_told(name: str, value: object, fault: ErrorDetails) -> str:
    """One fault of a section's part as pydantic found it, in DeepSpeed's models."""
    loc = tuple(map(str, fault["loc"]))
    path = loc if loc[:1] == (name,) else (name, *loc)
    if fault["type"] == "extra_forbidden":
        return _unknown(path, fault["input"], _model_names())
    return _says(path, fault["input"] if loc else value, fault["msg"])


def _refusals_together(merged: dict[str, object], half: bool) -> Iterator[str]:
    """What DeepSpeed refuses of parts that go well alone, some of it only when it starts."""
    summed_in = inside(merged, "data_types").get("grad_accum_dtype")
    if not half and zero_stage(merged) == 0 and summed_in in BFLOAT16:
        yield (
            f"deepspeed.data_types.grad_accum_dtype: {summed_in!r}: without ZeRO float32 weights "
            "have float32 gradients; remove it, or use zero_stage 1"
        )
    try:
        DeepSpeedConfig(merged)
    except (DeepSpeedConfigError, ValueError, AssertionError) as error:  # ValidationError is one
        yield f"deepspeed: DeepSpeed says: {' '.join(str(error).split())}; correct the section"


@cache
def _model_names() -> frozenset[str]:
    """The names of all fields that DeepSpeed has models for."""
    found: set[str] = set()
    models = [DeepSpeedConfigModel]
    while models:
        model = models.pop()
        models += model.__subclasses__()
        for name, field in model.model_fields.items():
            found |= {name, field.alias or name}
    return frozenset(found)


def _says(path: tuple[str, ...], value: object, message: object) -> str:
    text = " ".join(str(message).split())
    return (
        f"deepspeed.{'.'.join(path)}: {_short(value)}: DeepSpeed says: {text}; correct or remove it"
    )


def _unknown(path: tuple[str, ...], value: object, names: Set[str]) -> str:
    near = difflib.get_close_matches(path[-1], names, n=1, cutoff=0.75)
    hint = f" (but {near[0]})" if near else ""
    return (
        f"deepspeed.{'.'.join(path)}: {_short(value)}: DeepSpeed has no such field{hint}; "
        "correct or remove it"
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def unused(config: TrainingConfig, dtype: torch.dtype) -> str:
    """What a section says that has no effect here, and what decides in its place; one line.

    Args:
        config: whose section `deepspeed_config` takes.
        dtype: of the model's weights.
    """
    found: dict[str, list[str]] = {}  # by the reason
    section = said(config.deepspeed_section())
    for name, why in (*_idle(section), *_decided_elsewhere(section, config, dtype)):
        found.setdefault(why, []).append(name)
    return "; ".join(f"{', '.join(names)} ({why})" for why, names in found.items())


def _idle(section: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Each field that never has an effect here, and why."""
    yield from ((name, why) for name, why in UNUSED.items() if not is_off(section.get(name)))
    batch = (name for name in BATCH[1:] if name in section)
    yield from ((name, "max_tokens_per_micro_batch decides") for name in batch)
    for name in PRECISIONS:
        idle = sorted(LOSS_SCALING & inside(section, name).keys())
        yield from ((f"{name}.{part}", "nothing is float16 here") for part in idle)


def _decided_elsewhere(
    section: Mapping[str, object], config: TrainingConfig, dtype: torch.dtype
) -> Iterator[tuple[str, str]]:
    """Each field that says another thing than the setting that decides, and which that is."""
    kind = inside(section, "scheduler").get("type")
    if isinstance(kind, str) and SCHEDULES[kind] != config.lr_scheduler_type:
        yield f"scheduler.type {kind!r}", f"lr_scheduler_type decides, {config.lr_scheduler_type!r}"
    if dtype == torch.bfloat16 and bf16_of(section).get("enabled") is False:
        yield "bf16.enabled False", "torch_dtype decides, bfloat16"
