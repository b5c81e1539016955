"""The configuration's sections in; all their fields in words, as a page or one by one, out.

python -m cwpo_dist.config.reference docs/configuration.md
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

from pydantic.fields import FieldInfo

from cwpo_dist.config import Config, ConfigError, Section
from cwpo_dist.config.base import section_in
from cwpo_dist.config.type_words import in_words

Effect = Literal["yes", "no", "in part", "what is made", "field by field"]

# Of the run itself, which has no key: what only says where or who, and what chooses among results.
_OF_THE_RUN: Mapping[str, Effect] = {
    "output_dir": "no",
    "simulated_labels": "no",
    "arms": "what is made",
    "compare": "what is made",
}
# Outside their section's part of a key, and in the key in another way: a model as it is now, what
# writes answers, the seed of each annotator, the batch that is a product, what of a DeepSpeed
# section decides numbers.
_IN_ANOTHER_WAY: Mapping[str, Effect] = {
    "model": "yes",
    "models": "yes",
    "engine": "yes",
    "seeds": "yes",
    "folds": "yes",
    "per_device_train_batch_size": "yes",
    "gradient_accumulation_steps": "yes",
    "deepspeed": "in part",
}
_INTRODUCTION = """\
# Configuration

Every field of a configuration, from the models in `cwpo_dist/config/`; `make reference` writes
this page anew. `cwpo config --explain align.beta` says the same of one field, and `cwpo config
RUN.yaml` shows a whole configuration with its defaults. schema.json beside this page is its JSON
Schema, which `cwpo config --schema` prints: editors complete and check by it, once the first line
of a file is `# yaml-language-server: $schema=` and the schema's place.

What stands under *changes the result*:

- `yes`: another value makes another output, under a key of its own, and anew what reads that.
- `no`: it says where or how fast work is done, what is told of it, or when it is given up. Outputs
  that are there stay; numbers are the same, but for rounding and for what dropout hides.
- `in part`: what of it changes numbers acts like `yes`, the rest like `no`.
- `what is made`: it chooses which outputs there are.
"""


@dataclass(frozen=True)
class Described:
    """A field in words.

    Attributes:
        path: its dotted name, as an override spells it.
        field: what pydantic knows of it.
        effect: whether another value changes what comes out.
        section: that it holds, alone or in a list.
    """

    path: str
    field: FieldInfo
    effect: Effect
    section: type[Section] | None

    @property
    def name(self) -> str:
        """In its section."""
        return self.path.rpartition(".")[2]

    @property
    def default(self) -> str:
        """As YAML has it."""
        if self.field.is_required():
            return "required"
        value = self.field.get_default(call_default_factory=True)
        return "its defaults" if isinstance(value, Section) else _as_yaml(value)


def _as_yaml(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    if isinstance(value, str | date):
        return str(value)
    return json.dumps(value)


def described(
    section: type[Section] = Config, above: str = "", effect: Effect = "yes"
) -> Iterator[Described]:
    """The fields of a section, its own before those that it shares.

    Args:
        section: the whole configuration, or a part.
        above: its dotted name.
        effect: of the field that holds it.
    """
    own = section.__annotations__
    for name, field in sorted(section.model_fields.items(), key=lambda item: item[0] not in own):
        path = f"{above}.{field.alias or name}".removeprefix(".")
        inner, told = section_in(field.annotation), _effect(section, name, effect)
        if inner is not None and told == "yes":
            told = _of_all(inner, path)
        yield Described(path, field, told, inner)


def _effect(section: type[Section], name: str, above: Effect) -> Effect:
    if section is Config:
        return _OF_THE_RUN.get(name, "yes")
    if above in ("no", "what is made"):
        return above
    if name in section.compute_fields:
        return _IN_ANOTHER_WAY.get(name, "no")
    return "yes"


def _of_all(section: type[Section], path: str) -> Effect:
    effects = {each.effect for each in described(section, path)}
    return effects.pop() if len(effects) == 1 else "field by field"


def everything(
    section: type[Section] = Config, above: str = "", effect: Effect = "yes"
) -> Iterator[Described]:
    """All fields, each followed by those below it; a section as often as it can be given."""
    for each in described(section, above, effect):
        yield each
        if each.section is not None:
            yield from everything(each.section, each.path, each.effect)


def explained(name: str) -> str:
    """What there is to say of a field, and of a section's fields a line each.

    Raises:
        ConfigError: for a name that no field has.
    """
    known = {each.path: each for each in everything()}
    path = ".".join(part for part in name.split(".") if not part.isdecimal())  # places in lists
    if path not in known:
        raise ConfigError(f"{name}: no such field; {_suggestion(path, list(known))}")
    found = known[path]
    lines = [
        path,
        f"  type: {in_words(found.field, lambda _: 'a section').replace('`', '')}",
        f"  default: {found.default}",
        f"  what it is: {found.field.description}",
        f"  changes the result: {found.effect}",
    ]
    if found.section is not None:
        inner = described(found.section, path, found.effect)
        lines += ["", _sentence(found.section)]
        lines += [f"  {each.path} ({each.default}): {each.field.description}" for each in inner]
    return "\n".join(lines)


def _suggestion(path: str, known: list[str]) -> str:
    last = path.rpartition(".")[2]
    close = [each for each in known if each.endswith(f".{last}")][:3]
    close = close or difflib.get_close_matches(path, known)
    if close:
        return f"did you mean {', '.join(close)}?"
    return "docs/configuration.md has all, and `cwpo config --explain align` those of a section"


def _sentence(section: type[Section]) -> str:
    return (section.__doc__ or "").partition("\n")[0]


def page() -> str:
    """The page, in Markdown: a table a section, each section once, in the order of the file."""
    places: dict[type[Section], list[Described]] = {}
    for each in everything():
        if each.section is not None:
            places.setdefault(each.section, []).append(each)
    titles = {section: _title(section, found) for section, found in places.items()}
    parts = [_INTRODUCTION, _table(Config, "", "yes", titles)]
    for section, found in places.items():
        where = ", ".join(f"`{each.path}`" for each in found)
        given = f" Given as {where}." if len(found) > 1 else ""
        parts.append(f"## {titles[section]}\n\n{_sentence(section)}{given}\n")
        parts.append(_table(section, found[0].path, found[0].effect, titles))
    return "\n".join(parts)


def _title(section: type[Section], found: list[Described]) -> str:
    return found[0].path if len(found) == 1 else section.__name__.removesuffix("Config")


def _table(
    section: type[Section], above: str, effect: Effect, titles: Mapping[type[Section], str]
) -> str:
    def linked(inner: type[Section]) -> str:
        anchor = re.sub(r"[^\w-]", "", titles[inner].lower())
        return f"[{titles[inner]}](#{anchor})"

    rows = [
        f"| `{each.name}` | {_cell(in_words(each.field, linked))} | {_default(each)} "
        f"| {_cell(each.field.description or '')} | {each.effect} |\n"
        for each in described(section, above, effect)
    ]
    head = "| field | type | default | what it is | changes the result |\n|---|---|---|---|---|\n"
    return head + "".join(rows)


def _default(each: Described) -> str:
    told = each.default
    return told if told in ("required", "its defaults") else f"`{told}`"


def _cell(text: str) -> str:
    return re.sub(r"[|*<]", r"\\\g<0>", text)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
