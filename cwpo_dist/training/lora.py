"""A model in, the same under LoRA out; and its adapter in, a folder in peft's format out."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from cwpo_dist.config import LoraConfig
from cwpo_dist.lm.identity import Identity
from cwpo_dist.lm.modules import unwrapped

Head = Literal["logps", "scores"]

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of an adapter's tensors, before the model's own names


class LoraError(ValueError):
    """Targets of LoRA that no folder could hold; the message names field and remedy."""


def add_lora(model: PreTrainedModel, lora: LoraConfig, head: Head, seed: int) -> PeftModel:
    """The model with fresh adapters; they alone (and an annotator's head) require gradients.

    Args:
        model: a causal LM, or a sequence classifier.
        lora: rank, scale, dropout, targets.
        head: 'scores' for a classifier, whose new head is trained whole.
        seed: of the adapters.

    Raises:
        LoraError: for a target that shares its weight with what is no embedding: no merged folder
            could say so.
    """
    settings = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        task_type=TaskType.CAUSAL_LM if head == "logps" else TaskType.SEQ_CLS,
    )
    tied = shared_weights(model)
    with torch.random.fork_rng(devices=[]), hushed_peft():
        torch.manual_seed(seed)
        # In the model's own precision: DeepSpeed wants one, and keeps the fp32 masters itself.
        adapted: Any = get_peft_model(model, settings, autocast_adapter_dtype=False)
    assert isinstance(adapted, PeftModel)
    _refuse_ties(adapted, tied)
    return adapted


@contextmanager
def hushed_peft() -> Iterator[None]:
    """Keeps back what peft warns of and we see to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it reads what transformers renamed
        # Merged, they get a weight each.
        warnings.filterwarnings("ignore", message="Model (with|has) `tie_word_embeddings=True`")
        # A merged layer's orientation is its own, whatever this flag of all layers says.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        yield


def load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """A base under the adapter of a folder, as peft loads it."""
    with hushed_peft():
        adapted: Any = PeftModel.from_pretrained(model, str(adapter))
    assert isinstance(adapted, PeftModel)
    return adapted


def lora_layers(adapted: PeftModel) -> dict[str, LoraLayer]:
    """The adapted layers by the names that they have in the plain model."""
    found = unwrapped(adapted).named_modules()
    return {name: layer for name, layer in found if isinstance(layer, LoraLayer)}


def shared_weights(model: nn.Module) -> list[set[str]]:
    """Names of parameters that are one tensor (tied embeddings), a set for each tensor.

    LoRA on one of two layers with a shared weight adapts that layer alone, so that merged the two
    have weights of their own.
    """
    names: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name)
    return [shared for shared in names.values() if len(shared) > 1]


def parted(model: PreTrainedModel, adapted: set[str]) -> list[set[str]]:
    """The shared weights of a plain model that its adapter parts, by the adapted weights' names."""
    return [shared for shared in shared_weights(model) if shared & adapted]


def untie(model: PreTrainedModel) -> None:
    """Gives the output embeddings a weight of their own; the configuration says so."""
    head: Any = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    say_untied(model.config)


def say_untied(config: Any) -> None:
    """Lets a configuration say that input and output embeddings differ."""
    for section in {id(c): c for c in (config, config.get_text_config())}.values():
        section.tie_word_embeddings = False


def _refuse_ties(adapted: PeftModel, tied: list[set[str]]) -> None:
    """Refuses targets that share a weight, but for input and output embeddings."""
    core = unwrapped(adapted)
    targets = {f"{name}.weight" for name in lora_layers(adapted)}
    embeddings = {id(core.get_input_embeddings()), id(core.get_output_embeddings())}
    names = {f"{name}.weight" for name, module in core.named_modules() if id(module) in embeddings}
    for shared in tied:
        if shared & targets and not shared <= names:
            target = min(shared & targets).removesuffix(".weight")
            others = ", ".join(sorted(shared - {f"{target}.weight"}))
            raise LoraError(
                f"lora.target_modules: {target!r} shares its weight with {others}, which "
                f"{type(core).__name__} cannot part when LoRA is merged; leave it out"
            )


def save_adapter(model: PeftModel, whole: dict[str, Tensor], folder: Path, base: Identity) -> None:
    """Writes adapter weights and configuration in peft's format.

    Args:
        model: the adapted model; its own weights are not read (they may be shards).
        whole: its trainable parameters by the model's names.
        folder: made if need be.
        base: what the configuration names as the model below; peft would name the folder that it
            was loaded from, which means nothing elsewhere.
    """
    for settings in model.peft_config.values():
        settings.base_model_name_or_path = base.reference
        settings.revision = base.revision
    model.save_pretrained(str(folder), state_dict=whole, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
