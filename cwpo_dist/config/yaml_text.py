"""Text of YAML in, plain data out; bounds hold before anything is built, whoever wrote the text."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from urllib.parse import urlsplit

import yaml

from cwpo_dist.config import ConfigError
from cwpo_dist.redaction import redacted

DEEPEST = 32  # levels; a configuration has 6
_MOST_VALUES = 100_000  # once every alias stands for what it names
_LARGEST = 2**63  # what torch, NumPy and Arrow can hold
_SHOWN = 60  # characters of a value


def parse_yaml(text: str, what: str) -> object:
    """What a text of YAML says.

    Args:
        text: of one document.
        what: it is, for the message.

    Raises:
        ConfigError: for what is no YAML, or nests or repeats itself beyond all bounds.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506, a SafeLoader
    # PyYAML's constructors fail as Python does on `!!bool x`, `2020-13-01` or a 5000-digit number.
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as e:
        raise ConfigError(f"{what} is not valid YAML: {_at_line(e)}; correct it") from None


def _at_line(error: Exception) -> str:
    """What is wrong and where, without the line itself, in which a secret may stand."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return redacted(str(error) or type(error).__name__)
    marks = (error.problem_mark, error.context_mark)
    line = next((f" in line {mark.line + 1}" for mark in marks if mark is not None), "")
    said = ", ".join(part for part in (error.context, error.problem) if part)
    return redacted(f"{said}{line}")


class _Loader(yaml.SafeLoader):
    """Refuses a key that appears twice, where YAML would silently keep the last, and YAML bombs."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # by the node's identity

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # it has no types
        self._depth += 1
        if self._depth > DEEPEST:
            raise _refusal(f"more than {DEEPEST} levels, one inside the other", mark)
        node = super().compose_node(parent, index)
        assert node is not None  # its stubs know less
        self._depth -= 1
        if not is_alias:
            inside = [self._sizes[id(child)] for child in _inside(node)]
            self._sizes[id(node)] = 1 + sum(inside)
        elif id(node) not in self._sizes:
            raise _refusal("an alias of what it stands in, which has no end", mark)
        if self._sizes[id(node)] > _MOST_VALUES:
            raise _refusal(f"more than {_MOST_VALUES:,} values, aliases spelled out", mark)
        return node

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = key.value, key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _refusal(
                    "a list or a mapping as a key, where a name is wanted", key.start_mark
                )
            if name in lines:
                raise _refusal(f"{name} appears twice, in lines {lines[name]} and {line}; keep one")
            lines[name] = line
        return super().construct_mapping(node, deep)


def _inside(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


def _refusal(what: str, mark: yaml.Mark | None = None) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, what, mark)


def unusable(value: object, place: str = "") -> Iterator[str]:
    """A line for each value, or key, that no field can mean: field, value, remedy."""
    if isinstance(value, dict):
        for key, inner in value.items():
            name = ascii(key)[1:-1] if isinstance(key, str) else str(key)
            yield from _of_text(f"{place or 'config'}: key ", key) if isinstance(key, str) else ()
            yield from unusable(inner, f"{place}.{name}" if place else name)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from unusable(inner, f"{place}.{index}")
    else:
        yield from _of_value(f"{place}: ", value)


def _of_value(start: str, value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield from _of_text(start, value)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{start}{value}; give a finite number"
    elif isinstance(value, int) and abs(value) >= _LARGEST:
        yield f"{start}a number of {value.bit_length()} bits; give one of less than 64"


def _of_text(start: str, text: str) -> Iterator[str]:
    text = redacted(text)
    shown = ascii(text) if len(text) <= _SHOWN else ascii(text[:_SHOWN])[:-1] + "…'"
    if "\0" in text:
        yield f"{start}{shown} holds a NUL, which no path and no name can; remove it"
    elif any("\ud800" <= letter <= "\udfff" for letter in text):
        yield f"{start}{shown} cannot be written as UTF-8; rename it, or write it in UTF-8"
    elif "://" in text:
        try:
            urlsplit(text)
        except ValueError as error:
            yield f"{start}{shown} is not a URI ({error}); correct it"
