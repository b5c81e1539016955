"""A model that a run names, and the sections that train it, in; what it has, lacks and needs, out.

Nothing of it is computed and no weight is read. An estimate that cannot be made is unknown; what a
worker would refuse later is a fault now.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cwpo_dist.config import FitConfig, ModelConfig, TrainingConfig
from cwpo_dist.hub_names import is_hub_id
from cwpo_dist.lm.bounded import BoundError, at_most, bounded
from cwpo_dist.lm.encoder import Encoder
from cwpo_dist.lm.fitting import shortest_cut
from cwpo_dist.lm.heads import heads_fault
from cwpo_dist.lm.ids import ids_of
from cwpo_dist.lm.loading import ModelError, load_config, model_path
from cwpo_dist.lm.pickles import other_weights
from cwpo_dist.lm.reading import Role, encoder_for
from cwpo_dist.lm.switches import unused_losses
from cwpo_dist.lm.templates import Fault, TokenError
from cwpo_dist.lm.weights import bytes_of, folder_fault
from cwpo_dist.manifest import Manifest
from cwpo_dist.runs.output_key import Settings
from cwpo_dist.runs.sizes import (
    Loader,
    ModelSize,
    TrainedSize,
    annotator,
    model_size,
    policy,
    reward_model,
    trained_size,
)
from cwpo_dist.storage import StorageError, Store
from cwpo_dist.training.targets import LoraError

_ROLES: dict[Loader, Role] = {
    policy: "policy",
    annotator: "annotator",
    reward_model: "reward model",
}
_TOKENS_SHOWN = 5
# Seconds of a processor: the largest tokenizers load in two, but for those to be converted first.
_TOKENS_S, _CONVERTED_S, _MODEL_S = 10, 120, 300
# On which regular expressions that try all ways to read a run of letters do not end.
_LONG_TEXTS = tuple(f"{letter * 64}!" for letter in "a1 A\n.")


@dataclass(frozen=True)
class CheckedModel:
    """What is known of a model.

    Attributes:
        size: what its costs follow from; None beside faults.
        encoder: what turns pairs into its tokens; None beside faults.
        faults: one line each: field, value, remedy.
        notes: what a reader should know that is no fault.
    """

    size: ModelSize | None
    encoder: Encoder | None
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check_model(
    field: str, model: ModelConfig, load: Loader, sections: Mapping[str, TrainingConfig]
) -> CheckedModel:
    """What there is to say of one model.

    Args:
        field: that names it.
        model: where it is.
        load: in which of three ways it is loaded.
        sections: those that train it, by name.
    """
    name = model.model_name_or_path
    where = f"{field}.model_name_or_path: {name!r}: "
    try:
        path = Path(model_path(name)).absolute()  # `.` stands in every sentence
        if fault := _unfit_files(name, path, load):
            return CheckedModel(None, None, (where + fault,))
        local = (
            model.model_copy(update={"model_name_or_path": str(path)}) if path.is_dir() else model
        )
        found = bounded(
            lambda: _inspected(field, local, load, sections),
            bytes_of(path) if path.is_dir() else 0,
        )
        encoder = None if found.size is None else encoder_for(model, _ROLES[load])
    except (ModelError, TokenError) as error:
        return CheckedModel(None, None, (f"{field}.{error}",))
    except BoundError as error:
        return CheckedModel(None, None, (f"{where}{error}; give another model",))
    faults, notes = _as_given(found.faults, path, name), _as_given(found.notes, path, name)
    return CheckedModel(found.size, encoder, faults, notes)


def _unfit_files(name: str, path: Path, load: Loader) -> str | None:
    """Why what lies there is not loaded at all."""
    if path.is_dir() and (fault := other_weights(str(path), None) or folder_fault(path)):
        return fault
    if load is not reward_model or is_hub_id(name):
        return None
    return annotator_fault(Store(name.rstrip("/").rpartition("/")[0] or "."))


def _as_given(texts: Sequence[str], path: Path, name: str) -> tuple[str, ...]:
    """With the model's name as people gave it."""
    return tuple(text.replace(str(path), name) for text in texts)


def annotator_fault(output: Store) -> str | None:
    """Why the annotator in an output of `fit` cannot be given away; None also for other folders.

    Before the format of now, its template did not end at the EOS where it was scored: who reads it
    by that template, as everybody's reward models are read, gets other scores, and no error.
    """
    try:
        made = Manifest.read(output)
    except StorageError:  # none is there, or it is somebody else's file of this name
        return None
    if made.stage != "fit" or made.has_format(Settings.format):
        return None
    return (
        "another version of cwpo_dist fitted this annotator, and its chat template may not end "
        "where it is scored; fit it again with this version (`cwpo fit`)"
    )


def _inspected(
    field: str, model: ModelConfig, load: Loader, sections: Mapping[str, TrainingConfig]
) -> CheckedModel:
    """The same, but for the encoder; runs in a child with bounds, as strangers' code does here."""
    name = model.model_name_or_path
    try:
        with at_most(_TOKENS_S if Path(name, "tokenizer.json").exists() else _CONVERTED_S):
            encoder = encoder_for(model, _ROLES[load])
            for text in _LONG_TEXTS:
                ids_of(encoder.tokenizer, [text])
        with at_most(_MODEL_S):
            return _sized(field, model, load, sections, encoder)
    except (ModelError, TokenError) as error:
        unread = isinstance(error, TokenError) and error.fault is Fault.UNREAD
        whose = f"model_name_or_path: {name!r}: " if unread else ""
        return CheckedModel(None, None, (f"{field}.{whose}{error}",))


