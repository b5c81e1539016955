"""The type of a field in, with its bounds; what may be given there, in words, out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from cwpo_dist.config.base import Section

_PLAIN = {
    int: "a whole number",
    float: "a number",
    str: "text",
    date: "a date",
    object: "anything",
}
_LARGEST = 2**63  # bounds every whole number, so that it need not be said

Named = Callable[[type[Section]], str]


def in_words(field: FieldInfo, named: Named) -> str:
    """What a field may be: `a number above 0, or null`.

    Args:
        field: of a section.
        named: what a section in it is called.
    """
    return _either(_choices(field.annotation, field.metadata, named))


def _either(choices: Iterable[str]) -> str:
    """`a, b or c`; what has parts stands last, so that nothing else seems to be one of them."""
    told = sorted(dict.fromkeys(choices), key=lambda choice: ":" in choice)
    if len(told) == 1:
        return told[0]
    return f"{', '.join(told[:-1])}{',' if ' ' in told[-2] else ''} or {told[-1]}"


def _choices(annotation: object, bounds: Sequence[object], named: Named) -> Iterator[str]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _choices(inner[0], [*_flat(inner[1:])], named)
    elif origin in (Union, UnionType):
        for each in inner:
            yield from _choices(each, bounds, named)
    elif origin is Literal:
        yield from (f"`{choice}`" for choice in inner)
    elif annotation is bool:
        yield from ("`true`", "`false`")
    elif annotation is NoneType:
        yield "`null`"
    else:
        yield _one(annotation, bounds, named)


def _flat(given: Iterable[object]) -> Iterator[object]:
    """Bounds, be they plain or those of a `Field` inside `Annotated`."""
    for each in given:
        yield from each.metadata if isinstance(each, FieldInfo) else [each]


def _one(annotation: object, bounds: Sequence[object], named: Named) -> str:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return named(annotation)
    if annotation in _PLAIN:
        assert isinstance(annotation, type)
        return f"{_PLAIN[annotation]}{_bounded(bounds)}"
    origin, inner = get_origin(annotation), get_args(annotation)
    parts = [_either(_choices(each, (), named)) for each in inner]
    if origin is list:
        return f"a list{_bounded(bounds)}: {parts[0]}"
    if origin is tuple:
        return f"a list of two: {'; '.join(parts)}"
    assert origin is dict, annotation
    return f"`name: value` lines, each value: {parts[1]}"


def _bounded(bounds: Sequence[object]) -> str:
    """` above 0 up to 1`; empty for none."""
    told = []
    for bound in bounds:
        if isinstance(bound, MinLen):
            told.append("that is not empty")
        elif isinstance(bound, Gt):
            told.append(f"above {_number(bound.gt)}")
        elif isinstance(bound, Ge):
            told.append(f"from {_number(bound.ge)}")
        elif isinstance(bound, Le):
            told.append(f"up to {_number(bound.le)}")
        elif isinstance(bound, Lt) and bound.lt != _LARGEST:
            told.append(f"below {_number(bound.lt)}")
    return f" {', '.join(told)}".replace(", up to", " up to") if told else ""


def _number(bound: object) -> str:
    assert isinstance(bound, int | float)
    return f"{bound:,.15g}"
