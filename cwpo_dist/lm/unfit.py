"""A causal language model, with or without memory, in; why its answers have no log-probs here, out.

What stands in a configuration or in the shape of a model is told before a weight is read, so that
plan says what would be found on a probe (probe.py), which is the judge of all others.
"""

from __future__ import annotations

from transformers import PreTrainedModel

# By model type. The table of architectures (docs/architectures.md) shows that there are no others.
_KINDS = {
    "cpmant": "reads the whole of a prompt at once, ahead of each of its tokens",
    "modernbert-decoder": "has layers of its own between its decoder and its output layer",
    "prophetnet": "predicts several tokens at once, from streams of its own",
    "xlnet": "predicts tokens in any order, from all others",
}


def unfit(model: PreTrainedModel) -> str | None:
    """Why a model cannot be asked for the log-probs of answers; None: the probe will tell.

    Args:
        model: as `AutoModelForCausalLM` gives it.
    """
    config = model.config
    if config.model_type in _KINDS:
        return f"{config.model_type} {_KINDS[config.model_type]}"
    if _is_encoder(model):
        return f"{config.model_type} is an encoder: it reads the tokens that it should predict"
    head = model.get_output_embeddings()
    if head is None:
        return f"{type(model).__name__} has no output embeddings"
    if not any(part is head for part in model.children()):
        return f"{config.model_type} has layers of its own between its decoder and its output layer"
    return None


def _is_encoder(model: PreTrainedModel) -> bool:
    """Whether its tokens see those that they should predict."""
    flags = [part.is_causal for part in model.modules() if hasattr(part, "is_causal")]
    # Some configurations have the field, and no layer that asks for it.
    told = any(getattr(part, "is_decoder", None) is False for part in model.modules())
    return (told and not any(flags)) or getattr(model.config, "causal", None) is False
