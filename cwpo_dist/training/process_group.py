"""The process group of all ranks, as Ray Train sets it up, and handlers of signals in each of them.

Ray Train's controller imports this file too, before it starts any rank: what else a rank needs is
imported by the ranks alone.
"""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig

from cwpo_dist.stop_signals import STOP_SIGNALS

told_to_stop = threading.Event()  # set by signal handlers, and by the driver's word


@dataclass
class StoppableTorchConfig(TorchConfig):
    """Ray's process group set-up, and signal handlers in each rank."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """What Ray calls on its way."""
        return _Backend


_TorchBackend: Any = TorchConfig().backend_cls  # its class has no public name


class _Backend(_TorchBackend):  # type: ignore[misc]  # of a type that only Ray knows
    def on_training_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Handlers can be set in a process's main thread alone; training runs in another."""
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(_handle_stop_signals)


def _handle_stop_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: told_to_stop.set())
