"""A model's name or folder in, a checked Hugging Face model out, and back into a folder.

Weights come from safetensors alone, remote code never runs, and a checkpoint that lacks tensors is
refused by name instead of being filled with random numbers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from cwpo_dist.config import ModelConfig
from cwpo_dist.hub_names import is_hub_id
from cwpo_dist.lm.adapters import adapter_fault
from cwpo_dist.lm.foreign import FOREIGN_ERRORS, one_line, refused_as
from cwpo_dist.lm.heads import heads_fault, name_heads, scoring_heads
from cwpo_dist.lm.load_settings import attention_of, dtype_of, straight_to
from cwpo_dist.lm.pickles import other_weights
from cwpo_dist.lm.switches import remember_given, switch_off
from cwpo_dist.lm.unfit import unfit
from cwpo_dist.lm.unread_tensors import shown, tell_unread
from cwpo_dist.node_disk import staged
from cwpo_dist.storage import StorageError, Store

logger = logging.getLogger(__name__)

_KINDS: dict[type, tuple[Collection[str], str]] = {
    AutoModelForCausalLM: (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "causal language model"),
    AutoModelForSequenceClassification: (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "sequence classifier (which annotators are)",
    ),
}


class ModelError(ValueError):
    """A model that cannot be used; the message names field, value and remedy."""


def load_policy(model: ModelConfig, *, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A causal language model with its own dropout off, in eval mode.

    Args:
        model: where it is, its precision and how many layers are kept.
        device: moved there, and 'auto' precision is this device's; under ZeRO-3 its shards stay
            where DeepSpeed puts them.

    Raises:
        ModelError: when the folder, a tensor or a layer is missing, or it predicts no next tokens.
    """
    loaded = _load(AutoModelForCausalLM, model, device)
    refuse_unfit(model, loaded)
    return _placed(loaded, device)


def refuse_unfit(model: ModelConfig, loaded: PreTrainedModel) -> None:
    """Refuses what `AutoModelForCausalLM` loads and is none, or not as answers are read here.

    Raises:
        ModelError: saying why.
    """
    why = unfit(loaded)
    if why is not None:
        raise ModelError(
            f"model_name_or_path: {model.model_name_or_path!r}: {why}; give a causal language model"
        )


