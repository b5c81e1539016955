"""Steps and the marks between their parts in, speed, padding and where the time went out."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from typing import Literal

import torch

from cwpo_dist.lm.flops import UsefulFlops
from cwpo_dist.lm.rows import Row

Part = Literal["data", "forward", "backward", "communication", "optimizer"]
PARTS: tuple[Part, ...] = ("data", "forward", "backward", "communication", "optimizer")

# Dense bfloat16 FLOP/s of a GPU by words of its name, as its maker states them.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
}


class Meter:
    """Numbers of the steps since it was last read, of this rank's time and all ranks' work.

    A step's time is split at marks: what passes from one to the next is the part's that the next
    one names. On a GPU the marks are events in its stream, so that none makes the device wait.
    `communication` is what the loop itself waits for at the end of a step; what ZeRO sends within
    backward and optimizer counts there.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        world_size: int = 1,
        flops: UsefulFlops | None = None,
        lora: bool = False,
    ) -> None:
        """Starts to measure.

        Args:
            device: where the work is done.
            world_size: ranks that share it.
            flops: of the model's forward pass; None: not counted.
            lora: frozen weights have no gradient, so a backward pass costs one forward, not two.
        """
        self._device, self._world_size, self._flops = torch.device(device), world_size, flops
        self._passes = 2 if lora else 3
        self.begin()

    def start(self) -> None:
        """Marks the beginning of a step."""
        self._marks.append((None, self._now()))

    def mark(self, part: Part) -> None:
        """Marks the end of a part of a step."""
        self._marks.append((part, self._now()))

    def add(self, pairs: int, rows: list[Row], useful_tokens: float, padded_tokens: float) -> None:
        """Counts a step that is done.

        Args:
            pairs: of its global batch.
            rows: that went through the model for them.
            useful_tokens: over all ranks.
            padded_tokens: over all ranks.
        """
        self._steps += 1
        self._pairs += pairs
        self._useful += useful_tokens
        self._padded += padded_tokens
        if self._flops is not None:
            self._work += self._passes * self._flops.forward(rows)

    def read(self) -> dict[str, float]:
        """The numbers for a log record.

        `time/…` are seconds a step; `useful_flops_per_second` is of all ranks together, `mfu` its
        share of what they could do, on GPUs that are known.
        """
        seconds = time.perf_counter() - self._start
        rates = {
            "pairs_per_step": self._pairs / self._steps,
            "pairs_per_second": self._pairs / seconds,
            "tokens_per_second": self._useful / seconds,
            "padding": 1 - self._useful / self._padded,
        }
        if self._flops is not None:
            rates["useful_flops_per_second"] = self._work / seconds
            peak = peak_flops(self._device)
            if peak is not None:
                rates["mfu"] = self._work / seconds / (peak * self._world_size)
        spent = self._spent()
        return rates | {f"time/{part}": spent[part] / self._steps for part in PARTS}

    def begin(self) -> None:
        """Forgets what was, and measures from now on."""
        self._start = time.perf_counter()
        self._steps, self._pairs, self._useful, self._padded, self._work = 0, 0.0, 0.0, 0.0, 0.0
        self._marks: list[tuple[Part | None, float | torch.cuda.Event]] = []

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _spent(self) -> dict[str, float]:
        """Seconds of each part."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        spent: dict[str, float] = defaultdict(float)
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            if part is not None:
                spent[part] += _seconds(before, after)
        return spent


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s that a GPU's maker states; None for what is not in the table."""
    return named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak(name: str) -> float | None:
    """The same by the name that torch has; None also for a slice of a GPU (MIG)."""
    if re.search(r"\bMIG\b", name):
        return None
    found = (peak for words, peak in PEAK_FLOPS.items() if re.search(_all_of(words), name))
    return next(found, None)


def _all_of(words: str) -> str:
    """`H100 PCIe` is met by `NVIDIA H100 80GB PCIe` too; `L4` not by `L40`."""
    return "".join(rf"(?=.*\b{word}\b)" for word in words.split())


def _seconds(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    assert not isinstance(before, float)
    assert not isinstance(after, float)
    return float(before.elapsed_time(after)) / 1000
