"""The text of a cell in; the messages, or the list of turns, that are written in it, out.

CSV files and string columns hold message lists as text: JSON, Python's own spelling (what pandas
writes of lists), or NumPy's (what it writes of a Parquet file's lists: no commas between items).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import TypeGuard

ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
TEXT_PARTS = ("text", "input_text", "output_text")
_OTHER_PARTS = (
    *("image", "image_url", "input_image", "audio", "audio_url", "input_audio"),
    *("video", "video_url", "file", "input_file"),
)
_BESIDE_CONTENT = ("tool_calls", "function_call")

# Python's parser takes about a hundred times the memory of the text that it reads.
LONGEST_PYTHON = 2**20
_KEY = re.compile("[\"'](?:" + "|".join((*ROLE_KEYS, "type")) + ")[\"']")
# No `*+` in it: around a group, CPython 3.11.2 (Debian 12) finds something else there.
_STRING_OR_BRACKET = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|["'{[(\]})]""", re.DOTALL)
_ARRAY = re.compile(r"array\((.*?)(?:,\s*dtype=\w+)?\)", re.DOTALL)


def decoded(text: str) -> object:
    """What a text spells in JSON, Python or NumPy.

    Raises:
        ValueError: where it spells nothing in any of them, or is too long for Python's parser.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if len(text) > LONGEST_PYTHON:
        raise ValueError(f"more than {LONGEST_PYTHON} letters that are not JSON")
    stripped = text.strip()
    array = _ARRAY.fullmatch(stripped)
    try:
        return _literal(array[1].strip() if array else stripped)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"neither JSON nor Python: {error}") from None


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except SyntaxError:
        if not text.startswith("["):
            raise
        return [ast.literal_eval(item) for item in _items(text[1:-1])]


def _items(text: str) -> list[str]:
    """The objects of a NumPy array, which spaces and line breaks part."""
    items, depth, start = [], 0, 0
    for found in _STRING_OR_BRACKET.finditer(text):
        mark, at = found[0], found.start()
        if mark in "{[(":
            start = start if depth else at
            depth += 1
        elif mark in ")]}":
            depth -= 1
            if depth == 0:
                items.append(text[start : at + 1])
        elif len(mark) == 1:  # what looks for its end takes the whole rest: once, not each time
            raise SyntaxError("a string has no end")
    if depth or not items:
        raise SyntaxError("not an array of objects")
    return items


def messages_in(text: str) -> object:
    """The message, list of messages or list of parts that a text spells; None for none of them."""
    if not text.lstrip().startswith(("[", "{", "array(")) or not _KEY.search(text):
        return None
    try:
        value = decoded(text)
    except ValueError:
        return None
    return value if is_conversation(value) or is_parts(value) else None


def parts_in(text: str) -> list[Mapping[str, object]] | None:
    """The parts of a content that a text spells; None where it is text."""
    if not text.lstrip().startswith("["):
        return None
    value = messages_in(text)
    return value if is_parts(value) else None


def is_parts(value: object) -> TypeGuard[list[Mapping[str, object]]]:
    """True for what can only be the parts of a content: texts, images, …, each with its type."""
    return isinstance(value, list) and bool(value) and all(map(_is_part, value))


def _is_part(value: object) -> bool:
    if not isinstance(value, Mapping) or any(key in value for key in ROLE_KEYS):
        return False
    kind = value.get("type")
    return (kind in TEXT_PARTS and "text" in value) or kind in _OTHER_PARTS


def listed(value: object) -> list[object] | None:
    """A list, or the one that a text spells; None for anything else."""
    if isinstance(value, str):
        try:
            value = decoded(value) if value.lstrip().startswith(("[", "array(")) else None
        except ValueError:
            return None
    return value if isinstance(value, list) else None


def turns_in(text: str) -> list[str] | None:
    """The list of strings that a text spells, a turn each; None where it spells none."""
    if text.lstrip()[:1] != "[":
        return None
    try:
        value = decoded(text)
    except ValueError:
        return None
    return value if is_turns(value) else None


def is_turns(value: object) -> TypeGuard[list[str]]:
    """True for a list of strings that are no messages: turns without their roles."""
    plain = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return bool(plain and value and not is_conversation(value))


def is_conversation(value: object) -> bool:
    """True for what can only be a message, or a list of them, also with each written as text."""
    if isinstance(value, Mapping):
        return _is_message(value)
    if not isinstance(value, list) or not value:
        return False
    return all(
        _is_message(item) or (isinstance(item, str) and _is_message(messages_in(item)))
        for item in value
    )


def _is_message(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    keys = (*CONTENT_KEYS, *_BESIDE_CONTENT)
    return any(key in value for key in ROLE_KEYS) and any(key in value for key in keys)
