"""Where the host waits for its device: counted on a device that notes it, in a process of its own.

Once a call or a global batch, where results come home, and never inside a micro-batch. What
DeepSpeed does around ours, and what a kernel of CUDA does inside, is not seen here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import watched_device
import zero_cases
from test_varlen import plain_attention
from tiny import save_tiny, tiny_causal_lm, tiny_classifier
from watched_device import NAME, WAITS, OnDevice
from zero_cases import Case

from cwpo_dist.lm import varlen, vocabulary
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores, unwrapped
from cwpo_dist.lm.packed import NAME as PACKED
from cwpo_dist.lm.rows import Layout
from cwpo_dist.scoring.forward import RowForward
from cwpo_dist.training.loop import gradients
from cwpo_dist.training.torch_engine import TorchEngine

Noted = dict[tuple[str, str], int]
Call = Callable[..., Any]
HOME, UNPINNED = "a tensor is brought home", "a copy of memory that is not pinned"
BUDGET = 130  # tokens of a micro-batch: there are several


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Call]:
    """Calls a function in a process that has the device."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=begin) as process:
        yield lambda function, *given: process.submit(function, *given).result()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    save_tiny(made / "model", "llama")
    save_tiny(made / "tied", "llama", tie_word_embeddings=True)
    return made


def begin() -> None:
    watched_device.register()
    vocabulary._BLOCK_WORDS[NAME] = 64
    varlen.varlen_attn = launched
    torch.set_num_threads(1)


class Launched(torch.autograd.Function):
    """The kernel of packed rows as one launch: what it reads, it reads on the device."""

    @staticmethod
    def forward(ctx: Any, given: Any, kwargs: Any, *tensors: OnDevice) -> Any:
        with torch.enable_grad():
            ctx.leaves = [tensor.held.detach().requires_grad_() for tensor in tensors]
            ctx.output = plain_attention(*ctx.leaves, *given, **kwargs)
        return OnDevice(ctx.output.detach())

    @staticmethod
    def backward(ctx: Any, gradient: OnDevice) -> Any:
        found = torch.autograd.grad(ctx.output, ctx.leaves, gradient.held)
        return None, None, *map(OnDevice, found)


def launched(*args: Any, **kwargs: Any) -> Any:
    given = [each.held if isinstance(each, OnDevice) else each for each in args[3:]]
    return Launched.apply(given, kwargs, *args[:3])


def step(case: Case, folder: Path, layout: Layout, kernel: bool) -> tuple[Noted, int, float]:
    """A global batch's waits, its micro-batches, and by how far a gradient misses the CPU's."""
    varlen.usable = lambda query, *_: kernel and isinstance(query, OnDevice)
    found = []
    for device in ("cpu", NAME):
        module: Any = zero_cases.make_module(case, folder)
        if layout == "packed":
            unwrapped(module.model).set_attn_implementation(PACKED)
        if device == NAME:
            watched_device.place(module)
        engine, calls = TorchEngine(module, case.config(), device), []
        module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        run = zero_cases.make_run(case, BUDGET, layout)
        WAITS.clear()
        gradients(zero_cases.make_task(case.task), engine, run, 0, zero_cases.first_batch(case))
        waits = dict(WAITS)
        found.append([p.grad for p in module.parameters() if p.requires_grad])
    wanted, ours = found
    assert all(gradient is not None for gradient in ours)
    both = zip(ours, wanted, strict=True)
    return waits, len(calls), max(float((one.held - two).abs().max()) for one, two in both)


CASES = {
    "fit": Case("fit", 0, task="fit", batch=16),
    "heads": Case("heads", 0, task="heads", batch=16),
    "sft": Case("sft", 0, task="sft", batch=16),
    "align": Case("align", 0, task="dataset", lora=True, batch=16),
    "align, twice": Case("twice", 0, task="ahead", batch=16),
    "align, tied": Case("tied", 0, batch=16, model="tied"),
    "align, recomputed": Case("again", 0, checkpointing=True, batch=16),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, "kernel") for name in CASES]
    + [(name, layout) for name in ("fit", "align") for layout in ("packed", "shared", "plain")],
)
def test_a_step_waits_once_where_its_outputs_come_home(
    elsewhere: Call, folder: Path, name: str, layout: str
) -> None:
    laid_out = "packed" if layout == "kernel" else layout
    told = CASES[name], folder, laid_out, layout == "kernel"
    waits, micro_batches, difference = elsewhere(step, *told)
    assert waits == {(HOME, "total"): 2 if name == "align, twice" else 1}
    assert micro_batches > 2
    assert difference < 1e-5


