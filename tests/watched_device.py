"""A device that notes where its host waits for it; its numbers are those of the CPU.

It stands where torch lets devices from elsewhere stand (PrivateUse1), with tensors of a class of
its own. A wait is what CUDA waits at: a value read back, a tensor brought home, an operation whose
result has a size that only values tell, a copy from memory that is not pinned. Tensors of the host
and of the device do not mix, as on CUDA. What a kernel of CUDA does inside is not seen.

`register` changes torch for the whole process: call it in one of its own.
"""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "watched"
WAITS: Counter[tuple[str, str]] = Counter()  # by what, and the function of ours that asked for it

_aten = torch.ops.aten
_SIZES = {_aten.nonzero, _aten.masked_select, _aten._unique2, _aten.unique_dim, _aten.bincount}
_VALUES = {_aten._local_scalar_dense, _aten.equal, _aten.is_nonzero}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_library: Any = None


class OnDevice(Tensor):
    """A tensor of the device, held by one of the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's own do

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # no stub
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=f"{NAME}:0"
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        _watch(func, args, kwargs)
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = "cpu"
        home = target is not None and torch.device(target).type == "cpu"
        found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        returned = func._schema.returns
        if len(returned) == 1 and returned[0].alias_info and returned[0].alias_info.is_write:
            return kwargs.get("out", args[0])
        return found if home else tree_map(_on_device, found)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        return self.cpu().numpy()


def register() -> None:
    """Makes the device known to torch, and pinned memory something that can be told."""
    global _library
    module = SimpleNamespace(
        is_initialized=lambda: True,
        is_available=lambda: True,
        current_device=lambda: 0,
        device_count=lambda: 1,
        device=lambda _: nullcontext(),
        get_amp_supported_dtype=lambda: [torch.bfloat16],
        manual_seed_all=lambda _: None,
        get_rng_state=lambda *_: torch.zeros(1),
        set_rng_state=lambda *_: None,
        _is_in_bad_fork=lambda: False,
    )
    _setup_privateuseone_for_python_backend(NAME, module)
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("empty.memory_format", _empty, "PrivateUse1")
    _library.impl("empty_strided", _empty_strided, "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")
    Tensor.pin_memory = _pin_memory  # type: ignore[method-assign,assignment]  # faked


def place(module: nn.Module) -> None:
    """Puts a module's parameters and buffers on the device; what was one tensor stays one."""
    moved: dict[int, Any] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in moved:
                on_device = OnDevice(parameter.detach().clone())
                moved[id(parameter)] = nn.Parameter(on_device, parameter.requires_grad)
            if parameter is not None:
                part._parameters[name] = moved[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer.clone())


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


def _on_device(value: Any) -> Any:
    return OnDevice(value) if isinstance(value, Tensor) else value


def _watch(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Notes what an operation would have the host wait for."""
    packet = func.overloadpacket
    if packet is _aten.copy_:
        _watch_copy(args[1], args[0].device, (*args[2:], kwargs.get("non_blocking"))[0])
    elif packet is _aten._to_copy:
        _watch_copy(args[0], torch.device(kwargs.get("device") or NAME), kwargs.get("non_blocking"))
    elif packet in _VALUES:
        _note("a value is read")
    elif packet in _SIZES or func is _aten.repeat_interleave.Tensor:
        _note("a size is read")
    else:
        indices = [each for each in args[1] if each is not None] if packet in _INDEXED else []
        if any(each.dtype in {torch.bool, torch.uint8} for each in indices):
            _note("a size is read")
        for each in tree_flatten((args, kwargs))[0]:
            if isinstance(each, Tensor) and not isinstance(each, OnDevice) and each.dim():
                if all(each is not index for index in indices):
                    raise RuntimeError(f"{func}: a tensor of the host among the device's")
                _watch_copy(each, torch.device(NAME))


def _watch_copy(source: Tensor, to: torch.device, non_blocking: bool | None = False) -> None:
    if isinstance(source, OnDevice):
        if to.type == "cpu":
            _note("a tensor is brought home")
    elif not (non_blocking and getattr(source, "is_pinned_", False)):
        _note("a copy of memory that is not pinned")


def _note(what: str) -> None:
    frames = [frame for frame in traceback.extract_stack() if "/cwpo_dist/" in frame.filename]
    WAITS[what, frames[-1].name if frames else "elsewhere"] += 1


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return OnDevice(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Of `torch.tensor(…, device=…)` and `new_tensor`, which pass `__torch_dispatch__` by."""
    _watch_copy(source, target.device, non_blocking)
    _held(target).copy_(_held(source))
    return target


def _pin_memory(tensor: Tensor, *_: object) -> Tensor:
    copy = tensor.clone()
    copy.is_pinned_ = True  # type: ignore[attr-defined]  # our own mark
    return copy
