"""A training section and the machines there are in; what its workers would refuse, out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from functools import cache

import ray
import torch
from ray.exceptions import GetTimeoutError

from cwpo_dist.config import ConfigError, ModelConfig, Tracker, TrainingConfig
from cwpo_dist.lm.load_settings import dtype_of
from cwpo_dist.placement import Machine, gpus, uses_gpu
from cwpo_dist.training.tracking import missing

logger = logging.getLogger(__name__)

ANSWER_S = 60.0  # of a worker on the cluster; later ones will say the same


def setting_faults(
    name: str, training: TrainingConfig, model: ModelConfig | None, machines: Sequence[Machine]
) -> Iterator[str]:
    """Trackers that are not there, schedules that cannot be, what DeepSpeed would refuse."""
    yield from (f"{name}.report_to: {fault}" for fault in _missing(tuple(training.report_to)))
    if model is not None:
        yield from deepspeed_faults(name, training, model, machines)
    if training.max_steps == 0:
        yield f"{name}.max_steps: 0 trains nothing; give -1 for whole epochs, or a number of steps"
    if 0 < training.max_steps <= training.warmup_steps:
        yield (
            f"{name}.warmup_steps: {training.warmup_steps} of {training.max_steps} max_steps never "
            "reaches the learning rate; lower it"
        )


def _missing(trackers: tuple[Tracker, ...]) -> list[str]:
    """What trackers lack where the training's workers will be."""
    if not ray.is_initialized():
        return missing(trackers)
    asked = ray.remote(num_cpus=0)(missing).remote(trackers)
    try:
        found: list[str] = ray.get(asked, timeout=ANSWER_S)
    except GetTimeoutError:  # a training does not wait for trackers either
        return []
    return found


def deepspeed_faults(
    name: str, training: TrainingConfig, model: ModelConfig, machines: Sequence[Machine]
) -> Iterator[str]:
    """What a worker would refuse, or a file that is not there; else what is not used is said."""
    if training.deepspeed is None:
        return
    dtype = dtype_of(model, "cuda" if uses_gpu(training, gpus(machines)) else "cpu")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it says at length that it takes it
    # Seconds to import, and seldom needed.
    from cwpo_dist.training.deepspeed_settings import deepspeed_config, unused

    try:
        deepspeed_config(training, dtype)
    except ConfigError as error:
        yield from (f"{name}.{line}" for line in str(error).splitlines())
        return
    if idle := unused(training, dtype):
        _say_once(f"{name}.deepspeed: not used here: {idle}")


@cache
def _say_once(line: str) -> None:
    """A comparison checks many trials of the same sections."""
    logger.warning("%s", line)
