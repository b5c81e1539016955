"""A decoder in; the same decoder, whose last layer works only for the tokens that are read.

After the last layer's keys and values nothing passes between tokens any more, and of packed rows
only answers are read: for log-probs the states that predict their tokens, for scores each answer's
last. So its queries, the projection after its attention and its MLP, most of the layer, take those
tokens alone, and the others' states are left as they come. Few layers and long prompts gain most.

Shapes: T tokens, M tokens that are read, H width; lengths of packed rows as in varlen.py.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cwpo_dist.lm.feeding import moved
from cwpo_dist.lm.packed import group_of, packed_lengths
from cwpo_dist.lm.rows import counted
from cwpo_dist.lm.varlen import Lengths

Reads = Literal["answers", "ends"]

# Parts that give each token's output from that token alone. Not among them: the projections of keys
# and values, which tokens that are read still attend to.
_TOKENWISE = ("mlp", "self_attn.q_proj", "self_attn.o_proj")


def narrow(decoder: nn.Module, reads: Reads) -> None:
    """Restricts the last layer of a decoder for packed rows; other inputs go through as before.

    What the probe of a model shows to be wrong is not used (probe.py). Layers without parts of
    known names, and mixtures of experts, stay whole.

    Args:
        decoder: a Hugging Face decoder, before an engine wraps it.
        reads: 'answers', the states that predict answer tokens; or 'ends', answers' last tokens.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return
    last = layers[-1]
    known: _LastLayer | None = getattr(last, "_cwpo_last_layer", None)
    if known is None:  # hooks stand once, however often a module is made around the model
        object.__setattr__(last, "_cwpo_last_layer", _LastLayer(last, reads))
    else:
        known.reads = reads


def read_tokens(lengths: Lengths, reads: Reads) -> Tensor:
    """Which tokens of packed rows are read, int64 [M], ascending.

    Args:
        lengths: tokens of each row's prompt and of its answers.
        reads: see `narrow`.
    """
    read: list[tuple[int, int]] = []  # where some lie side by side, and how many
    end = 0
    for prompt, *answers in lengths:
        end += prompt
        if reads == "answers":
            read.append((end - 1, 1))  # the prompt's last token predicts the first ones
        for length in answers:
            start, end = end, end + length
            read.append((end - 1, 1) if reads == "ends" else (start, length - 1))
    return torch.from_numpy(counted(*np.array(read).T))


class _LastLayer:
    """Hooks on a layer, which learn from its mask what is read, and on its parts.

    Hooks, and no layer of ours: the code of each architecture stays its own, and what an adapter
    puts around a projection is inside the hook. A part is given M tokens and its output is laid out
    as T again, so that the layer's own sums (residuals, attention's queries by position) see the
    shapes that they expect. Where nobody reads, 0 is added to a state, and no gradient comes back.

    The layer must not be computed again (recompute.py leaves it out): transformers would do so
    without its hooks, and what was read could be another micro-batch's by then.
    """

    def __init__(self, layer: nn.Module, reads: Reads) -> None:
        self.reads = reads
        self._read_M: Tensor | None = None
        layer.register_forward_pre_hook(self._before_layer, with_kwargs=True)
        # Also after an error (a probe that runs out of memory): the next rows are others.
        layer.register_forward_hook(self._after_layer, always_call=True)
        for name in _TOKENWISE:
            part = _submodule(layer, name)
            if part is not None and not hasattr(part, "experts"):
                part.register_forward_pre_hook(self._before_part)
                part.register_forward_hook(self._after_part)

    def _before_layer(
        self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> None:
        for mask in (*args, *kwargs.values()):
            if (lengths := packed_lengths(mask)) is not None:
                read_M = group_of(mask).own(read_tokens(lengths, self.reads))
                hidden = args[0] if args else kwargs["hidden_states"]
                self._read_M = moved(read_M, hidden.device)
                self._n_tokens = hidden.shape[1]
                return

    def _after_layer(self, *_: object) -> None:
        self._read_M = None

    def _before_part(self, _part: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """[1, T, H] → [1, M, H]."""
        if self._read_M is None:
            return args
        return (args[0].index_select(1, self._read_M), *args[1:])

    def _after_part(self, _part: nn.Module, _args: object, output: Tensor) -> Tensor:
        """[1, M, H] → [1, T, H], zero where nobody reads."""
        if self._read_M is None:
            return output
        whole = output.new_zeros(1, self._n_tokens, output.shape[-1])
        return whole.index_copy(1, self._read_M, output)


def _submodule(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None
