"""A record in; what each of its fields means, out, as its docstring says.

Cards and the reference pages tell people of columns in the words that stand at the record.
"""

from __future__ import annotations

import inspect
import re

_SECTION = re.compile(
    r"^(?:Attributes|Codes|Columns|Counts|Metrics):\n((?:[ ].*\n?|\n)+)", re.MULTILINE
)
_ENTRY = re.compile(r"^ {4}([\w/, *]+): ((?:.|\n {8})*)", re.MULTILINE)


def described(documented: object) -> dict[str, str]:
    """Name → meaning of what a docstring lists, in its order; `a, b: …` says the same of both."""
    text = inspect.getdoc(documented) or ""
    return {
        name: re.sub(r"\s+", " ", meaning).removesuffix(".")
        for section in _SECTION.findall(text)
        for names, meaning in _ENTRY.findall(section)
        for name in names.split(", ")
    }


def first_sentence(documented: object) -> str:
    """What a docstring says first."""
    return (inspect.getdoc(documented) or "").partition("\n\n")[0].replace("\n", " ")
