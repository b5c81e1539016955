"""The bytes of a JSON file in; its rows out: its lines, or the elements of the one array it is.

A row is (position, value, text, fault): its line or element from 1, the parsed value (None where
there is a fault), how it stands in the file, and why it could not be read, if so. Of a damaged file
the whole rows before the damage come first, then the error.
"""

from __future__ import annotations

import io
import itertools
import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

from cwpo_dist.pairs.rejects import Reason

_READ_BYTES = 2**16

Row = tuple[int, object, str, Reason | None]


class _UntilDamage(io.RawIOBase):
    """A file that ends where it cannot be read any further, so that its bytes up to there come.

    Readers of several lines, or of all bytes, would lose what precedes an error in the same call.

    Attributes:
        damage: the error with which it ended.
    """

    def __init__(self, file: IO[bytes]) -> None:
        # Of those that read at most once a call, as all buffered ones do.
        self._file = cast(io.BufferedIOBase, file)
        self.damage: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.damage is not None:
            return 0
        try:
            data = self._file.read1(len(buffer))
        except Exception as error:  # noqa: BLE001 (raised again behind the rows before it)
            self.damage = error
            return 0
        buffer[: len(data)] = data
        return len(data)

    def rest(self, position: int, text: str) -> Row:
        """What an array ends in that is no element, as a fault; or the error that tore it."""
        if self.damage is not None:
            raise self.damage
        return position, None, text, Reason.MALFORMED

    def whole_lines(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """The lines before the damage, then its error; a last line that it tore is part of it."""
        for line in lines:
            if self.damage is not None and not line.endswith(b"\n"):
                break
            yield line
        if self.damage is not None:
            raise self.damage


def json_rows(file: IO[bytes], *, document: bool) -> Iterator[Row]:
    """All rows of a file, whose content says how they stand in it.

    Args:
        file: at its start.
        document: for `.json`, where what opens with a bracket is an array, and one object may
            span lines; what is called JSON lines is an array only where it cannot be lines.
    """
    tolerant = _UntilDamage(file)
    file = io.BufferedReader(tolerant, _READ_BYTES)
    head, first = _up_to_text(file)
    first = first.removeprefix(BOM_UTF8).lstrip()
    if first.startswith(b"["):
        more, second = _up_to_text(file)
        head += more
        if document or _is_array(first, second):
            whole = b"".join(head) + file.read()
            yield from _array_rows(whole.decode("utf-8-sig", "surrogateescape"), tolerant)
            return
    elif document and first.startswith(b"{") and _value(first) is None:
        whole = b"".join(head) + file.read()
        if (value := _value(whole)) is not None:
            yield 1, value, whole.decode("utf-8-sig"), None
            return
        file, head = io.BytesIO(whole), []
    yield from _numbered(tolerant.whole_lines(itertools.chain(head, file)), 1)


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


def _value(text: bytes) -> object:
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


def _array_rows(text: str, file: _UntilDamage) -> Iterator[Row]:
    """The elements of one JSON array; from the first malformed one on, the rest is one fault.

    Raises:
        Exception: the error with which the file ended, in place of that fault.
    """
    decoder = json.JSONDecoder()
    at = _skip_space(text, text.index("[") + 1)
    position = 1
    while text[at : at + 1] != "]":
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            yield file.rest(position, text[at:])
            return
        # What a tear leaves of a number may be a number.
        if file.damage is not None and end == len(text):
            raise file.damage
        yield position, value, text[at:end], None
        position += 1
        at = _skip_space(text, end)
        if text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
        elif text[at : at + 1] != "]":
            yield file.rest(position, text[at:])
            return
    if file.damage is not None or text[at + 1 :].strip():
        yield file.rest(position, text[at + 1 :])


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
