"""The private names of Ray that are used: one place to look when a new Ray breaks something.

Each has a test of its own in tests/test_private_names.py. Where Ray offers a public way, that is
taken instead, and no other file imports from `ray._private` or `ray.data._internal`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray._private import utils
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray._private.resource_and_label_spec import ResourceAndLabelSpec
from ray._private.services import get_ray_address_from_environment
from ray.data import DataContext
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.data._internal.logical.interfaces import LogicalPlan
from ray.data._internal.logical.operators import FromBlocks
from ray.data._internal.stats import DatasetStats
from ray.data.block import BlockMetadataWithSchema
from ray.data.dataset import MaterializedDataset

# What shows the lines of worker processes at the driver: handlers can be taken out and put in.
worker_lines = global_worker_stdstream_dispatcher
END_S = 10.0  # for a pipeline that was told to end
PROGRESS_LOGGER = "ray.data._internal.progress"  # of what Ray Data says of its own bars


def head_of_this_machine() -> str:
    """The address that `auto` stands for: of the Ray that `ray start` left running here.

    Raises:
        ConnectionError: where none runs.
    """
    found: str = get_ray_address_from_environment("auto", None)
    return found


@contextmanager
def stop_handler_kept() -> Iterator[None]:
    """Within it `ray.init` leaves SIGTERM to what answers it; it would take it for itself at once.

    Where nothing answers it, Ray's own handler is right: it ends Ray's processes, too.
    """
    if not callable(signal.getsignal(signal.SIGTERM)):
        yield
        return
    set_handler = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = set_handler


def resources_of_this_machine() -> tuple[dict[str, float], dict[str, str]]:
    """Resources and labels, by Ray's names, of the node that `ray.init` would start here.

    It counts CPUs and GPUs by rules of its own: a container's share, variables of its environment.
    """
    found: Any = ResourceAndLabelSpec().resolve(is_head=True)
    return found.to_resource_dict(), found.labels


def one_block_each(block: pa.Table, number: int) -> ray.data.Dataset:
    """A data set of `number` blocks, all of them the same one, which is stored once.

    Ray Data's own ways to make a data set store every block apart, one after the other, or run a
    task a block to ask for its schema, while all devices of a fleet wait (`benchmarks/scale.py`
    times it, as `tickets`). A plan that names one stored block many times costs next to nothing.
    """
    about = BlockMetadataWithSchema.from_block(block)
    context = DataContext.get_current().copy()
    stored: Any = ray.put(block)
    plan = LogicalPlan(FromBlocks([stored] * number, [about] * number), context)
    return MaterializedDataset(plan, context, DatasetStats(metadata={}, parent=None))


def end_pipelines(threads: Iterable[threading.Thread]) -> None:
    """Ends those of these threads that run a pipeline of Ray Data, whatever its actors do.

    Ray Data is told to end by its consumer alone, which may wait for a row that never comes; the
    executor of a pipeline is a thread, and can be told instead.
    """
    for thread in threads:
        if isinstance(thread, StreamingExecutor):
            thread.shutdown(force=True)
            thread.join(END_S)
