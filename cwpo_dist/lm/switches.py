"""A model's configuration in, the same without what scoring must not have out; and back again.

Dropout would make log-probs random. What a model gives beside its states (attention weights, states
of all layers, a router's logits and the loss on them) costs memory, is read by nobody here, and
crashes some models in generation. The folder that a training leaves has all of it as it was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from transformers import PretrainedConfig, PreTrainedModel

Given = Mapping[tuple[str, str], object]  # of a section ('' or 'text') and a field: its value
_KEPT = "cwpo_given"  # on a model: what its configuration was given with


def switch_off(config: PretrainedConfig) -> Given:
    """Sets every dropout probability to 0 and leaves out all extra outputs.

    Returns:
        What was changed, as it was.
    """
    changed: dict[tuple[str, str], object] = {}
    if hasattr(config, "use_cache"):
        changed["", "use_cache"] = config.use_cache  # training will leave that out too
    for part, section in _sections(config):
        for name, value in [*vars(section).items(), ("output_attentions", _attentions(section))]:
            required = _required(name, value)
            if required is not None and required != value:
                changed[part, name] = value
                setattr(section, name, required)
    return changed


def remember_given(model: PreTrainedModel, given: Given) -> None:
    """Remembers, with the model, what its configuration was given with."""
    setattr(model, _KEPT, given)


def give_back(model: PreTrainedModel) -> None:
    """Sets a model's configuration to what it was given with, for the folder that it leaves."""
    given: Given = getattr(model, _KEPT, {})
    sections = dict(_sections(model.config))
    for (part, name), value in given.items():
        setattr(sections[part], name, value)


def unused_losses(config: PretrainedConfig) -> list[str]:
    """The fields by which a configuration asks for a loss of its own, which no objective has."""
    name = "output_router_logits"
    return [name] if any(getattr(section, name, False) for _, section in _sections(config)) else []


def _sections(config: PretrainedConfig) -> Iterator[tuple[str, PretrainedConfig]]:
    yield "", config
    text = config.get_text_config()
    if text is not config:
        yield "text", text


def _attentions(section: PretrainedConfig) -> bool:
    return bool(getattr(section, "output_attentions", False))  # a property in transformers 5


def _required(name: str, value: object) -> bool | float | None:
    """What a field must be; None: anything."""
    if isinstance(value, bool):
        if name == "return_dict":
            return True
        return False if name.startswith("output_") else None
    is_probability = isinstance(value, int | float)
    return 0.0 if is_probability and ("drop" in name or name.endswith("pdrop")) else None
