"""The bytes of a JSON file in; its rows out: its lines, or the elements of the one array it is.

A row is (position, value, text, fault): its line or element from 1, the parsed value (None where
there is a fault), how it stands in the file, and why it could not be read, if so.
"""

from __future__ import annotations

import io
import itertools
import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from typing import IO, Any

from cwpo_dist.pairs.rejects import Reason

Row = tuple[int, Any, str, Reason | None]


def json_rows(file: IO[bytes], *, document: bool) -> Iterator[Row]:
    """All rows of a file, whose content says how they stand in it.

    Args:
        file: at its start.
        document: for `.json`, where what opens with a bracket is an array, and one object may
            span lines; what is called JSON lines is an array only where it cannot be lines.
    """
    head, first = _up_to_text(file)
    first = first.removeprefix(BOM_UTF8).lstrip()
    if first.startswith(b"["):
        more, second = _up_to_text(file)
        head += more
        if document or _is_array(first, second):
            whole = b"".join(head) + file.read()
            yield from _array_rows(whole.decode("utf-8-sig", "surrogateescape"))
            return
    elif document and first.startswith(b"{") and _value(first) is None:
        whole = b"".join(head) + file.read()
        if (value := _value(whole)) is not None:
            yield 1, value, whole.decode("utf-8-sig"), None
            return
        file, head = io.BytesIO(whole), []
    yield from _numbered(itertools.chain(head, file), 1)


def json_lines(file: IO[bytes], span: tuple[int, int], first: int) -> Iterator[Row]:
    """The lines that begin in a span of bytes; `first` is the number of the first of them."""
    at, stop = span
    if at:
        file.seek(at - 1)
        at += len(file.readline()) - 1  # what began before the span

    def within() -> Iterator[bytes]:
        nonlocal at
        for line in file:
            if at >= stop:
                return
            at += len(line)
            yield line

    yield from _numbered(within(), first)


def opens_bracket(file: IO[bytes]) -> bool:
    """True where a file may be one array, and so cannot be cut between its lines."""
    return file.read(4096).removeprefix(BOM_UTF8).lstrip().startswith(b"[")


def _up_to_text(file: IO[bytes]) -> tuple[list[bytes], bytes]:
    """The next lines, up to one with text in it; and that one, stripped."""
    lines = []
    for line in file:
        lines.append(line)
        if line.strip():
            return lines, line.strip()
    return lines, b""


def _is_array(first: bytes, second: bytes) -> bool:
    """Whether lines that open with a bracket are one array; else the first is a row by itself."""
    if first == b"[":
        return True
    return not second if _value(first) is not None else not isinstance(_value(second), dict)


def _value(text: bytes) -> Any:
    """The JSON value that the text is, None where it is none (or null)."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _numbered(lines: Iterable[bytes], first: int) -> Iterator[Row]:
    for position, line in enumerate(lines, first):
        if line.strip():
            yield _line_row(position, line.rstrip(b"\r\n"))


def _line_row(position: int, line: bytes) -> Row:
    try:
        text = line.decode("utf-8-sig" if position == 1 else "utf-8")
    except UnicodeDecodeError:
        return position, None, line.decode("utf-8", "backslashreplace"), Reason.UNICODE
    try:
        return position, json.loads(text), text, None
    except (ValueError, RecursionError):  # not JSON, a number too long, or nested too deep
        return position, None, text, Reason.MALFORMED


def _array_rows(text: str) -> Iterator[Row]:
    """The elements of one JSON array; from the first malformed one on, the rest is one fault."""
    decoder = json.JSONDecoder()
    at = _skip_space(text, text.index("[") + 1)
    position = 1
    while text[at : at + 1] != "]":
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            yield position, None, text[at:], Reason.MALFORMED
            return
        yield position, value, text[at:end], None
        position += 1
        at = _skip_space(text, end)
        if text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
        elif text[at : at + 1] != "]":
            yield position, None, text[at:], Reason.MALFORMED
            return
    if text[at + 1 :].strip():
        yield position, None, text[at + 1 :], Reason.MALFORMED


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
