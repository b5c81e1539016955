"""A model's name in; the sizes from which its costs follow, out. No weight is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from huggingface_hub import file_exists
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from cwpo_dist.config import LoraConfig, ModelConfig, TrainingConfig
from cwpo_dist.hub_names import is_hub_id
from cwpo_dist.lm.activations import Kept, kept_of_token
from cwpo_dist.lm.encoder import load_tokenizer
from cwpo_dist.lm.flops import head_width, matmul_weights
from cwpo_dist.lm.foreign import FOREIGN_ERRORS, one_line, whole_number
from cwpo_dist.lm.heads import has_heads, scoring_heads
from cwpo_dist.lm.loading import (
    ModelError,
    cut_layers,
    load_annotator_base,
    load_config,
    load_policy,
    load_reward_model,
    refuse_unfit,
    skeleton,
)
from cwpo_dist.lm.modules import decoder_of
from cwpo_dist.lm.probe import unshared
from cwpo_dist.lm.rope import turning_length
from cwpo_dist.training.lora import adapter_notes, add_lora, leave_experts, refuse_unreadable

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class TrainedSize:
    """What one section's training adds to a model.

    Attributes:
        lora: of the section; None: all weights are trained.
        parameters: that training changes.
        kept: what autograd keeps of a token; None: not known.
        unknown: why not, in one line.
        copied: numbers of fused experts, of which LoRA on them makes a copy in each layer.
        notes: what a reader should know of its adapters.
    """

    lora: LoraConfig | None
    parameters: int
    kept: Kept | None
    unknown: str = ""
    copied: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelSize:
    """What costs follow from.

    Attributes:
        parameters: all of them, tied ones once.
        matmul: those that every token is multiplied with: no embeddings, no head.
        head: those of the output layer, which only answer tokens reach.
        layers: decoder layers; 0 where the configuration has no such field, as of the next.
        width: hidden size.
        words: of the output layer.
        cached: numbers a token that generation keeps: the keys and values of all layers.
        attention_heads: 0 where the configuration has no such field.
        positions: for how many tokens there are learned positions; None where they rotate on.
        turning: the longest row whose rotary positions are as in shorter ones; None: any.
        recomputes: whether its layers can compute their activations again.
        unshared: why ranks cannot share its rows; None: nothing speaks against it.
        trained: a size for each way in which the run trains it.
    """

    parameters: int
    matmul: int
    head: int
    layers: int
    width: int
    words: int
    cached: int = 0
    attention_heads: int = 0
    positions: int | None = None
    turning: int | None = None
    recomputes: bool = True
    unshared: str | None = None
    trained: tuple[TrainedSize, ...] = ()

    def of(self, training: TrainingConfig) -> TrainedSize:
        """What that section trains."""
        (found,) = (size for size in self.trained if size.lora == training.lora)
        return found


def annotator(model: ModelConfig) -> PreTrainedModel:
    """A weak model under a fresh head, or those that it has, without memory."""
    config, tokenizer = load_config(model), load_tokenizer(model, distinct_pad=True)
    heads = (has_heads(config) and scoring_heads(config)) or 1
    return load_annotator_base(model, tokenizer, seed=0, heads=heads, device="meta")


def policy(model: ModelConfig) -> PreTrainedModel:
    """A causal language model, without memory."""
    return load_policy(model, device="meta")


def reward_model(model: ModelConfig) -> PreTrainedModel:
    """A trained one-label classifier, without memory."""
    return load_reward_model(model, device="meta")


Loader = Callable[[ModelConfig], PreTrainedModel]


def model_size(model: ModelConfig, load: Loader = policy) -> ModelSize:
    """The sizes of a model that is loaded in one of the three ways, but for those of a training.

    Raises:
        ModelError: as the loader; for a hub model without safetensors.
    """
    module = _skeleton(model, load)
    decoder = decoder_of(module)
    text = module.config.get_text_config()
    head = module.get_output_embeddings()
    return ModelSize(
        parameters=sum(p.numel() for p in module.parameters()),
        matmul=matmul_weights(decoder, text),
        head=head.weight.numel() if isinstance(head, nn.Linear) else 0,
        layers=whole_number(text, "num_hidden_layers"),
        width=whole_number(text, "hidden_size"),
        words=head.out_features if isinstance(head, nn.Linear) else 0,
        cached=_cached(text),
        attention_heads=whole_number(text, "num_attention_heads"),
        positions=_learned_positions(module),
        turning=turning_length(decoder),
        recomputes=bool(module.supports_gradient_checkpointing),
        unshared=unshared(module, model.max_length),
    )


def trained_size(model: ModelConfig, load: Loader, lora: LoraConfig | None) -> TrainedSize:
    """What training it under a section's own LoRA, or whole, changes and keeps.

    Raises:
        LoraError: for adapters that this model cannot have.
    """
    plain = _skeleton(model, load)
    module: nn.Module = plain
    copied, notes = 0, tuple[str, ...]()
    if lora is None:
        module.requires_grad_(True)
    else:
        adapted = add_lora(plain, lora, "logps" if load is policy else "scores", seed=0)
        refuse_unreadable(adapted, lora)
        notes, module = tuple(adapter_notes(adapted, lora)), adapted
    number = sum(p.numel() for p in module.parameters() if p.requires_grad)
    if lora is not None:
        copied = leave_experts(module)
    try:
        return TrainedSize(lora, number, kept_of_token(module), "", copied, notes)
    except FOREIGN_ERRORS as error:
        # Code that looks at values, or runs on no tensors without memory: the training may well.
        return TrainedSize(lora, number, None, one_line(error), copied, notes)


def _cached(config: object) -> int:
    """Keys and values of a token in all layers; more than a window or a state space keeps."""
    heads = whole_number(config, "num_key_value_heads")
    heads = heads or whole_number(config, "num_attention_heads")
    return 2 * whole_number(config, "num_hidden_layers") * heads * head_width(config)


def _learned_positions(module: PreTrainedModel) -> int | None:
    """How many tokens a table of absolute positions (OPT, GPT-2) has room for.

    RoBERTa and its like count from behind their pad token, which their table has a row for.
    """
    limit = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    for name, layer in decoder_of(module).named_modules():
        is_table = isinstance(layer, nn.Embedding) and ("position" in name or name.endswith("wpe"))
        if limit and is_table and layer.num_embeddings >= limit:
            skipped = 0 if layer.padding_idx is None else layer.padding_idx + 1
            return int(min(limit, layer.num_embeddings - skipped))
    return None


def _skeleton(model: ModelConfig, load: Loader) -> PreTrainedModel:
    return _from_hub(model, load) if is_hub_id(model.model_name_or_path) else load(model)


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
        cut_layers(config, model)
    kind: Any = AutoModelForCausalLM if load is policy else AutoModelForSequenceClassification
    made = skeleton(model, config, kind)
    if load is policy:
        refuse_unfit(model, made)
    return made
