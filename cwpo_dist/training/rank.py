"""What every rank does around its work: it notices hangs, and tells the driver how it ended.

A rank is one process of a group that trains a model, or applies a frozen one, together. Ray Train
starts the group, and starts it again when a rank fails; some ends are no failure, and no retry
would help: those are returned, not raised.
"""

from __future__ import annotations

import faulthandler
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypedDict, final

import torch
import torch.distributed as dist
from ray.train.torch import get_device

from cwpo_dist.config import TrainingConfig
from cwpo_dist.redaction import redacted
from cwpo_dist.stop_signals import Preempted
from cwpo_dist.training.checkpoint import CommitFailed
from cwpo_dist.training.lease import LeaseLost, LeaseToken
from cwpo_dist.training.loop import NonFiniteLoss

ENDS = (NonFiniteLoss, Preempted, LeaseLost)  # of all ranks alike; the driver raises them again


class Watchdog:
    """Ends the process, after dumping the stack of every thread, when no beat comes in time.

    It is a C thread of faulthandler's, so it works while a collective holds the GIL.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    def beat(self) -> None:
        """Starts the time anew."""
        # Descriptor 2, as Ray puts another object in the place of sys.stderr.
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=2)

    def end(self) -> None:
        """No further beat is expected."""
        faulthandler.cancel_dump_traceback_later()


class RankSpec(Protocol):
    """What a group does: `TrainSpec` or `FrozenSpec`."""

    @property
    def config(self) -> TrainingConfig:
        """Of the ranks."""
        ...

    def run(self, token: LeaseToken, device: torch.device, watchdog: Watchdog) -> dict[str, object]:
        """One rank's part; what rank 0 returns is the group's."""
        ...


@final
class Done(TypedDict):
    """A good end; a plain dictionary, as for a class Ray Train's controller would import us."""

    summary: dict[str, object]


@final
class Refusal(TypedDict):
    """An end that no retry would help: the name of one of ENDS, or `refused`, and what it says."""

    error: str
    message: str


def run_rank(spec: RankSpec, token: LeaseToken) -> Done | Refusal | None:
    """One rank, as Ray Train starts it; its process group is there already.

    Args:
        spec: what the group does.
        token: of the driver's lease.

    Returns:
        On rank 0 {summary}, or {error, message} where no retry would help.

    Raises:
        ValueError: for data, a model or settings that cannot be trained with, perhaps on this rank
            alone; the group that Ray starts next finds it noted, and ends at once.
    """
    # Ray Train shows what any library tells of itself; we show what is ours.
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("cwpo_dist").setLevel(logging.INFO)
    if (noted := refusal(token)) is not None:  # the group before could not even begin
        return noted
    device = get_device()
    try:
        if dist.get_rank() == 0:  # commits, and shuts out groups that are still alive elsewhere
            token = token.for_new_group(_devices(spec.config, device))
        with rank_process(spec.config, device) as watchdog:
            return {"summary": spec.run(token, device, watchdog)}
    except ENDS as error:
        return {"error": type(error).__name__, "message": str(error)}
    except CommitFailed:  # rank 0 says why
        return None
    except ValueError as error:  # the group must end, but once
        message = redacted(f"{type(error).__name__}: {error}")
        token.store.create_json(_refusal_name(token), {"error": "refused", "message": message})
        raise


@contextmanager
def rank_process(config: TrainingConfig, device: torch.device) -> Iterator[Watchdog]:
    """Within it this process works as a rank: with its threads, its device, and a watchdog."""
    watchdog = Watchdog(config.step_timeout_s)
    watchdog.beat()
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    if dist.get_rank() > 0:
        logging.getLogger("cwpo_dist").setLevel(logging.WARNING)  # rank 0 speaks for all
    try:
        yield watchdog
    finally:
        watchdog.end()


def refusal(token: LeaseToken) -> Refusal | None:
    """What an earlier group of this driver could not train with, if that is why it ended."""
    name = _refusal_name(token)
    return token.store.read_json(name) if token.store.exists(name) else None


def _refusal_name(token: LeaseToken) -> str:
    return f"lease/{token.epoch:06d}.refused"


def _devices(config: TrainingConfig, device: torch.device) -> float:
    """GPUs that the group holds, or CPUs where it uses none."""
    return dist.get_world_size() * (1.0 if device.type == "cuda" else config.cpus_per_worker)
