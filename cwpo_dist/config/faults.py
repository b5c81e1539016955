"""Pydantic's faults of a configuration in; each field, value and remedy in our own words out."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Sequence

from pydantic_core import ErrorDetails

from cwpo_dist.config import Config, Section
from cwpo_dist.config.base import section_in

_NUMBER, _WHOLE, _TRUTH = "a number", "a whole number", "true or false"
_SECTION = "a section, `key: value` lines below it, or leave it out"
# By pydantic's name of a fault: what to give instead; in braces its context.
_REMEDIES = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), _WHOLE),
    **dict.fromkeys(("float_type", "float_parsing"), _NUMBER),
    **dict.fromkeys(("bool_type", "bool_parsing"), _TRUTH),
    "list_type": "a list, such as [a, b]",
    "tuple_type": "a list of two, [min, max]",
    "missing": "one more entry",
    "string_too_short": "a name",
    "string_type": "text, in quotes where it looks like something else",
    "dict_type": "`key: value` lines below it",
    "literal_error": "{expected}",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "finite_number": "a finite number",
    "too_short": "{min_length} or more entries",
    "too_long": "at most {max_length} entries",
}
# How pydantic names the kinds that a field may be of, at the end of a fault's place.
_KIND = re.compile(r"constrained-\w+|(tuple|list|dict|literal)\[.*\]|int|float|str|bool")
_LONGEST_VALUE = 60  # letters
_MOST_LINES = 30


def explained(faults: Sequence[ErrorDetails]) -> str:
    """One line a field, the first ones, in the order of the fields of the configuration."""
    fields: dict[str, list[ErrorDetails]] = {}
    for fault in faults:
        fields.setdefault(_field(fault["loc"]), []).append(fault)
    lines = [_line(field, found) for field, found in itertools.islice(fields.items(), _MOST_LINES)]
    more = len(fields) - len(lines)
    return "\n".join([*lines, *([f"… and {more} more; correct these first"] if more else [])])


def _field(loc: Sequence[str | int]) -> str:
    """The dotted name, without the kinds that the field might have been of."""
    parts = [str(part) for part in loc]
    end = next((k for k, part in enumerate(parts) if k and _KIND.fullmatch(part)), len(parts))
    return ".".join(parts[:end])


def _line(field: str, faults: Sequence[ErrorDetails]) -> str:
    fault = faults[0]
    if fault["type"] == "extra_forbidden":
        return f"{field}: unknown key; {_suggestion(fault['loc'])}"
    if fault["type"] == "invalid_key":
        return f"{field}: unknown key; keys are names: remove it"
    if fault["type"] == "missing" and _field(fault["loc"][:-1]) != field:
        return f"{field}: missing; add it to the config"
    if fault["type"] == "value_error":
        return _own_words(field, fault)
    remedies = dict.fromkeys(_remedy(field, fault) for fault in faults)
    return f"{field or 'config'}: {_shown(fault['input'])}; give {', or '.join(remedies)}"


def _own_words(field: str, fault: ErrorDetails) -> str:
    """What a validator of ours said; of a whole section it begins with the field's name."""
    message = str(fault["ctx"]["error"])
    if isinstance(fault["input"], dict):
        inside = message.split(":")[0] in (_section_at(fault["loc"]) or Config).model_fields
        return f"{field}{'.' if inside else ': '}{message}" if field else message
    return f"{field}: {message} (got {_shown(fault['input'])})"


def _remedy(field: str, fault: ErrorDetails) -> str:
    kind, given = fault["type"], fault["input"]
    if kind == "model_type":
        names_model = fault["ctx"]["class_name"] == "ModelConfig" and isinstance(given, str)
        return f"{field}.model_name_or_path: {given}" if names_model else _SECTION
    if kind == "list_type" and isinstance(given, str):
        return f"a list: [{given}]"
    if kind in _REMEDIES:
        return _REMEDIES[kind].format(**fault.get("ctx", {}))
    return str(fault["msg"]).removeprefix("Input should be ")


def _shown(value: object) -> str:
    """As YAML has it, and not too long."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except TypeError:  # a date as a key
        text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _suggestion(loc: Sequence[str | int]) -> str:
    """The key of that section that is spelled most like it."""
    section = _section_at(loc[:-1])
    fields = {} if section is None else section.model_fields
    known = [field.alias or name for name, field in fields.items()]
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"did you mean {close[0]!r}?" if close else "remove it or check its spelling"


def _section_at(loc: Sequence[str | int]) -> type[Section] | None:
    """The section at a place; None where there is none."""
    section: type[Section] | None = Config
    for part in loc:
        field = None if section is None else section.model_fields.get(str(part))
        if field is not None:  # not a place in a list
            section = section_in(field.annotation)
    return section
