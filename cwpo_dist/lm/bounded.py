"""A function that reads a stranger's model in; what it gives, or why it does not, out of a child.

A regular expression of a tokenizer, a chat template and the code that a configuration asks for can
run for ever or take all memory, in places that no signal handler of Python interrupts. A child that
is forked for them can be bounded by the kernel: by the processor time that it uses, which a busy
machine does not change, and by memory. A fork costs some hundredths of a second, and what was
imported is there.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import psutil
import torch

from cwpo_dist.lm.foreign import one_line
from cwpo_dist.stop_signals import STOP_SIGNALS

logger = logging.getLogger(__name__)

_Found = TypeVar("_Found")
_MEMORY = 4 * 2**30  # bytes beyond what the process has and its weights, which are mapped
_WAITED_S = 900.0  # by the clock: only what waits, for a pipe or a network, takes so long
_STILL_S = 30.0  # without any processor time
_TRIES = 3  # the last of which may stand still for longer: a slow disk, say
_LOOK_S = 0.5
_EVER_S = 10**6  # of processor time
_PAGE = resource.getpagesize()


class BoundError(ValueError):
    """What was called did not end as functions do; the message says how, in one line."""


class _Died(BoundError):
    """A signal ended the child, which is the model's fault if it happens again."""


def bounded(call: Callable[[], _Found], mapped: int = 0) -> _Found:
    """What a function returns, computed in a child with bounds on time and memory.

    Args:
        call: returns what can be pickled, and changes nothing; `at_most` bounds the time of its
            parts.
        mapped: bytes of files that it may map, which are no memory.

    Raises:
        BoundError: for a time or memory beyond the bounds, for a child that died, and for all that
            `call` raised.
    """
    for left in reversed(range(_TRIES)):
        what = f"stood still for {_STILL_S:.0f} s"
        with _forked(call, mapped) as (pipe, child):
            try:
                if left == 0 or _comes(pipe, child):
                    found: _Found = _received(pipe, child)
                    break
            except _Died as error:
                if left == 0:
                    raise
                what = str(error)
        logger.warning("a check of a model is begun anew: %s", what)
    return found


@contextmanager
def _forked(
    call: Callable[[], object], mapped: int
) -> Iterator[tuple[Connection[object, Any], multiprocessing.process.BaseProcess]]:
    """A child that calls it, and the pipe through which it says what it found."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(call, theirs, mapped), daemon=True)
    collects = gc.isenabled()
    gc.disable()  # until the child has frozen what it inherits
    try:
        with warnings.catch_warnings():
            # Of threads that hold a lock while we fork, for which `_comes` has a remedy.
            warnings.simplefilter("ignore", DeprecationWarning)
            child.start()
    finally:
        if collects:
            gc.enable()
    theirs.close()
    try:
        yield ours, child
    finally:
        child.kill()
        child.join()
        ours.close()


def _comes(pipe: Connection[object, Any], child: multiprocessing.process.BaseProcess) -> bool:
    """Waits for the child; False once it has used no processor time for a while.

    It may wait for a lock that one of our other threads held at the fork: that thread is not in the
    child, and nobody gives the lock back. Another fork meets another moment.
    """
    used, since = -1.0, time.monotonic()
    while not pipe.poll(_LOOK_S):
        times = psutil.Process(child.pid).cpu_times()
        if times.user + times.system > used:
            used, since = times.user + times.system, time.monotonic()
        elif time.monotonic() - since >= _STILL_S:
            return False
    return True


def _received(pipe: Connection[object, Any], child: multiprocessing.process.BaseProcess) -> Any:
    if not pipe.poll(_WAITED_S):
        raise BoundError(f"it does not end, after {_WAITED_S:.0f} s of waiting")
    try:
        result, fault = pipe.recv()
    except EOFError:
        child.join()
        raise _death(child.exitcode or 0) from None
    if fault is not None:
        raise BoundError(fault)
    return result


def _death(exitcode: int) -> BoundError:
    """Also a good model's child dies now and then: libraries' handlers of forks may abort it."""
    if exitcode == -signal.SIGXCPU:
        return BoundError("it takes too much time")
    if exitcode >= 0:
        return BoundError(f"the process that read it died (exit code {exitcode})")
    return _Died(f"the process that read it died ({signal.Signals(-exitcode).name})")


def _work(call: Callable[[], object], pipe: Connection, mapped: int) -> None:
    # What is garbage here is the parent's: Ray's references would be given back over its sockets,
    # which breaks them (`ray.nodes()` there then waits for ever), or wait for locks of its threads.
    gc.freeze()
    gc.enable()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads stayed behind
    torch.set_num_threads(1)  # and so did those of OpenMP
    for number in (signal.SIGXCPU, *STOP_SIGNALS):  # what answers them is the parent's
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        room = int(file.read().split()[0]) * _PAGE + _MEMORY + 2 * mapped
    resource.setrlimit(resource.RLIMIT_AS, (room if hard < 0 else min(room, hard), hard))
    try:
        pipe.send((call(), None))
    except MemoryError:
        pipe.send((None, f"it takes more than {_MEMORY // 2**30} GiB of memory"))
    except BaseException as error:  # noqa: BLE001 (a panic of Rust is no Exception; told, refused)
        pipe.send((None, one_line(error)))


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Kills the child, for it is one, that `bounded` made, when this takes more processor time."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + seconds, hard))
    yield
    resource.setrlimit(resource.RLIMIT_CPU, (_EVER_S if hard < 0 else hard, hard))
