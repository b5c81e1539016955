"""A model's name in; the sizes from which its costs follow, out. No weight is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import file_exists
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from cwpo_dist.config import LoraConfig, ModelConfig, TrainingConfig
from cwpo_dist.lm.activations import kept_numbers
from cwpo_dist.lm.loading import (
    ModelError,
    attention_of,
    load_annotator_base,
    load_config,
    load_policy,
    load_reward_model,
)
from cwpo_dist.lm.tokens import load_tokenizer
from cwpo_dist.training.lora import add_lora

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
KEPT = 1.3  # numbers a token that autograd keeps, over the ends of linear layers: about, for Llama


@dataclass(frozen=True)
class ModelSize:
    """What costs follow from.

    Attributes:
        parameters: all of them, tied ones once.
        matmul: those that every token is multiplied with: no embeddings, no head.
        head: those of the output layer, which only answer tokens reach.
        layers: decoder layers.
        width: hidden size.
        words: of the output layer.
        linear: inputs + outputs of each linear layer of the decoder, for LoRA.
        kept: numbers a token that autograd keeps, all weights trained; 0 of a trained reward model.
        kept_lora: the same with LoRA.
        positions: for how many tokens there are learned positions; None where they rotate on.
    """

    parameters: int
    matmul: int
    head: int
    layers: int
    width: int
    words: int
    linear: tuple[int, ...]
    kept: float
    kept_lora: float
    positions: int | None

    def trained(self, training: TrainingConfig) -> int:
        """Parameters that training changes."""
        if training.lora is None:
            return self.parameters
        return training.lora.r * sum(self.linear)


def annotator(model: ModelConfig) -> PreTrainedModel:
    """A weak model under a fresh head, without memory."""
    return load_annotator_base(
        model, load_tokenizer(model, distinct_pad=True), seed=0, device="meta"
    )


def policy(model: ModelConfig) -> PreTrainedModel:
    """A causal language model, without memory."""
    return load_policy(model, device="meta")


def reward_model(model: ModelConfig) -> PreTrainedModel:
    """A trained one-label classifier, without memory."""
    return load_reward_model(model, device="meta")


Loader = Callable[[ModelConfig], PreTrainedModel]


def model_size(model: ModelConfig, load: Loader = policy) -> ModelSize:
    """The sizes of a model that is loaded in one of the three ways.

    Raises:
        ModelError: as the loader; for a hub model without safetensors.
    """
    module = load(model) if _is_here(model.model_name_or_path) else _from_hub(model, load)
    text = module.config.get_text_config()
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in module.base_model.parameters() if p.ndim == 2 and id(p) not in tables]
    head = module.get_output_embeddings()
    linear = tuple(
        layer.in_features + layer.out_features
        for layer in module.base_model.modules()
        if isinstance(layer, nn.Linear)
    )
    size = ModelSize(
        parameters=sum(p.numel() for p in module.parameters()),
        matmul=sum(p.numel() for p in matrices),
        head=head.weight.numel() if isinstance(head, nn.Linear) else 0,
        layers=int(text.num_hidden_layers),
        width=int(text.hidden_size),
        words=head.out_features if isinstance(head, nn.Linear) else 0,
        linear=linear,
        kept=0.0,
        kept_lora=0.0,
        positions=_learned_positions(module),
    )
    if load is reward_model:  # nobody trains it
        return size
    size = replace(size, kept=_kept(module, linear))
    adapted = add_lora(module, LoraConfig(), "logps" if load is policy else "scores", seed=0)
    return replace(size, kept_lora=_kept(adapted, linear))


def _kept(module: Any, linear: tuple[int, ...]) -> float:
    """What autograd keeps a token: counted, or guessed for a model that must compute to go on."""
    try:
        return kept_numbers(module)
    except (NotImplementedError, RuntimeError):
        return KEPT * sum(linear)


def _learned_positions(module: PreTrainedModel) -> int | None:
    """How many tokens a table of absolute positions (OPT, GPT-2) has room for.

    RoBERTa and its like count from behind their pad token, which their table has a row for.
    """
    limit = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    for name, layer in module.base_model.named_modules():
        is_table = isinstance(layer, nn.Embedding) and ("position" in name or name.endswith("wpe"))
        if limit and is_table and layer.num_embeddings >= limit:
            skipped = 0 if layer.padding_idx is None else layer.padding_idx + 1
            return int(min(limit, layer.num_embeddings - skipped))
    return None


def _is_here(name: str) -> bool:
    """True unless it can only be a hub id."""
    is_path = "://" in name or name.startswith((".", "/", "~")) or name.count("/") > 1
    return is_path or Path(name).is_dir()


def _from_hub(model: ModelConfig, load: Loader) -> PreTrainedModel:
    """A hub model's skeleton, from its configuration; its weights are not fetched for a plan."""
    name, revision = model.model_name_or_path, model.revision
    config = load_config(model)
    try:
        found = any(file_exists(name, file, revision=revision) for file in SAFETENSORS)
    except OfflineModeIsEnabled:
        found = True  # from the cache; loading will say what is missing there
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(f"model_name_or_path: {name!r}: {error}") from error
    if not found and revision not in (None, "main"):  # of main, the hub's bot keeps a conversion
        raise ModelError(
            f"revision: {name!r} has no safetensors at {revision!r}; take 'main', or convert the "
            "weights once and give the folder"
        )
    if model.num_hidden_layers is not None:
        config.num_hidden_layers = model.num_hidden_layers
    kind: Any = AutoModelForCausalLM if load is policy else AutoModelForSequenceClassification
    with torch.device("meta"):
        skeleton: PreTrainedModel = kind.from_config(
            config, attn_implementation=attention_of(model)
        )
    return skeleton
