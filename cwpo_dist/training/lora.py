"""A model in, the same under LoRA out; and its adapter in, a folder in peft's format out."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import (
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from cwpo_dist.config import LoraConfig
from cwpo_dist.lm.foreign import FOREIGN_ERRORS, model_fault
from cwpo_dist.lm.identity import Identity
from cwpo_dist.lm.modules import unwrapped
from cwpo_dist.training.targets import LoraError, left_out, targets, unknown_target

Head = Literal["logps", "scores"]

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of an adapter's tensors, before the model's own names


def add_lora(model: PreTrainedModel, lora: LoraConfig, head: Head, seed: int) -> PeftModel:
    """The model with fresh adapters; they alone (and an annotator's head) require gradients.

    Fused experts take no dropout: there it is left out, and other layers have it.

    Args:
        model: a causal LM, or a sequence classifier.
        lora: rank, scale, dropout, targets.
        head: 'scores' for a classifier, whose new head is trained whole.
        seed: of the adapters.

    Raises:
        LoraError: for a name that nothing in the model has, what peft cannot adapt, and a target
            that shares its weight with what is no embedding: no merged folder could say so.
    """
    found = targets(model, lora)
    former = {target: unknown_target(model, target) for target in found.once}
    settings = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=0.0,  # peft refuses experts with any: set below
        target_modules=found.modules,
        target_parameters=found.parameters or None,
        rank_pattern=found.ranks,
        alpha_pattern=found.alphas,
        task_type=TaskType.CAUSAL_LM if head == "logps" else TaskType.SEQ_CLS,
    )
    tied = shared_weights(model)
    with torch.random.fork_rng(devices=[]), hushed_peft():
        torch.manual_seed(seed)
        try:
            # In the model's own precision: DeepSpeed wants one, and keeps the fp32 masters itself.
            adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
        except FOREIGN_ERRORS as error:
            raise LoraError(
                f"lora.target_modules: {lora.target_modules!r}: peft cannot adapt "
                f"{type(model).__name__}: {model_fault(error)}; name others, or train it whole "
                "(lora: null)"
            ) from error
    assert isinstance(adapted, PeftModel)
    for target, refusal in former.items():  # peft takes it for experts, or passes it over
        if target in (_settings(adapted).target_modules or ()):
            raise refusal
    _refuse_ties(adapted, tied)
    _set_dropout(adapted, lora.lora_dropout)
    return adapted


def _settings(model: PeftModel) -> PeftLoraConfig:
    """What peft made of ours."""
    settings = model.peft_config["default"]
    assert isinstance(settings, PeftLoraConfig)
    return settings


def _set_dropout(model: PeftModel, probability: float) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    plain = [layer for layer in layers if not isinstance(layer, ParamWrapper)]
    if len(plain) == len(layers):  # else peft would refuse to load the adapter again
        _settings(model).lora_dropout = probability
    for layer in plain if probability else []:
        layer.lora_dropout["default"] = nn.Dropout(probability)


def adapter_notes(model: PeftModel, lora: LoraConfig) -> Iterator[str]:
    """What a section asks for and peft does not do in this architecture."""
    fused = any(isinstance(layer, ParamWrapper) for layer in model.modules())
    if fused and lora.lora_dropout:
        yield (
            f"lora_dropout {lora.lora_dropout:g} is left out on the fused experts, which peft "
            "gives none; other layers have it"
        )
    if lora.target_modules == "all-linear" and (names := left_out(unwrapped(model))):
        yield (
            f"all-linear gives no adapter to {', '.join(names)} outside the experts: peft takes "
            "these names for the experts' own"
        )


def refuse_unreadable(model: PeftModel, lora: LoraConfig) -> None:
    """Refuses adapters that peft itself could not load again from their file.

    transformers renames tensors of some architectures as it loads them, and peft adapters with
    them: with an expression that meets another layer too, an adapter is lost.

    Args:
        model: from `add_lora`, on the meta device.
        lora: the section.

    Raises:
        LoraError: naming the layers.
    """
    found: Any = set_peft_model_state_dict(model, get_peft_model_state_dict(model))
    lost = [name.partition(".lora_")[0] for name in found.missing_keys if ".lora_" in name]
    if not lost:
        return
    layers = [name for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    leaves, rest = _leaves(lost), _leaves(name for name in layers if name not in lost)
    raise LoraError(
        f"lora.target_modules: {lora.target_modules!r}: peft would lose the adapters of "
        f"{', '.join(leaves)} when it reads them again; give names without these, of "
        f"{', '.join(name for name in rest if name not in leaves)}"
    )


def _leaves(names: Iterable[str]) -> dict[str, None]:
    """The last parts of names, each once, in their order."""
    return dict.fromkeys(name.rpartition(".")[2] for name in names)


def leave_experts(model: nn.Module) -> int:
    """Switches the adapters of fused experts off; the numbers of those experts.

    In each forward pass peft makes a copy of them with the adapter added, and autograd keeps it. It
    cannot do so without memory.
    """
    wrappers: list[Any] = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    for wrapper in wrappers:
        wrapper.enable_adapters(enabled=False)
    return sum(int(wrapper.get_param().numel()) for wrapper in wrappers)


@contextmanager
def hushed_peft() -> Iterator[None]:
    """Keeps back what peft warns of and we see to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it reads what transformers renamed
        # Merged, they get a weight each.
        warnings.filterwarnings("ignore", message="Model (with|has) `tie_word_embeddings=True`")
        # A merged layer's orientation is its own, whatever this flag of all layers says.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # It looks for them among modules, and takes them for parameters all the same.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        yield


def load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """A base under the adapter of a folder, as peft loads it."""
    with hushed_peft():
        adapted = PeftModel.from_pretrained(model, str(adapter))
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
    head = model.get_output_embeddings()
    assert isinstance(head.weight, Tensor)
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    say_untied(model.config)


def say_untied(config: PretrainedConfig) -> None:
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
