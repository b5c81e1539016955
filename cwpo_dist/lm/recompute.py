"""A model in; the same model, which trains as it scores, and whose layers keep little when told to.

What layers kept else, they compute again in the backward pass: a third more work, and few
activations. The last decoder layer never does, as the backward pass needs it first.
"""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from cwpo_dist.lm.modules import decoder_of, unwrapped
from cwpo_dist.lm.transformers_internals import may_recompute, never_recompute


def let_recompute(model: nn.Module) -> None:
    """Makes a model ready for `recompute`, which is off until then; adapters may be on it already.

    Raises:
        ValueError: for a model that cannot.
    """
    core = unwrapped(model)
    enable = getattr(core, "activation_checkpointing_enable", None)  # its name since 5.23
    # Reentrant, it would want inputs that require gradients: beneath LoRA the embeddings have none.
    (enable or core.gradient_checkpointing_enable)({"use_reentrant": False})
    layers = getattr(decoder_of(core), "layers", None)
    # Its activations are needed at once, so to drop them saves nothing. And it has hooks that know
    # one micro-batch (last_layer.py): called again, it would read another one's tokens.
    if isinstance(layers, nn.ModuleList) and isinstance(layers[-1], GradientCheckpointingLayer):
        never_recompute(layers[-1])
    recompute(model, on=False)


def start_training(module: nn.Module) -> None:
    """Training mode for what needs it, and evaluation mode for all else.

    Adapters have dropout, and layers compute again only in training mode. A model's own modules
    stay as they are when it scores: in training some draw noise or experts, or read a weight past
    its adapter (mixtures of experts, Gemma 3n), and log-probs would not be those that the reference
    and everyone after training sees.
    """
    module.eval()
    module.training = True  # the wrapper, which engines look at
    for name, part in module.named_modules():
        if ".lora_dropout." in name or may_recompute(part):
            part.training = True  # it alone, not what is inside


def recompute(module: nn.Module, *, on: bool) -> None:
    """Whether the next forward passes keep little, in the layers of a model made ready for it."""
    for layer in module.modules():
        if may_recompute(layer):
            layer.gradient_checkpointing = on  # type: ignore[assignment]  # a plain attribute
