"""A shard's rows through a worker: three tries, then bisected; rows that fail are set aside.

The output is one run over the rows that do not fail, so it is a function of the shard alone,
whatever went wrong on the way. Only what a row can be blamed for is tried again.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import pyarrow as pa
import torch

from cwpo_dist.pairs.records import REJECT_SCHEMA, Reject, table_of
from cwpo_dist.redaction import redacted
from cwpo_dist.scoring.tickets import BrokenDeviceError, ShardError

logger = logging.getLogger(__name__)

TRIES = 3
SUSPICIOUS = 8  # rows of a shard that all fail: no coincidence
# Never a row's fault: files and storage, host and device memory, a missing library.
_ENVIRONMENT = (OSError, MemoryError, ImportError, torch.OutOfMemoryError)
# How torch says, in plain RuntimeErrors, that a CPU is out of memory, and that a device is broken
# for good, so that every later row would be blamed for it.
_NO_MEMORY = ("DefaultCPUAllocator",)
_DEVICE_BROKEN = ("CUDA error", "CUBLAS_STATUS", "HIP error")
_LONGEST_REASON = 200
OF_EACH = "rejects: "  # begins the name of a count of rejects for one reason


T = TypeVar("T")


class Input(NamedTuple, Generic[T]):
    """A row of an input shard.

    Attributes:
        name: the id of the answer or pair whose output it becomes.
        position: its row in the shard's file, from 0.
        given: what the worker needs of it.
    """

    name: str
    position: int
    given: T


@dataclass(frozen=True)
class ShardOutput:
    """What one shard gives: rows, rows set aside, and counts that depend on its input alone."""

    rows: pa.Table
    rejects: pa.Table
    counts: Mapping[str, int]


class ShardWorker(Protocol[T]):
    """Does the work of a shard: expensive state in its constructor, one shard a call."""

    def read(self, index: int) -> Sequence[Input[T]]:
        """The rows of input shard `index`."""
        ...

    def __call__(self, index: int, rows: Sequence[Input[T]]) -> ShardOutput:
        """The output of any of the shard's rows, in their order."""
        ...


def attempt(
    worker: ShardWorker[T], index: int, source: str, suspicious: float = SUSPICIOUS
) -> ShardOutput:
    """Reads a shard and runs it through the worker; rows that make it fail are set aside.

    Args:
        worker: whose exceptions are a row's fault, unless they are the environment's.
        index: of the shard.
        source: the file that its rows came from, for the rejects.
        suspicious: where so many rows or more all fail, the rows are not to blame.

    Raises:
        BrokenDeviceError: when the device fails for good.
        ShardError: when memory fails, or every row, or all together but none alone.
        OSError: when storage fails.
    """
    rows = worker.read(index)
    for number in range(1, TRIES + 1):
        output = _try(worker, index, rows)
        if not isinstance(output, str):
            return output
        logger.warning("%s: try %d of %d failed: %s", source, number, TRIES, output)
    failing = _bisect(worker, index, rows)
    if len(failing) == len(rows) >= suspicious:
        raise ShardError(
            f"{source}: each of its {len(rows)} rows fails ({failing[0]}), so the rows are not to "
            "blame; fix the model, its tokenizer or the environment"
        )
    logger.warning("%s: %d of %d rows set aside", source, len(failing), len(rows))
    rest = _try(worker, index, [row for place, row in enumerate(rows) if place not in failing])
    if isinstance(rest, str):
        raise ShardError(
            f"{source}: fails as a whole ({rest}), though each row that is left passes alone; a "
            "smaller max_tokens_per_batch may help"
        )
    return _with_rejects(rest, [(rows[place], failing[place]) for place in failing], source)


def _try(worker: ShardWorker[T], index: int, rows: Sequence[Input[T]]) -> ShardOutput | str:
    """The output, or what went wrong by fault of a row."""
    try:
        return worker(index, rows)
    except Exception as error:  # noqa: BLE001 (any code of a model or tokenizer may fail on a row)
        _end_run_unless_rows_fault(index, error)
        return _reason(error)


def _end_run_unless_rows_fault(index: int, error: Exception) -> None:
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _says(error, _NO_MEMORY):
        raise ShardError(
            f"shard {index}: out of memory: {_reason(error)}; lower max_tokens_per_batch, or give "
            "an actor a larger device"
        ) from error
    if _says(error, _DEVICE_BROKEN):
        raise BrokenDeviceError(
            f"shard {index}: the device failed: {_reason(error)}; run the same command again, with "
            "CUDA_LAUNCH_BLOCKING=1 to see where"
        ) from error
    if isinstance(error, _ENVIRONMENT):
        raise error


def _says(error: Exception, parts: Sequence[str]) -> bool:
    return isinstance(error, RuntimeError) and any(part in str(error) for part in parts)


def _bisect(
    worker: ShardWorker[T], index: int, rows: Sequence[Input[T]], start: int = 0
) -> dict[int, str]:
    """Of rows that fail together: the positions of those that fail, and why."""
    if len(rows) == 1:
        outputs = [_try(worker, index, rows) for _ in range(TRIES)]
        reasons = [output for output in outputs if isinstance(output, str)]
        return {start: reasons[0]} if len(reasons) == TRIES else {}
    failing: dict[int, str] = {}
    middle = len(rows) // 2
    for place, half in ((start, rows[:middle]), (start + middle, rows[middle:])):
        if half and isinstance(_try(worker, index, half), str):
            failing |= _bisect(worker, index, half, place)
    return failing


def _reason(error: Exception) -> str:
    """The exception's type and first line, without addresses: the same on every try."""
    first = (str(error).strip().splitlines() or [""])[0]
    text = re.sub(r"0x[0-9a-fA-F]+", "0x…", f"{type(error).__name__}: {first}")
    return redacted(text.removesuffix(": "))[:_LONGEST_REASON]


def _with_rejects(
    output: ShardOutput, failed: Sequence[tuple[Input[T], str]], source: str
) -> ShardOutput:
    rows = [Reject(reason, None, source, row.position, row.name) for row, reason in failed]
    rejects = pa.concat_tables([output.rejects, table_of(rows, REJECT_SCHEMA)])
    counts = Counter(output.counts)
    counts.update({"rows_in": len(rows), "rejects": len(rows)})
    counts.update(f"{OF_EACH}{kind_of(row.reason)}" for row in rows)
    return ShardOutput(output.rows, rejects, dict(counts))


def kind_of(reason: str) -> str:
    """What many rejects have in common: a reason without its particulars."""
    return reason.partition(": ")[0]
