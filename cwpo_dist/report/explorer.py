"""A sample of pairs in, the JSON that the page's explorer reads out: bounded, and never markup."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import TypedDict


class Sample(TypedDict):
    """What `explorer.json` holds: how many pairs there are, and those that the page shows."""

    total: int
    annotators: list[str]
    arms: list[str]
    pairs: list[dict[str, object]]


EXPLORER = "explorer.json"  # of a run directory: the sample
MOST_PAIRS = 600
MOST_LETTERS = 4000  # of one text
MOST_BYTES = 3_000_000  # of all pairs: the page stays below 5 MB, plots and tables included


def script_of(name: str) -> str:
    """A page's script, behind the functions that all pages share."""
    files = (Path(__file__).parent / each for each in ("shown.js", name))
    return "".join(file.read_text(encoding="utf-8") for file in files)


SCRIPT = script_of("explorer.js")
# What could end the element that holds the JSON, or what old parsers take for the end of a line.
_ESCAPES = {c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def shortened(text: str) -> str:
    """A text that people can look at; what is left out is said at its end."""
    if len(text) <= MOST_LETTERS:
        return text
    return f"{text[:MOST_LETTERS]} […{len(text) - MOST_LETTERS:,} more characters]"


def embedded(sample: Sample) -> tuple[str, int]:
    """The sample as JSON that can stand in a page as it is, and how many of its pairs fit.

    A lone surrogate, which no page can hold, is written as its escape.
    """
    pairs, size = [], 0
    for pair in sample["pairs"]:
        text = embedded_json(pair)
        size += len(text.encode())
        if size > MOST_BYTES:
            break
        pairs.append(text)
    rest = {name: value for name, value in sample.items() if name != "pairs"}
    return f'{embedded_json(rest)[:-1]},"pairs":[{",".join(pairs)}]}}', len(pairs)


def embedded_json(value: object) -> str:
    """A value as JSON that can stand in a page as it is."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    safe = "".join(_ESCAPES.get(c, c) for c in text) if _ESCAPES.keys() & set(text) else text
    return safe.encode("utf-8", "backslashreplace").decode()


def hash_of(script: str) -> str:
    """Of the one script that a page's security policy lets run."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
