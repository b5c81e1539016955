"""The rows of one piece in; what became of them, and what is to be known of them, out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from cwpo_dist.pairs import kept_columns
from cwpo_dist.pairs.layout import Layout
from cwpo_dist.pairs.looks import has
from cwpo_dist.pairs.messages import extra_keys
from cwpo_dist.pairs.parsing import ParsedPair
from cwpo_dist.pairs.readers import Part, RawRow
from cwpo_dist.pairs.rejects import Tally
from cwpo_dist.pairs.row_forms import ListCounts, RowPairs
from cwpo_dist.pairs.unread import Unread, tree


@dataclass
class PieceSummary:
    """What became of one piece.

    Attributes:
        source: the source as the config spells it.
        rows_in: rows read.
        rejects: how many were set aside, by reason.
        found: what stood there, by reason, with how often.
        files: where its pairs lie.
        kept_types: the types of the values of each kept column.
        damaged: the inputs that could not be read to their end, with why.
        void: how many numbers of pairs cannot be used, by field and why.
        void_first: where the first of each stands.
        columns: rows with a value in a column that nothing reads.
        keys: rows whose messages have a key that nothing reads.
        message_keys: those that some message has beside role and content, and `tools`.
        votes_against: rows whose label goes against the votes.
        lists: what became of rows that hold lists of responses.
        responses: how many of these were set aside, by reason.
        responses_found: what stood there, by reason, with how often.
        late: the columns that the first rows of its source lack, and some row here has.
    """

    source: str = ""
    rows_in: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    found: dict[str, dict[str, int]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    kept_types: dict[str, list[str]] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    void: dict[str, int] = field(default_factory=dict)
    void_first: dict[str, str] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    keys: dict[str, int] = field(default_factory=dict)
    message_keys: list[str] = field(default_factory=list)
    votes_against: int = 0
    lists: dict[str, int] = field(default_factory=dict)
    responses: dict[str, int] = field(default_factory=dict)
    responses_found: dict[str, dict[str, int]] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)

    @property
    def unread(self) -> Unread:
        """What nothing reads."""
        return Unread(self.columns, self.keys)

    @property
    def tally(self) -> Tally:
        """What was set aside, and why."""
        return Tally.of(self.rejects, self.found)

    @property
    def of_lists(self) -> tuple[ListCounts, Tally]:
        """What became of lists, and why responses of them were set aside."""
        return ListCounts(**self.lists), Tally.of(self.responses, self.responses_found)


class Notes:
    """What is to be known of a piece's rows beside the rows themselves."""

    def __init__(self, layout: Layout) -> None:
        self.used = tree(layout.paths)
        self.unread = Unread()
        self._kept_types: dict[str, set[str]] = {column: set() for column in layout.kept}
        self._message_keys: set[str] = set()
        self._votes_against = 0
        self._void: Counter[str] = Counter()
        self._void_first: dict[str, str] = {}
        self._lists = ListCounts()
        self._late = set(layout.late)  # that no row had so far
        self._met = set[str]()

    def see(self, row: object) -> None:
        """Notes what a row holds, whatever becomes of it."""
        self.unread.note(row, self.used)
        if self._late and isinstance(row, Mapping):
            found = {path for path in self._late if has(row, path)}
            self._met |= found
            self._late -= found

    def add(self, made: RowPairs) -> None:
        """Notes a row of pairs."""
        self.unread.note_keys(made.unread)
        self._lists += made.counts or ListCounts()

    def add_pair(self, pair: ParsedPair, part: Part, raw: RawRow) -> None:
        """Notes a pair."""
        for why in pair.numbers.void:
            self._void[why] += 1
            self._void_first.setdefault(why, f"row {raw.position} of {part}")
        self._votes_against += pair.voted_against
        self._message_keys |= extra_keys((pair.prompt, pair.first, pair.second))
        if pair.tools is not None:
            self._message_keys.add("tools")
        for column, value in pair.kept.items():
            kind = kept_columns.value_type(value)
            if kind is not None:
                self._kept_types[column].add(kind)

    def write(self, summary: PieceSummary) -> None:
        """Puts it into the summary."""
        summary.kept_types = {name: sorted(types) for name, types in self._kept_types.items()}
        summary.columns, summary.keys = self.unread.columns, self.unread.message_keys
        summary.message_keys = sorted(self._message_keys)
        summary.votes_against = self._votes_against
        summary.void, summary.void_first = dict(self._void), self._void_first
        summary.lists = asdict(self._lists)
        summary.late = sorted(self._met)
