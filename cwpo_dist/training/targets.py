"""A model and a LoRA section in; what of it gets adapters, or a refusal by name, out.

`all-linear` means here what it means to peft, architecture by architecture: every linear layer of
the decoder, and the experts of a mixture, which transformers 5 keeps fused as one parameter of
three dimensions. Two things are left out: routers, whose choice of experts a small change flips for
whole tokens (peft takes those of some architectures), and what fused kernels of state spaces read
past an adapter (peft refuses it). Fused experts get twice the rank where they fuse two projections,
as peft gives them when it reads an adapter of separate ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D

from cwpo_dist.config import LoraConfig
from cwpo_dist.lm.foreign import FOREIGN_ERRORS
from cwpo_dist.lm.modules import decoder_of, whole_shape

_ROUTERS = frozenset({"gate", "router"})
_PAST_ADAPTERS = ("out_proj", "dt_proj")  # of a mixer with a state matrix
_PAIR = "gate_up_proj"  # two projections in one
_NAMES_SHOWN = 12


class LoraError(ValueError):
    """Adapters that a model cannot have; the message names field, value and remedy."""


@dataclass(frozen=True)
class Targets:
    """What peft is asked to adapt.

    Attributes:
        modules: names, or ends of names, of linear layers.
        parameters: the same of fused experts.
        ranks: peft's `rank_pattern`, of parameters whose rank is not the section's.
        alphas: peft's `alpha_pattern`, so that their scale is the section's all the same.
        once: of the modules those that are none today, and that peft may know by a former name.
    """

    modules: list[str]
    parameters: list[str] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, int] = field(default_factory=dict)
    once: list[str] = field(default_factory=list)


def targets(model: PreTrainedModel, lora: LoraConfig) -> Targets:
    """What of a model a section asks to adapt.

    Args:
        model: a causal LM or a classifier, with or without memory.
        lora: `target_modules` are peft's: names, or ends of names, of modules (of projections that
            are fused today as they were called before, of experts also the parameters); or
            'all-linear'.

    Raises:
        LoraError: for a name that nothing in the model has, or a model without linear layers.
    """
    fused = sorted(set(_fused(_text_decoder(model))))
    if lora.target_modules == "all-linear":
        return _all_linear(model, lora, fused)
    parameters = _among(lora.target_modules, fused)
    modules = [target for target in lora.target_modules if target not in parameters]
    every = [name for name, _ in model.named_modules()]
    there = _among(modules, every)
    once = [target for target in modules if target not in there]
    for target in once:
        if target not in _once_separate(model):
            raise unknown_target(model, target)
    return replace(_with_ranks(lora, modules, parameters), once=once)


def _all_linear(model: PreTrainedModel, lora: LoraConfig, fused: list[str]) -> Targets:
    """Every linear layer of the decoder, and its fused experts."""
    decoder = _text_decoder(model)
    prefix = next(name for name, part in model.named_modules() if part is decoder)
    names = [f"{prefix}.{name}".lstrip(".") for name in _linear(decoder)]
    if not names and not fused:
        raise LoraError(
            f"lora.target_modules: 'all-linear', but {type(model).__name__} has no linear "
            "layer; train it whole (lora: null)"
        )
    return _with_ranks(lora, names, fused)


def unknown_target(model: PreTrainedModel, target: str) -> LoraError:
    """The refusal of a target that nothing in a model without adapters has, with what there is."""
    decoder = _text_decoder(model)
    every = [name.rpartition(".")[2] for name in _linear(decoder)]
    every += sorted(set(_fused(decoder)))
    for kinds in ((nn.Linear, Conv1D), nn.Embedding):  # which few ask for
        named = model.named_modules()
        every += [name.rpartition(".")[2] for name, part in named if isinstance(part, kinds)]
    names = list(dict.fromkeys(leaf for leaf in every if not leaf.isdigit()))
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return LoraError(
        f"lora.target_modules: {target!r} is not a module of {type(model).__name__}; it has "
        f"{', '.join(names[:_NAMES_SHOWN])}{more}"
    )


def left_out(adapted: PreTrainedModel) -> list[str]:
    """The last names of linear layers that take an adapter and have none, each once.

    Args:
        adapted: the Hugging Face model with LoRA layers in it.
    """
    names = (name.split(".") for name in _linear(_text_decoder(adapted)))
    free = [parts[-1] for parts in names if not {"base_layer", "lora_A", "lora_B"} & set(parts)]
    return list(dict.fromkeys(free))


def _with_ranks(lora: LoraConfig, modules: list[str], parameters: list[str]) -> Targets:
    if not any(name.endswith(_PAIR) for name in parameters):
        return Targets(modules, parameters)
    pattern = rf".*\.{_PAIR}"
    return Targets(modules, parameters, {pattern: 2 * lora.r}, {pattern: 2 * lora.lora_alpha})


def _text_decoder(model: PreTrainedModel) -> nn.Module:
    """The decoder, without what a model for images has beside it."""
    decoder: PreTrainedModel = decoder_of(model)
    if model.config.get_text_config() is model.config:
        return decoder
    inner: nn.Module = decoder.get_decoder()
    return inner if any(part is inner for part in decoder.modules()) else decoder


def _linear(decoder: nn.Module) -> Iterator[str]:
    """The names of linear layers that take an adapter, below the decoder."""
    for name, layer in decoder.named_modules():
        parent, _, leaf = name.rpartition(".")
        skipped = leaf in _PAST_ADAPTERS and hasattr(decoder.get_submodule(parent), "A_log")
        if _is_linear(layer) and not _ROUTERS & set(name.split(".")) and not skipped:
            yield name


def _is_linear(layer: nn.Module) -> bool:
    """Whether its output is one of a linear layer, as an adapter takes for granted.

    Subclasses with a `forward` of their own may give something else (groups, a tuple): those are
    tried without memory.
    """
    if isinstance(layer, Conv1D) or type(layer).forward is nn.Linear.forward:
        return True
    if not isinstance(layer, nn.Linear):
        return False
    bare = {
        name: torch.empty(whole_shape(p), device="meta")
        for name, p in layer.named_parameters(recurse=False)
    }
    try:
        some = torch.empty(2, layer.in_features, device="meta")
        output = functional_call(layer, bare, (some,))
    except FOREIGN_ERRORS:
        return False
    return getattr(output, "shape", None) == (2, layer.out_features)


def _fused(decoder: nn.Module) -> Iterator[str]:
    """The ends of the names of fused experts: that of their module, and the parameter's own."""
    for name, module in decoder.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf == "experts" or "Experts" in type(module).__name__:
            for own, parameter in module.named_parameters(recurse=False):
                if len(whole_shape(parameter)) == 3:
                    yield f"{leaf}.{own}"


def _once_separate(model: PreTrainedModel) -> frozenset[str]:
    """What projections that are one parameter today were called in checkpoints, as peft knows."""
    conversions = get_checkpoint_conversion_mapping(model.config.model_type) or []
    fused = [each for each in conversions if isinstance(each, WeightConverter)]
    patterns = [p.removesuffix(".weight") for each in fused for p in each.source_patterns]
    return frozenset(pattern.rpartition(".")[2] for pattern in patterns)


def _among(targets: Iterable[str], names: list[str]) -> list[str]:
    """Those of the targets that are one of the names, or the end of one, as peft matches."""
    return [
        target
        for target in targets
        if any(name == target or name.endswith(f".{target}") for name in names)
    ]