def load_reward_model(model: ModelConfig, *, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A sequence classifier that scores by its one label, or by several heads, complete with them.

    Raises:
        ModelError: as `load_policy`; also when it has another number of labels.
    """
    config = load_config(model)
    if scoring_heads(config) is None:
        kinds = ", ".join(config.architectures or [config.model_type])
        raise ModelError(
            f"model_name_or_path: {model.model_name_or_path!r} ({kinds}) has {config.num_labels} "
            "labels; give a reward model: AutoModelForSequenceClassification with num_labels=1"
        )
    return _placed(_load(AutoModelForSequenceClassification, model, device), device)


def classifier_skeleton(model: ModelConfig) -> PreTrainedModel:
    """The classifier that a model's configuration stands for, without memory or weights.

    Raises:
        ModelError: when there is no such model.
    """
    return skeleton(model, load_config(model), AutoModelForSequenceClassification)


def skeleton(model: ModelConfig, config: PretrainedConfig, kind: Any) -> PreTrainedModel:
    """What a configuration stands for as one kind of model, without memory or weights.

    Args:
        model: its name, for messages, and its attention.
        config: what is built.
        kind: an auto class of transformers.

    Raises:
        ModelError: when there is no such model.
    """
    with refused_as(lambda why: unloadable(model, config, kind, why)), torch.device("meta"):
        made: PreTrainedModel = kind.from_config(config, attn_implementation=attention_of(model))
    return made


def unloadable(model: ModelConfig, config: PretrainedConfig, kind: type, why: str) -> ModelError:
    """The refusal of a model that transformers did not make, and why in one line.

    Args:
        model: that was asked for.
        config: its configuration.
        kind: the auto class that was asked to make it.
        why: what it raised; of an architecture that it does not have, a list of all others.
    """
    names, what = _KINDS[kind]
    if config.model_type not in names:
        why = f"transformers has no {what} of {config.model_type}; give another architecture"
    return ModelError(f"model_name_or_path: {model.model_name_or_path!r}: {why}")


def load_annotator_base(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    heads: int = 1,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The weak model under one head or several: what Bradley-Terry training starts from.

    Heads that the checkpoint lacks are drawn from `seed` alone (normal, `initializer_range`); the
    global random state is neither read nor changed. A distinct pad token that the vocabulary lacks
    gets an embedding row, which no token ever sees.

    Args:
        model: the weak language model (or a classifier with these heads to train further).
        tokenizer: from `load_tokenizer(model, distinct_pad=True)`.
        seed: of the heads.
        heads: how many.
        device: as in `load_policy`.

    Raises:
        ModelError: as `load_policy`; also for a classifier with other heads, and when pad and EOS
            are one token, as Hugging Face's pooling would then skip the EOS that we score.
    """
    pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad_id is None or pad_id == eos_id:
        raise ModelError(
            f"tokenizer: pad token {tokenizer.pad_token!r} is none or the EOS token; load it with "
            "load_tokenizer(…, distinct_pad=True)"
        )
    if fault := heads_fault(load_config(model), heads):
        raise ModelError(f"model_name_or_path: {model.model_name_or_path!r} {fault}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = _load(AutoModelForSequenceClassification, model, device, new_heads=heads)
        if len(tokenizer) > loaded.config.get_text_config().vocab_size:
            loaded.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    loaded.config.pad_token_id = pad_id
    loaded.config.get_text_config().pad_token_id = pad_id
    embeddings = loaded.get_input_embeddings()
    if getattr(embeddings, "padding_idx", None) is not None:
        embeddings.padding_idx = pad_id  # else the old one, SmolLM2's EOS, would get no gradient
    return _placed(loaded, device)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Writes model (safetensors) and tokenizer, its chat template included, as one folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_path(name: str) -> str:
    """What `from_pretrained` takes: a local folder (a store's URI is staged), or a hub id.

    Raises:
        ModelError: for a path without a folder, or a URI that cannot be read.
    """
    place = name
    if "://" in name:
        try:
            place = str(staged(Store(name)))
        except StorageError as error:
            raise ModelError(f"model_name_or_path: {error}") from error
    path = Path(place).expanduser()
    if os.path.isdir(path):  # of pathlib's a name that is too long raises
        return str(path)
    if not is_hub_id(name):
        raise ModelError(
            f"model_name_or_path: no folder {name!r}; give a Hugging Face folder, a URI or a hub id"
        )
    return name


def load_config(model: ModelConfig) -> PretrainedConfig:
    """A model's configuration.

    Raises:
        ModelError: when it has none, is an adapter, or cannot hold its own pad token.
    """
    name, path = model.model_name_or_path, model_path(model.model_name_or_path)
    with refused_as(lambda why: ModelError(f"model_name_or_path: {name!r}: {why}")):
        adapter = find_adapter_config_file(path, revision=model.revision)
        if adapter is not None:
            raise ModelError(adapter_fault(name, Path(adapter)))
        config: PretrainedConfig = AutoConfig.from_pretrained(
            path, revision=model.revision, trust_remote_code=False
        )
        text = config.get_text_config()
        pad, words = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
        beyond = pad is not None and words is not None and pad >= words
    if beyond:
        raise ModelError(
            f"model_name_or_path: config.json of {name!r} has pad_token_id {pad}, but vocab_size "
            f"{words}: the model cannot be built; set pad_token_id to a token below {words}"
        )
    return config


def _load(
    kind: Any, model: ModelConfig, device: torch.device | str, *, new_heads: int = 0
) -> PreTrainedModel:
    """`from_pretrained` with our settings; refuses whatever is missing, but for new heads."""
    config = load_config(model)
    given = switch_off(config)
    if model.num_hidden_layers is not None:
        cut_layers(config, model)
    if new_heads:
        name_heads(config, new_heads)
    if fault := other_weights(model_path(model.model_name_or_path), model.revision):
        raise ModelError(f"model_name_or_path: {model.model_name_or_path!r}: {fault}")
    loaded: PreTrainedModel
    with refused_as(lambda why: unloadable(model, config, kind, why)), _quiet():
        loaded, report = kind.from_pretrained(
            model_path(model.model_name_or_path),
            config=config,
            revision=model.revision,
            dtype=dtype_of(model, device),
            attn_implementation=attention_of(model),
            trust_remote_code=False,
            use_safetensors=True,
            device_map=straight_to(device, new_head=new_heads > 0),
            output_loading_info=True,
        )
    _refuse_missing(model, loaded, report["missing_keys"], new_heads > 0)
    unread = report["unexpected_keys"]
    tell_unread(loaded, unread, model.num_hidden_layers, new_head=new_heads > 0)
    remember_given(loaded, given)
    return loaded


def cut_layers(config: PretrainedConfig, model: ModelConfig) -> None:
    """Cuts the configuration to its first N layers; later layers' tensors are then not read.

    Raises:
        ModelError: when it has fewer, or cannot be cut.
    """
    first = model.num_hidden_layers
    assert first is not None
    if first > config.num_hidden_layers:
        raise ModelError(
            f"num_hidden_layers: {first}, but {model.model_name_or_path!r} has "
            f"{config.num_hidden_layers}; ask for at most so many"
        )
    try:
        config.num_hidden_layers = first
        kinds = getattr(config, "layer_types", None)
        if kinds is not None and len(kinds) > first:  # else it follows from the number
            config.layer_types = kinds[:first]
        config.validate()  # as saving the trained model would
    except FOREIGN_ERRORS as error:
        raise ModelError(
            f"num_hidden_layers: {first}, but a {config.model_type} cannot be cut "
            f"({one_line(error)}); leave it out"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hushes transformers' loading report and bars: what they say, we check, or say, ourselves."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _refuse_missing(
    model: ModelConfig, loaded: PreTrainedModel, lacking: Collection[str], new_head: bool
) -> None:
    trunk = f"{loaded.base_model_prefix}."
    missing = sorted(lacking)
    if new_head:
        head = [name for name in missing if not name.startswith(trunk)]
        missing = [name for name in missing if name.startswith(trunk)]
        if head:
            logger.info("new head, drawn from the seed: %s", ", ".join(head))
    if missing:
        raise ModelError(
            f"model_name_or_path: {model.model_name_or_path!r} lacks the tensors {shown(missing)} "
            f"of {type(loaded).__name__}; give a complete checkpoint of that kind"
        )


def _placed(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    if not is_deepspeed_zero3_enabled():
        torch.nn.Module.to(model, device)
    return model
