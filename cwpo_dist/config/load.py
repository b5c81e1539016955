"""YAML files and dotted overrides in, a validated configuration out; errors that name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cwpo_dist.config import Config, ConfigError, Pool
from cwpo_dist.config.faults import explained
from cwpo_dist.config.yaml_text import DEEPEST, parse_yaml, unusable
from cwpo_dist.redaction import HIDDEN, is_secret_name, redacted

_SHOWN = 100  # characters of an override
_MOST_BYTES = 2**20  # of a file; a configuration with everything in it has some 5,000


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, lays overrides over it from left to right, validates.

    An override is `key.sub=value` (the value is YAML), or another YAML file whose sections are
    merged into what was read before it; so data, models and hyperparameters can live apart.

    Raises:
        ConfigError: for a missing file, bad YAML, an unknown key or a bad value; the message has
            one line per fault: field, value, remedy.
    """
    return overlaid(_read_yaml(path), overrides)


def overlaid(data: dict[str, object], overrides: list[str] | None) -> Config:
    """The configuration of a plain dictionary with overrides laid over it, as `load_config`."""
    for override in overrides or []:
        if "=" not in override and override.endswith((".yaml", ".yml")):
            _merge(data, _read_yaml(override))
        else:
            _apply(data, override)
    return parse_config(data)


def _read_yaml(path: str | Path) -> dict[str, object]:
    try:
        text = _text(Path(path))
    except FileNotFoundError:
        raise ConfigError(f"config: no file {str(path)!r}; see jobs/recipes for examples") from None
    except (OSError, ValueError) as error:  # no UTF-8, or a name that no file can have
        raise ConfigError(f"config: cannot read {str(path)!r}: {error}; give a YAML file") from None
    data = parse_yaml(text, f"config: {str(path)!r}")
    if not isinstance(data, dict):
        raise ConfigError(f"config: {str(path)!r} must hold a mapping of sections")
    return data


def _text(path: Path) -> str:
    """What a file says; a named pipe would be waited for, and a device may have no end."""
    if path.is_fifo() and path.parts[:2] not in (("/", "dev"), ("/", "proc")):  # as `<(…)` is there
        raise OSError("it is a named pipe")
    with path.open("rb") as file:
        read = file.read(_MOST_BYTES + 1)
    if len(read) > _MOST_BYTES:
        raise OSError(f"it has more than {_MOST_BYTES:,} bytes")
    return read.decode("utf-8")


def _merge(data: dict[str, object], over: dict[str, object]) -> None:
    """Lays `over` on `data` in place: mappings merge, everything else is replaced."""
    if over.get("pools"):
        _drop_single_pool(data)
    for key, value in over.items():
        section = data.get(key)
        if isinstance(value, dict) and isinstance(section, dict):
            _merge(section, value)
        else:
            data[key] = value


def _drop_single_pool(section: dict[str, object]) -> None:
    """Pools laid over a section (a recipe's, say) replace the one pool that it described."""
    for name in Pool.model_fields.keys() & section.keys():
        del section[name]


def parse_config(data: dict[str, object]) -> Config:
    """Validates a plain dictionary.

    Raises:
        ConfigError: one line per fault.
    """
    try:
        if faults := list(unusable(data)):
            raise ConfigError("\n".join(faults))
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explained(error.errors())) from None


def _apply(data: dict[str, object], override: str) -> None:
    """Sets `a.b.c=value` (also `a.0.b=value` for lists) in place."""
    dotted, separator, text = override.partition("=")
    names = dotted.split(".")
    if not separator or not all(names) or len(names) > DEEPEST:
        raise ConfigError(f"override {_shown(override)}: write key.sub=value, or name a YAML file")
    value = parse_yaml(text, f"override {_shown(override)}") if text else None
    *parents, last = names
    target: Any = data  # as YAML has it: what is no section fails below, by what it lacks
    try:
        for part in parents:
            target = _step_into(target, part)
        if last == "pools" and value:
            _drop_single_pool(target)
        target[int(last) if isinstance(target, list) else last] = value
    except (AttributeError, IndexError, TypeError, ValueError):
        raise ConfigError(
            f"override {_shown(override)}: there is no such place; the config has a single value "
            "or a shorter list on the way"
        ) from None


def _shown(override: str) -> str:
    """An override as a message repeats it, without the secret that may stand in it."""
    dotted, separator, value = override.partition("=")
    if separator and is_secret_name(dotted.rpartition(".")[2]):
        value = HIDDEN
    told = redacted(f"{dotted}{separator}{value}")
    return repr(told if len(told) <= _SHOWN else f"{told[:_SHOWN]}…")


def _step_into(target: Any, part: str) -> Any:
    """The section or list entry `part` of `target`; a missing section is made."""
    if isinstance(target, list):
        return target[int(part)]
    if target.get(part) is None:
        target[part] = {}
    return target[part]


def to_yaml(config: Config) -> str:
    """The whole configuration, defaults filled in, as `load_config` reads it."""
    data = config.model_dump(mode="json")
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
