"""The driver's side of a training: it has Ray Train start a group of ranks, again where one fails.

The way to the loop: `train` here, `run_rank` (rank.py) in each process that Ray Train starts,
`TrainSpec.run` (train_rank.py), `train` (loop.py).

The driver holds the stage's lease meanwhile. When a rank, node or network fails,
Ray starts the group again, up to `max_failures` times, and it resumes from the newest committed
checkpoint; with `num_workers: [min, max]` also with fewer workers, or with more when there is room
again. Our own checkpoints are the truth: `ray.train.report` is not called, as it is a barrier, and
what it reports is not yet durable when it returns.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import ray.train
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from cwpo_dist.canonical import digest
from cwpo_dist.config import ConfigError, TrainingConfig
from cwpo_dist.lm.fingerprints import model_fingerprint
from cwpo_dist.lm.identity import identify
from cwpo_dist.manifest import Manifest
from cwpo_dist.placement import alive_machines, in_words, training_faults, uses_gpu, worker_takes
from cwpo_dist.stop_signals import on_stop
from cwpo_dist.storage import MANIFEST, Store
from cwpo_dist.training.checkpoint import of_no_use
from cwpo_dist.training.frozen import FrozenSpec
from cwpo_dist.training.lease import Lease, LeaseToken
from cwpo_dist.training.process_group import StoppableTorchConfig
from cwpo_dist.training.rank import ENDS, Done, Refusal, refusal, run_rank
from cwpo_dist.training.train_rank import TrainSpec
from cwpo_dist.waiting import all_placed, told_while_waiting

__all__ = [
    "FrozenSpec",
    "TrainSpec",
    "TrainingFailed",
    "TrainingRefused",
    "apply_frozen",
    "check_placement",
    "train",
]

Spec = TrainSpec | FrozenSpec

logger = logging.getLogger(__name__)

# How long Ray waits for room for a group. Its 60 s are few where nodes are still to come.
# With `num_workers: [min, max]` it then looks again for how many there is room: what it asked for
# may have counted in a node that was lost.
START_TIMEOUT_S, ELASTIC_START_TIMEOUT_S = 600, 30
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
RESIZE_CHECK_S = 60.0  # how often Ray looks whether more of `num_workers: [min, max]` find room


class TrainingFailed(RuntimeError):
    """Ranks failed more often than `max_failures` allows, or Ray did; a rerun resumes."""


class TrainingRefused(ValueError):
    """Data, model or settings that cannot be trained with; the message is a rank's."""


def train(spec: TrainSpec) -> dict[str, object]:
    """Trains to the end; writes `model/`, `metrics.jsonl` and, for LoRA, `adapter/` in the store.

    A rerun after any kind of end resumes from the newest checkpoint.

    Returns:
        Numbers of the run: steps, rows, layout, the last log record, seconds of this command.

    Raises:
        ConfigError: when the cluster has no room for the ranks.
        LeaseHeld: while another driver trains this stage.
        Preempted: after SIGTERM or SIGUSR1; the same command resumes.
        NonFiniteLoss: naming step and pairs; the last good checkpoint stays.
        TrainingRefused: for data, a model or settings that cannot be trained with.
        TrainingFailed: when ranks failed too often.
    """
    started = time.monotonic()
    # Another node may hold a copy of the model with other times of modification.
    fingerprint = model_fingerprint(spec.model)
    known = spec.known or identify(spec.model, fingerprint)
    summary = _run(replace(spec, base=digest(fingerprint), known=known))
    return {**summary, "seconds": time.monotonic() - started}


def apply_frozen(spec: FrozenSpec) -> None:
    """Runs a group of ranks around a frozen model until its work is done.

    Raises:
        ConfigError, LeaseHeld, Preempted, TrainingRefused, TrainingFailed: as `train`.
    """
    _run(spec)


