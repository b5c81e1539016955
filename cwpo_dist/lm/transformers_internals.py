"""The private names of transformers that are used: one place to look when a new one breaks.

Each has a test of its own in tests/test_private_names.py. transformers lets one *set* the attention
of a model (`set_attn_implementation`) and switch recomputing on, but asks nobody's leave to choose,
and has no public word for what it chose.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

_RECOMPUTES = "_gradient_checkpointing_func"  # on each layer that may compute again


def attention_in_use(model: PreTrainedModel) -> str:
    """The name of the attention that a model computes with, such as 'sdpa'."""
    return str(model.config._attn_implementation)


def experts_in_use(model: PreTrainedModel) -> str | None:
    """How a mixture multiplies by its experts: 'grouped_mm', 'eager', …; None: it has none."""
    found: str | None = getattr(model.config, "_experts_implementation", None)
    return found


def may_recompute(layer: nn.Module) -> bool:
    """Whether a layer has been made ready to compute its activations again."""
    return hasattr(layer, _RECOMPUTES)


def never_recompute(layer: nn.Module) -> None:
    """Takes back from one layer what makes it ready, until the model is made ready anew."""
    delattr(layer, _RECOMPUTES)
    layer.gradient_checkpointing = False  # type: ignore[assignment]  # a plain attribute