PLANTED: dict[str, tuple[str, Call]] = {
    "bool": ("a value is read", lambda found: bool(found.sum() > 0)),
    "item": ("a value is read", lambda found: found[0].item()),
    "mask": ("a size is read", lambda found: found[found > 0]),
    "nonzero": ("a size is read", lambda found: found.nonzero()),
    "tolist": (HOME, lambda found: found.tolist()),
    "cpu": (HOME, lambda found: found.cpu()),
    "new_tensor": (UNPINNED, lambda found: found.new_tensor([1.0])),
    "tensor": (UNPINNED, lambda found: torch.tensor([1.0], device=found.device)),
    "to": (UNPINNED, lambda found: torch.ones(2).to(found.device, non_blocking=True)),
    "blocking": (UNPINNED, lambda found: torch.ones(2).pin_memory().to(found.device)),
    "index": (UNPINNED, lambda found: found[torch.tensor([0])]),
}

MODELS: dict[str, Call] = {
    "log-probs": lambda: AnswerLogProbs(tiny_causal_lm("llama")),
    "scores": lambda: AnswerScores(tiny_classifier("llama")),
    "opt": lambda: AnswerScores(tiny_classifier("opt")),
    "bloom": lambda: AnswerScores(tiny_classifier("bloom")),
    "bert": lambda: AnswerScores(tiny_classifier("bert")),
}


def scored(
    name: str, layout: Layout, kernel: bool, one_by_one: bool = False, planted: str = ""
) -> tuple[Noted, int, float]:
    """The waits of a call, its batches, and by how far a number misses the CPU's."""
    varlen.usable = lambda query, *_: kernel and isinstance(query, OnDevice)
    module = MODELS[name]()
    forward = RowForward(module, 2, 64, BUDGET)
    if layout != "packed" and name != "bloom":
        module.model.set_attn_implementation("sdpa")
    forward.layout = layout
    module.one_by_one = one_by_one
    wanted = forward(zero_cases.make_rows()).values
    watched_device.place(module)
    forward.device, calls = torch.device(NAME), []
    # In inference mode torch hands whole layers to a tensor class, and none of its operations.
    forward._batch = torch.no_grad()(partial(RowForward._batch.__wrapped__, forward))
    module.register_forward_hook(lambda *_: calls.append(1))
    if planted:
        plant = PLANTED[planted][1]
        module.register_forward_hook(lambda _module, _args, found: (plant(found), None)[1])
    WAITS.clear()
    found = forward(zero_cases.make_rows()).values
    waits = dict(WAITS)
    both = zip(chain(*found), chain(*wanted), strict=True)
    return waits, len(calls), max(abs(one - two) for one, two in both)


@pytest.mark.parametrize(
    ("name", "layout", "one_by_one"),
    [
        *(("log-probs", layout, False) for layout in ("kernel", "packed", "shared", "plain")),
        *(("scores", "kernel", False), ("opt", "plain", False), ("bloom", "plain", False)),
        *(("bert", "plain", alone) for alone in (False, True)),
    ],
)
def test_scoring_waits_once_where_its_numbers_come_home(
    elsewhere: Call, name: str, layout: str, one_by_one: bool
) -> None:
    laid_out = "packed" if layout == "kernel" else layout
    told = name, laid_out, layout == "kernel", one_by_one
    waits, batches, difference = elsewhere(scored, *told)
    assert waits == {(HOME, "_alone"): 1}
    assert batches > 2
    assert difference < 1e-4


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_wait_is_found(elsewhere: Call, planted: str) -> None:
    waits, batches, _ = elsewhere(scored, "scores", "packed", True, False, planted)
    kind, _ = PLANTED[planted]
    waits[HOME, "_alone"] -= 1
    assert (
        sum(waits.values()) == sum(n for (what, _), n in waits.items() if what == kind) >= batches
    )