def _run(spec: Spec) -> dict[str, object]:
    """Has Ray run groups of ranks until one ends well; what its rank 0 returned."""
    config = spec.config.model_copy(update={"deepspeed": spec.config.deepspeed_section()})
    store = Store(spec.store.root) if spec.store.is_local else spec.store  # of no working folder
    spec = replace(spec, config=config, store=store)
    check_placement(spec.name, config)
    with Lease.acquire(store) as lease:
        token = lease.token
        # Another driver has finished it since we looked; but what is done may be scored again.
        if isinstance(spec, TrainSpec) and store.exists(MANIFEST):
            return dict(Manifest.read(store).counts)
        if token.epoch > 1:
            logger.info("%s: lease number %d", store.uri, token.epoch)
        try:
            with _start_timeout(config), _stop_on_signal(token), _told_while_waiting(spec, token):
                trained: Any = _trainer(spec, token).fit()  # Any: as of an older Ray's class
                outcome: Done | Refusal | None = trained.return_value
        except (TrainingFailedError, RayError) as error:  # RayError: the controller itself died
            outcome = refusal(token)
            if outcome is None:
                raise TrainingFailed(
                    f"{spec.name}: the workers, or Ray Train's controller, failed for good "
                    f"(max_failures = {config.max_failures}); what was committed stays, and the "
                    f"same command resumes.\n{error}"
                ) from error
        finally:
            with of_no_use(scratch := store.child("ray")):
                scratch.remove()
    assert outcome is not None  # only ranks of a group that failed return nothing
    if "error" in outcome:
        raise _KINDS.get(outcome["error"], TrainingRefused)(outcome["message"])
    return outcome["summary"]


def check_placement(name: str, config: TrainingConfig) -> None:
    """Returns when the cluster, as it is now, can hold all ranks (or the fewest) at once.

    Raises:
        ConfigError: naming what lacks; a KubeRay cluster that grows on demand is not refused.
    """
    for fault in training_faults(name, config, alive_machines()):
        raise ConfigError(fault)


def _gpus() -> float:
    """Of the cluster."""
    return float(ray.cluster_resources().get("GPU", 0))


def _trainer(spec: Spec, token: LeaseToken) -> TorchTrainer:
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths mean what they mean to the driver
    config, use_gpu = spec.config, uses_gpu(spec.config, _gpus())
    # Not as `train_loop_config`: the controller would import all that it names.
    each_rank: Callable[[], Any] = partial(run_rank, spec, token)
    scratch = spec.store.child("ray")  # Ray Train wants a folder, if only for a marker file
    return TorchTrainer(
        each_rank,
        torch_config=StoppableTorchConfig(
            backend="nccl" if use_gpu else "gloo",
            timeout_s=int(config.step_timeout_s) + 60,  # the watchdog comes first, with stacks
        ),
        scaling_config=_scaling(config),
        run_config=RunConfig(
            name=f"{spec.name}-{token.epoch}",
            storage_path=scratch.root,
            storage_filesystem=PyFileSystem(FSSpecHandler(scratch.filesystem)),
            failure_config=FailureConfig(max_failures=config.max_failures),
            **_quiet(),
        ),
    )


def _quiet() -> dict[str, Any]:
    """Ray Train's level of logging, where it has one: that ranks start is no news."""
    level = getattr(ray.train, "LoggingConfig", None)  # older Rays have none
    return {} if level is None else {"logging_config": level("WARNING")}


def _scaling(config: TrainingConfig) -> ScalingConfig:
    settings: dict[str, Any] = {  # Any: Ray shows type checkers an older class
        "num_workers": config.num_workers,
        "use_gpu": uses_gpu(config, _gpus()),
        "resources_per_worker": worker_takes(config, _gpus()),
    }
    if not isinstance(config.num_workers, int):
        settings["elastic_resize_monitor_interval_s"] = RESIZE_CHECK_S
    return ScalingConfig(**settings)


def _told_while_waiting(spec: Spec, token: LeaseToken) -> AbstractContextManager[None]:
    each, count = worker_takes(spec.config, _gpus()), spec.config.min_workers
    return told_while_waiting(
        f"{spec.name}.num_workers: {count} workers of {in_words(each)} each",
        {name: count * amount for name, amount in each.items()},
        "lower num_workers or cpus_per_worker",
        lambda: token.has_group() or all_placed(),
    )


@contextmanager
def _start_timeout(config: TrainingConfig) -> Iterator[None]:
    """Our patience with Ray's placement, unless the user's environment sets another."""
    if START_TIMEOUT in os.environ:
        yield
        return
    fixed = isinstance(config.num_workers, int)
    os.environ[START_TIMEOUT] = str(START_TIMEOUT_S if fixed else ELASTIC_START_TIMEOUT_S)
    try:
        yield
    finally:
        del os.environ[START_TIMEOUT]


def _stop_on_signal(token: LeaseToken) -> AbstractContextManager[None]:
    """SIGTERM or SIGUSR1 to the driver asks the ranks to checkpoint and end."""

    def ask(signal_name: str) -> bool:
        if not token.has_group():  # it waits for room, and has nothing to keep
            return False
        logger.warning("%s: asking workers to checkpoint and end", signal_name)
        token.ask_to_stop()
        return True

    return on_stop(ask)


_KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in ENDS}
