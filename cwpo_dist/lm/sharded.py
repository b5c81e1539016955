"""The shape of a parameter, also where ZeRO-3 keeps it empty and spreads it over ranks."""

from __future__ import annotations

from torch import Tensor


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole: DeepSpeed leaves a sharded parameter empty, and notes it down."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
