"""Why a row is set aside: the reasons, their remedies, and the error past too many of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import pyarrow as pa

from cwpo_dist.pairs.records import REJECT_SCHEMA
from cwpo_dist.storage import Store


class Reason(StrEnum):
    """The reasons of rejects; a field may follow, as in `missing field: chosen`."""

    MALFORMED = "malformed line"
    DAMAGED = "damaged file"
    NOT_MAPPING = "not a mapping"
    UNICODE = "invalid Unicode"
    MISSING = "missing field"
    TYPE = "wrong type"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_ANSWER = "empty answer"
    IDENTICAL = "identical answers"
    PREFIXES = "differing prefixes"
    NO_ASSISTANT = "no assistant turn"
    NOT_TRANSCRIPT = "not a transcript"
    LABEL = "bad label value"
    VOTES = "bad votes"
    IN_TEST = "prompt also in test"
    IN_VALIDATION = "prompt also in validation"


_CORRECT = "correct or remove these rows"
_OVERLAP = "remove the overlap between sources or groups, or split by hash (no `into`, no group)"
REMEDIES: dict[Reason, str] = {
    Reason.MALFORMED: "check that the file is what its name says: one JSON object a line, or CSV",
    Reason.DAMAGED: "fetch the file again, then run the same command; its rest counts as one row",
    Reason.NOT_MAPPING: "each row must be an object with named fields",
    Reason.UNICODE: "write the file as UTF-8, without lone surrogates",
    Reason.MISSING: "name the column under prepare.sources.N.columns, or fill it",
    Reason.TYPE: "prompts and answers are strings, or lists of {role, content}; set "
    "prepare.sources.N.format to what they are",
    Reason.EMPTY_PROMPT: "the first answer token needs a prompt before it; " + _CORRECT,
    Reason.EMPTY_ANSWER: _CORRECT,
    Reason.IDENTICAL: "two equal answers carry no preference; " + _CORRECT,
    Reason.PREFIXES: "both answers must continue the same prompt; " + _CORRECT,
    Reason.NO_ASSISTANT: "each conversation must end in an assistant message",
    Reason.NOT_TRANSCRIPT: "transcripts begin with '\\n\\nHuman:'; set prepare.sources.N.format",
    Reason.LABEL: "label is a, b or null",
    Reason.VOTES: "votes are whole numbers from 0 to 1000000, both given or both null",
    Reason.IN_TEST: _OVERLAP,
    Reason.IN_VALIDATION: _OVERLAP,
}


class BadRow(ValueError):
    """A row that cannot become a pair.

    Attributes:
        reason: the reason with its field, as it is written to `rejects/`.
    """

    def __init__(self, reason: Reason, field: str = "") -> None:
        self.reason = f"{reason}: {field}" if field else str(reason)
        super().__init__(self.reason)


class RejectsError(ValueError):
    """More rows were set aside than `max_reject_fraction` allows."""


@dataclass(frozen=True)
class Reject:
    """One row of REJECT_SCHEMA: why, from which file, which row of it (from 1), and its text."""

    reason: str
    source: str
    position: int
    row: str


def row_text(value: Any) -> str:
    """A raw row as text that any file can hold: JSON in ASCII, other types by their `str`."""
    try:
        return json.dumps(value, default=str)
    except (ValueError, TypeError, RecursionError):  # cycles, odd keys, nesting beyond the stack
        return printable(str(type(value)))


def printable(text: str) -> str:
    """The text with whatever UTF-8 cannot hold spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def write_rejects(store: Store, name: str, rejects: Sequence[Reject]) -> None:
    """Writes `rejects/<name>` put-if-absent; nothing where there are none."""
    if rejects:
        rows = [asdict(reject) for reject in rejects]
        store.create_table(f"rejects/{name}", pa.Table.from_pylist(rows, schema=REJECT_SCHEMA))


def refuse_past(
    fraction: float, rejects: Mapping[str, int], rows_in: int, pairs: int, folder: str
) -> None:
    """Stops the stage when too many rows were set aside.

    Raises:
        RejectsError: naming the most frequent reasons with their field and remedy.
    """
    rejected = sum(rejects.values())
    if pairs and rejected <= fraction * rows_in:
        return
    top = Counter(rejects).most_common(3)
    lines = [f"  {count} × {reason}: {remedy(reason)}" for reason, count in top]
    share = f"{rejected} of {rows_in} rows ({rejected / max(rows_in, 1):.1%}) were set aside"
    bound = f"more than prepare.max_reject_fraction={fraction:g}" if pairs else "no pair is left"
    raise RejectsError(
        "\n".join([f"prepare: {share}, {bound}. Most frequent:", *lines, f"  see {folder}/rejects"])
    )


def remedy(reason: str) -> str:
    """What to do about a reason as it is written to `rejects/`."""
    return REMEDIES[Reason(reason.partition(": ")[0])]