def _heads_faults(field: str, model: ModelConfig, training: FitConfig) -> Iterator[str]:
    """A weak model that has another number of heads than it is to be trained with."""
    unfit = heads_fault(load_config(model), training.heads)
    if unfit:
        yield f"{field}.model_name_or_path: {model.model_name_or_path!r} {unfit}"


def _sized(
    field: str,
    model: ModelConfig,
    load: Loader,
    sections: Mapping[str, TrainingConfig],
    encoder: Encoder,
) -> CheckedModel:
    size = model_size(model, load)
    faults = [*_length_faults(field, model, size, encoder)]
    faults += _token_faults(field, model, encoder)
    trained: list[TrainedSize] = []
    notes = [*_notes(field, model, size, encoder)]
    for name, training in sections.items():
        if load is annotator and isinstance(training, FitConfig):
            faults += _heads_faults(field, model, training)
        if training.gradient_checkpointing and not size.recomputes:
            faults.append(
                f"{name}.gradient_checkpointing: {model.model_name_or_path!r} has layers that "
                "cannot compute their activations again; set it to false"
            )
        faults += _sharing_faults(name, training, model, size)
        if any(each.lora == training.lora for each in trained):
            continue
        try:
            trained.append(trained_size(model, load, training.lora))
            notes += [f"{name}.lora: {note}" for note in trained[-1].notes]
        except LoraError as error:
            faults.append(f"{name}.{error}")
    return CheckedModel(replace(size, trained=tuple(trained)), None, tuple(faults), tuple(notes))


def _sharing_faults(
    name: str, training: TrainingConfig, model: ModelConfig, size: ModelSize
) -> Iterator[str]:
    """Workers that are to share rows, and cannot with this model."""
    shared = training.sequence_parallel_size
    if shared == 1:
        return
    field = f"{name}.sequence_parallel_size: {shared}: {model.model_name_or_path!r}"
    if size.unshared is not None:
        yield f"{field}: {size.unshared}; set it to 1"
    elif size.attention_heads % shared:
        yield f"{field} has {size.attention_heads} attention heads; give a number that divides them"


def _length_faults(
    field: str, model: ModelConfig, size: ModelSize, encoder: Encoder
) -> Iterator[str]:
    """Rows that are longer than a model has positions for, or too short to be cut to."""
    shortest = shortest_cut(encoder.closing)
    if model.over_length == "truncate" and model.max_length < shortest:
        yield (
            f"{field}.max_length: {model.max_length} leaves no room for prompt and answer; use at "
            f"least {shortest}"
        )
    if size.positions is not None and model.max_length > size.positions:
        yield (
            f"{field}.max_length: {model.max_length} tokens, but {model.model_name_or_path!r} has "
            f"positions for {size.positions}; lower it to at most {size.positions}"
        )


def _token_faults(field: str, model: ModelConfig, encoder: Encoder) -> Iterator[str]:
    """Tokens that stand in every row, and that the model has no embedding of."""
    beyond = _beyond(model, encoder)
    if not beyond:
        return
    try:
        row = encoder.encode("Q", ("x1", "y2"))
        met = any(
            number in beyond.values() for part in (row.prompt, *row.answers) for number in part
        )
    except TokenError as error:  # another fault is one of these texts, not of all
        met = error.fault is Fault.BEYOND
    if met:
        yield (
            f"{field}.model_name_or_path: {model.model_name_or_path!r}: its tokenizer has "
            f"{len(encoder.tokenizer)} tokens, but the model has embeddings of {_words(model)}, "
            f"none of {_shown(beyond)}, and every row meets one; resize the model "
            "(resize_token_embeddings(len(tokenizer))) and save it, or give the tokenizer and "
            "chat_template that it was trained with"
        )


def _notes(field: str, model: ModelConfig, size: ModelSize, encoder: Encoder) -> Iterator[str]:
    if size.turning is not None and model.max_length > size.turning:
        yield (
            f"{field}.max_length: the rotary positions of {model.model_name_or_path!r} turn in "
            f"rows of more than {size.turning} tokens: every answer is laid out by itself, with "
            f"its own; prompts are shared, which is faster, up to {size.turning}"
        )
    for name in unused_losses(load_config(model)):
        yield (
            f"{field}: config.json has {name}: true, which asks for a loss that balances experts; "
            "no objective here has it, and none is added"
        )
    beyond = _beyond(model, encoder)
    if beyond:
        grows = encoder.vocabulary > _words(model)
        then = "`fit` draws and trains new ones" if grows else "a pair with one is set aside"
        yield (
            f"{field}: its tokenizer has {len(encoder.tokenizer)} tokens, the model embeddings of "
            f"{_words(model)}, and none of {_shown(beyond)}; {then}"
        )


def _beyond(model: ModelConfig, encoder: Encoder) -> dict[str, int]:
    """The tokens that the model has no embedding of, but for the pad, which nobody sees."""
    words, tokenizer = _words(model), encoder.tokenizer
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    pad = tokenizer.pad_token_id
    found = [(token, n) for token, n in vocabulary.items() if n >= words and n != pad]
    return dict(sorted(found, key=lambda each: each[1]))


def _words(model: ModelConfig) -> int:
    return int(load_config(model).get_text_config().vocab_size)


def _shown(tokens: Iterable[str]) -> str:
    names = [repr(token) for token in tokens]
    more = f" and {len(names) - _TOKENS_SHOWN} more" if len(names) > _TOKENS_SHOWN else ""
    return ", ".join(names[:_TOKENS_SHOWN]) + more
