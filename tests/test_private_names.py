"""Private names of ray, deepspeed, transformers and torch: each is there, and does what is used.

A name that a new version drops or changes fails here, by name, and not in the middle of a run.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import tiny
import torch
from torch import nn

import cwpo_dist
from cwpo_dist import ray_internals
from cwpo_dist.lm.recompute import let_recompute, recompute
from cwpo_dist.lm.transformers_internals import (
    attention_in_use,
    experts_in_use,
    may_recompute,
    never_recompute,
)

PACKAGE = Path(cwpo_dist.__file__).parent
# The one file of each library that may use its private names.
FILES = {
    "ray": "ray_internals.py",
    "deepspeed": "training/deepspeed_engine.py",
    "transformers": "lm/transformers_internals.py",
    "torch": "lm/fixed_shapes.py",
}
DEEPSPEED = {  # what of its optimizers, by ZeRO stage, the engine calls
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer": (
        "update_lp_params",
        "_lazy_init_hp_params_optimizer_state",
    ),
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3": (
        "_reassign_or_swap_out_partitioned_parameters",
        "_get_fp32_opt_state_partition",
    ),
    "deepspeed.runtime.engine:DeepSpeedEngine": (
        "set_gradient_accumulation_boundary",
        "allreduce_gradients",
    ),
    "deepspeed.utils.tensor_fragment:tensor_fragment": ("get_hp_fragment",),
}


def _private(module: str) -> bool:
    return any(part.startswith("_") and part != "__future__" for part in module.split("."))


def _uses(path: Path) -> Iterator[str]:
    """Imports of private modules or names of others, and private attributes that are not ours."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ours = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("cwpo_dist"):
            names = [alias.name for alias in node.names if alias.name.startswith("_")]
            if _private(node.module or "") or names:
                yield f"{node.module}: {', '.join(alias.name for alias in node.names)}"
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            of_self = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
            if not of_self and node.attr not in ours and not node.attr.startswith("__"):
                yield node.attr


def test_they_are_used_in_one_file_of_each_library() -> None:
    allowed = {PACKAGE / file for file in FILES.values()}
    # os._exit, and what a NamedTuple has
    public_in_python = {"_exit", "_asdict", "_fields", "_make", "_replace"}
    found = {
        f"{path.relative_to(PACKAGE)}: {use}"
        for path in PACKAGE.rglob("*.py")
        if path not in allowed
        for use in _uses(path)
        if use not in public_in_python
    }
    assert found == {"pairs/locate.py: _strip_protocol"}, "of fsspec, which filesystems override"
    for file in FILES.values():
        assert list(_uses(PACKAGE / file)), f"{file} uses none any more"


