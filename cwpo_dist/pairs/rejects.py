"""Why a row is set aside: the reasons, their remedies, and the error past too many of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from cwpo_dist.pairs.records import REJECT_SCHEMA, Reject, table_of
from cwpo_dist.storage import Store


class Reason(StrEnum):
    """The reasons of rejects; a field may follow, as in `missing field: chosen`."""

    MALFORMED = "malformed line"
    DAMAGED = "damaged file"
    NOT_MAPPING = "not a mapping"
    UNICODE = "invalid Unicode"
    MISSING = "missing field"
    TYPE = "wrong type"
    KEPT = "cannot be kept"
    KEYS = "no message"
    ROLE = "unknown role"
    CONTENT = "no content"
    NOT_TEXT = "not text"
    MEDIA = "image, sound or video"
    TOOLS = "bad tools"
    UNREADABLE = "unreadable messages"
    WRITTEN = "messages as text"
    SYSTEMS = "two system messages"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_ANSWER = "empty answer"
    IDENTICAL = "identical answers"
    PREFIXES = "differing prefixes"
    NO_ASSISTANT = "no assistant turn"
    NOT_TRANSCRIPT = "not a transcript"
    LABEL = "bad label value"
    VOTES = "bad votes"
    WHOSE = "whose votes"
    ALONE = "one response"
    LENGTHS = "differing lengths"
    RATING = "bad rating"
    RATED_TWICE = "differing ratings"
    TOO_MANY = "too many pairs"
    IN_TEST = "prompt also in test"
    IN_VALIDATION = "prompt also in validation"


_CORRECT = "correct or remove these rows"
_OVERLAP = "remove the overlap between sources or groups, or split by hash (no `into`, no group)"
REMEDIES: dict[Reason, str] = {
    Reason.MALFORMED: "check that the file is what its name says: one JSON object a line, or CSV "
    "(in which a quote that is never closed takes the lines behind it; a broken element of a JSON "
    "array takes those behind it, too)",
    Reason.DAMAGED: "get the file again, then run the same command; all rows behind the damage "
    "count as one",
    Reason.NOT_MAPPING: "each row must be an object with named fields",
    Reason.UNICODE: "write the file as UTF-8, without half characters (\\ud800 to \\udfff with no "
    "partner)",
    Reason.MISSING: "name the column under prepare.sources.N.columns, or fill it",
    Reason.TYPE: "prompts and answers are strings or messages; responses, scores and ranks are "
    "lists; name the columns that hold them under prepare.sources.N.columns, or set "
    "prepare.sources.N.format",
    Reason.KEPT: "a kept column holds text, numbers, booleans, dates, or lists and objects of "
    "them; spell other values as text in the source, or leave the column out of "
    "prepare.keep_columns",
    Reason.KEYS: "a message has role and content, or from and value; rename its keys",
    Reason.ROLE: "roles are system, developer, user, assistant and tool, or names that people "
    "give them (human, gpt, …); rename this one",
    Reason.CONTENT: "a message says something, unless it calls a tool; fill its content",
    Reason.NOT_TEXT: "what a message says is text, or a list of parts that are text; spell it so",
    Reason.MEDIA: "pairs are of text; leave out rows with images, sound or video, or set "
    "prepare.sources.N.columns: {images: null} where the text stands without them",
    Reason.TOOLS: "tools and tool calls are lists of objects with a function's name (or the JSON "
    "text of one); correct these rows, or set prepare.sources.N.columns: {tools: null}",
    Reason.UNREADABLE: "its column holds message lists written as text (JSON, or Python's); "
    + _CORRECT,
    Reason.WRITTEN: "its column holds text, but this row has messages written as text; put them "
    "into a source of their own, or set prepare.sources.N.format: text to train on them as text",
    Reason.SYSTEMS: "the system column and the conversation's system message differ; keep one, or "
    "set prepare.sources.N.columns: {system: null}",
    Reason.EMPTY_PROMPT: "the first answer token needs a prompt before it; " + _CORRECT,
    Reason.EMPTY_ANSWER: _CORRECT,
    Reason.IDENTICAL: "two equal answers carry no preference; " + _CORRECT,
    Reason.PREFIXES: "both answers must continue the same prompt; " + _CORRECT,
    Reason.NO_ASSISTANT: "each conversation must end in an assistant message",
    Reason.NOT_TRANSCRIPT: "transcripts begin with '\\n\\nHuman:'; set prepare.sources.N.format",
    Reason.LABEL: "say what the values mean: prepare.sources.N.columns: {label: {from: …, a: …, "
    "b: …, tie: …, none: …}}",
    Reason.VOTES: "votes are whole numbers from 0 to 1000000, all given or all null",
    Reason.WHOSE: "votes_a and votes_b belong to response_a and response_b, votes_chosen and "
    "votes_rejected to chosen and rejected, and nothing says which is which here; " + _CORRECT,
    Reason.ALONE: "a pair needs two responses that differ, to one prompt; " + _CORRECT,
    Reason.LENGTHS: "scores or ranks must be as many as the responses, in their order (null where "
    "one has none); " + _CORRECT,
    Reason.RATING: "scores and ranks are finite numbers; " + _CORRECT,
    Reason.RATED_TWICE: "a list has one response twice, with different scores or ranks; "
    + _CORRECT,
    Reason.TOO_MANY: "one row makes at most 100,000 pairs (all two of 447 responses); give shorter "
    "lists, or set prepare.pairing: best_worst, or adjacent",
    Reason.IN_TEST: _OVERLAP,
    Reason.IN_VALIDATION: _OVERLAP,
}
LONGEST_FOUND = 60  # letters
MOST_FOUND = 20  # different findings of one reason: a column of numbers would have one a row
OTHERS = "other values"


class BadRow(ValueError):
    """A row that cannot become a pair.

    Attributes:
        reason: the reason with its field, as it is written to `rejects/`.
        found: what stood there, in a few words; None where the reason says it all.
    """

    def __init__(self, reason: Reason, field: str = "", found: str | None = None) -> None:
        self.reason = f"{reason}: {field}" if field else str(reason)
        self.found = found
        super().__init__(self.reason if found is None else f"{self.reason} ({found})")


def shown(value: object) -> str:
    """A value as `found` says it: short, and what any file can hold."""
    if isinstance(value, Mapping):
        text = f"an object with {', '.join(map(str, value)) or 'no keys'}"
    elif isinstance(value, list):
        text = f"a list of {len(value)}"
    elif value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = repr(value[:LONGEST_FOUND]) if isinstance(value, str) else repr(value)
    return printable(text if len(text) <= LONGEST_FOUND else f"{text[:LONGEST_FOUND]}…")


class RejectsError(ValueError):
    """More rows were set aside than `max_reject_fraction` allows."""


def row_text(value: object) -> str:
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
        store.create_table(f"rejects/{name}", table_of(rejects, REJECT_SCHEMA))


@dataclass
class Tally:
    """How many rows were set aside, and what stood there.

    Attributes:
        reasons: rows by reason.
        found: by reason, rows by what was found; of each reason the first MOST_FOUND by name.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    found: dict[str, Counter[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, reasons: Mapping[str, int], found: Mapping[str, Mapping[str, int]]) -> Tally:
        """From what `plain` made."""
        return cls(Counter(reasons), {reason: Counter(each) for reason, each in found.items()})

    def plain(self) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
        """As JSON has it."""
        return dict(self.reasons), {reason: dict(each) for reason, each in self.found.items()}

    def add(self, reason: str, found: str | None = None) -> None:
        """Counts a row."""
        self.merge(Tally(Counter([reason]), {} if found is None else {reason: Counter([found])}))

    def merge(self, other: Tally) -> None:
        """Adds what was counted elsewhere."""
        self.reasons.update(other.reasons)
        for reason, values in other.found.items():
            seen = self.found.setdefault(reason, Counter())
            for value, count in values.items():
                seen[value if value in seen or len(seen) < MOST_FOUND else OTHERS] += count

    def without(self, reasons: Collection[str]) -> Tally:
        """The same but for some reasons."""
        counts = {reason: n for reason, n in self.reasons.items() if reason not in reasons}
        return Tally.of(counts, {reason: self.found.get(reason, {}) for reason in counts})

    def lines(self, most: int = 3) -> list[str]:
        """The most frequent reasons: how often, what was found, what to do; and how many more."""
        lines = [self._line(reason, count) for reason, count in self.reasons.most_common(most)]
        rest = [count for _, count in self.reasons.most_common()[most:]]
        return [*lines, f"  {sum(rest):,} × {len(rest)} other reasons"] if rest else lines

    def _line(self, reason: str, count: int) -> str:
        found = self.found.get(reason, Counter()).most_common(3)
        what = ", ".join(f"{value} in {n:,} rows" for value, n in found)
        return f"  {count:,} × {reason}{f' ({what})' if what else ''}: {remedy(reason)}"


def past_fault(fraction: float, rejects: Tally, rows_in: int, left: int) -> str | None:
    """Why so many rows that are set aside stop the stage; None where they do not.

    Args:
        fraction: `max_reject_fraction`.
        rejects: what was set aside.
        rows_in: of how many.
        left: what there is to go on with.
    """
    rejected = rejects.reasons.total()
    if left and rejected <= fraction * rows_in:
        return None
    share = f"{rejected} of {rows_in} rows ({rejected / max(rows_in, 1):.1%}) were set aside"
    bound = f"more than prepare.max_reject_fraction={fraction:g}" if left else "no pair is left"
    if not rejected:
        return f"prepare: {share}, but {bound}: lists whose responses are rated alike make none"
    return "\n".join([f"prepare: {share}, {bound}. Most frequent:", *rejects.lines()])


def refuse_past(fraction: float, rejects: Tally, rows_in: int, pairs: int, folder: str) -> None:
    """Stops the stage when too many rows were set aside.

    Raises:
        RejectsError: naming the most frequent reasons with their field, what was found, and remedy.
    """
    if fault := past_fault(fraction, rejects, rows_in, pairs):
        raise RejectsError(f"{fault}\n  see {folder}/rejects")


def remedy(reason: str) -> str:
    """What to do about a reason as it is written to `rejects/`."""
    return REMEDIES[Reason(reason.partition(": ")[0])]
