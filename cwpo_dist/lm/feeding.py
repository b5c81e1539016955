"""What the host lays out in; the same, made ahead of a device and moved there without a wait, out.

A GPU works through a queue. The host must stay ahead of it: whatever reads a value back, or copies
from memory that the system may move, waits for all that is queued, and the device then stands idle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
_OWN_MEMORY = frozenset({"cpu", "meta"})  # devices to which nothing is copied


def pinned(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host in memory that a GPU copies by itself; as it is for any other device."""
    copied = tensor.device.type == "cpu" and torch.device(device).type not in _OWN_MEMORY
    return tensor.pin_memory() if copied else tensor


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device; the host does not wait until it is there."""
    return pinned(tensor, device).to(device, non_blocking=True)


def placed(numbers: Sequence[Any] | NDArray[Any], outputs: Tensor) -> Tensor:
    """Numbers of the host where a model's outputs are, and of their type."""
    return moved(torch.as_tensor(np.array(numbers), dtype=outputs.dtype), outputs.device)


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before is in use.

    The thread ends with the loop. What making an item raises is raised where it would be used.
    """
    making, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, making, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, making, end)
            yield item  # type: ignore[misc]  # it is no end