@pytest.mark.parametrize(
    ("place", "name"), [(place, name) for place, names in DEEPSPEED.items() for name in names]
)
def test_deepspeed_has(place: str, name: str) -> None:
    """What it does, test_zero.py shows at every stage."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    module, _, kind = place.partition(":")
    assert callable(getattr(getattr(importlib.import_module(module), kind), name))


@pytest.mark.parametrize("name", ["ds_shape", "ds_numel", "persistent_parameters", "_hp_mapping"])
def test_deepspeed_sets(name: str) -> None:
    """Attributes that it gives to parameters and optimizers."""
    modules = ("partition_parameters", "stage3", "stage_1_and_2")
    sources = [importlib.import_module(f"deepspeed.runtime.zero.{each}") for each in modules]
    sources.append(importlib.import_module("deepspeed.utils.tensor_fragment"))
    assert any(f".{name} =" in inspect.getsource(each) for each in sources)


def test_deepspeeds_partitions_take_the_arguments_that_we_give() -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    given = inspect.signature(Stage3._get_fp32_opt_state_partition).parameters
    assert {"release_swap_buffers", "optim_state_key"} <= given.keys()


def test_deepspeeds_table_of_what_it_compiles() -> None:
    import deepspeed.ops

    assert isinstance(deepspeed.ops.__compatible_ops__, dict)


def test_transformers_attention() -> None:
    model = tiny.tiny_causal_lm("llama")
    model.set_attn_implementation("eager")
    assert attention_in_use(model) == "eager"
    model.set_attn_implementation("sdpa")
    assert attention_in_use(model) == "sdpa"


def test_transformers_experts() -> None:
    assert experts_in_use(tiny.tiny_causal_lm("mixtral")) in {"eager", "grouped_mm", "batched_mm"}


def test_transformers_layers_that_compute_again() -> None:
    model = tiny.tiny_causal_lm("llama")
    layers: Any = model.get_submodule("model.layers")
    assert not may_recompute(layers[0])
    let_recompute(model)
    assert [may_recompute(layer) for layer in layers] == [True] * (len(layers) - 1) + [False]
    recompute(model, on=True)
    assert layers[0].gradient_checkpointing
    assert not layers[-1].gradient_checkpointing
    never_recompute(layers[0])
    assert not may_recompute(layers[0])


def test_torchs_dispatch_mode_sees_products_and_can_be_left() -> None:
    from torch._ops import OpOverload
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

    seen: list[str] = []

    class Watches(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            assert isinstance(func, OpOverload)
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    matrix = torch.eye(2)
    with torch.no_grad(), Watches():
        nn.functional.linear(matrix, matrix)
        with _disable_current_modes():
            torch.bmm(matrix[None], matrix[None])
    assert "aten::mm" in seen
    assert "aten::bmm" not in seen


def test_torch_keeps_one_object_a_storage() -> None:
    """By which `kept_of_token` counts each storage once."""
    tensor = torch.empty(3, device="meta")
    assert id(tensor[1:].untyped_storage()) == id(tensor.untyped_storage())
    assert id(tensor.untyped_storage()) != id(torch.empty(3, device="meta").untyped_storage())


def test_rays_plan_of_one_block_named_many_times(ray_local: None) -> None:
    rows = ray_internals.one_block_each(pa.table({"ticket": [True]}), 5)
    assert rows.num_blocks() == 5
    assert rows.take_all() == [{"ticket": True}] * 5


def test_rays_executor_is_a_thread_that_can_be_ended() -> None:
    assert issubclass(ray_internals.StreamingExecutor, threading.Thread)
    assert "force" in inspect.signature(ray_internals.StreamingExecutor.shutdown).parameters
    ray_internals.end_pipelines([threading.current_thread()])  # which is none


def test_rays_lines_of_workers() -> None:
    lines = ray_internals.worker_lines
    before = list(lines.handlers)
    lines.add_handler("ours", print)
    assert dict(lines.handlers)["ours"] is print
    lines.remove_handler("ours")
    assert list(lines.handlers) == before


@pytest.mark.parametrize("answered", [True, False])
def test_rays_handler_of_a_stop_signal(answered: bool) -> None:
    """Set through this name, by `ray.init` and by the node that it starts."""
    for module in ("worker", "node"):
        source = inspect.getsource(importlib.import_module(f"ray._private.{module}"))
        assert "ray._private.utils.set_sigterm_handler(" in source

    def ours(*_: object) -> None: ...

    def rays(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, ours if answered else signal.SIG_DFL)
    try:
        with ray_internals.stop_handler_kept():
            ray_internals.utils.set_sigterm_handler(rays)
        assert signal.getsignal(signal.SIGTERM) is (ours if answered else rays)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_rays_logger_of_its_bars() -> None:
    assert importlib.import_module(ray_internals.PROGRESS_LOGGER)


def test_rays_head_of_this_machine(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    find = ray._private.services.find_gcs_addresses
    find.cache_clear()
    assert ray.get_runtime_context().gcs_address in find()
    assert ray_internals.head_of_this_machine() in find(), "any that runs: there may be others"


def test_rays_count_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 3, "licence": 2}')
    monkeypatch.setenv("RAY_OVERRIDE_LABELS", '{"zone": "a"}')
    resources, labels = ray_internals.resources_of_this_machine()
    assert (resources["CPU"], resources["licence"], labels["zone"]) == (3, 2, "a")


def test_rays_backend_of_torch_calls_back_when_training_starts() -> None:
    from ray.train.torch import TorchConfig

    kind = TorchConfig().backend_cls
    assert list(inspect.signature(kind.on_training_start).parameters) == [
        "self",
        "worker_group",
        "backend_config",
    ]
