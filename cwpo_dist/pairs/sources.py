"""The `prepare` section in; what to read, how its rows spell a pair, and what identifies it out.

Everything that can be refused before a worker starts is refused here, from names, sizes and the
first rows of each source.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

from cwpo_dist.config import ConfigError, PrepareConfig, Source
from cwpo_dist.hub_names import is_hub_id
from cwpo_dist.pairs import columns, late_columns, refusals
from cwpo_dist.pairs.detected_format import format_of, written_in
from cwpo_dist.pairs.first_rows import FirstRows
from cwpo_dist.pairs.layout import Layout
from cwpo_dist.pairs.listing import LeftOut, left_out_lines
from cwpo_dist.pairs.locate import find
from cwpo_dist.pairs.numbers import RECORD
from cwpo_dist.pairs.peeked import Peeked, peek
from cwpo_dist.pairs.pieces import Piece
from cwpo_dist.pairs.readers import Part, Reader, compression_of
from cwpo_dist.pairs.records import Kind
from cwpo_dist.pairs.rejects import BadRow, Tally
from cwpo_dist.pairs.row_forms import growth, parse_raw
from cwpo_dist.pairs.stored import answer_schema, pair_schema, whole_schema
from cwpo_dist.pairs.transcripts import is_transcript

logger = logging.getLogger(__name__)

Fingerprint = Collection[object]  # marks of files, or a hub data set's id and revision

# What gives labels to pairs that have none, whatever share of them may be used.
MAP_LABELS = (
    "name their column under prepare.sources.N.columns (label; or chosen and rejected), if there "
    "is one"
)
# One task holds one bucket in memory, some four times its text: as read, as sorted, with its ids.
BUCKET_BYTES = 32 * 2**20
# Text is about so much longer than its compressed file.
_EXPANSION: dict[Reader, int] = {"parquet": 4, "arrow": 2, "saved": 1, "hub": 1}
_COMPRESSED = 4
_COLUMNAR: set[Reader] = {"parquet", "saved", "hub"}  # whose objects have the same keys in all rows


@dataclass(frozen=True)
class Plan:
    """All that `prepare` will read.

    Attributes:
        pieces: one a source, all its inputs in their order; `cutting` makes tasks of them.
        kind: text when every source is text, else conversational (text rows become messages).
        n_buckets: ranges of pair ids, so many that one fits in a task's memory.
        may_leak: whether a prompt could lie on two sides, which draws by prompt rule out.
        names: the columns of each source, as its first rows have them.
        left_out: the files and splits that the sources do not read.
        notes: what should be known of the sources that is no fault.
    """

    pieces: tuple[Piece, ...]
    kind: Kind
    n_buckets: int
    may_leak: bool
    names: tuple[tuple[str, ...], ...]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """A line for each thing that a reader should know: what is left out, then the notes."""
        return (*left_out_lines(self.left_out), *self.notes)


def check(config: PrepareConfig) -> None:
    """Refuses what cannot work: missing files and columns, unknown formats.

    Raises:
        ConfigError: naming the field, what is there, and the remedy.
    """
    plan(config)


def source_fingerprints(config: PrepareConfig) -> list[Fingerprint]:
    """What identifies the inputs as they are now, without reading them; one entry a source.

    Raises:
        ConfigError: when a path leads nowhere.
    """
    return [_fingerprint(index, source) for index, source in enumerate(config.sources)]


def plan(config: PrepareConfig) -> Plan:
    """Finds the inputs and how their rows spell a pair.

    Raises:
        ConfigError: naming the field, what is there, and the remedy.
    """
    _check_settings(config)
    peeked = [
        peek(f"prepare.sources.{index}", source) for index, source in enumerate(config.sources)
    ]
    layouts = [_layout(each, config) for each in peeked]
    _check_kept_columns(config, peeked, layouts)
    layouts = _with_late(config, peeked, layouts)
    _check_pairing(config, layouts)
    _refuse_twice(peeked, [layout.columns for layout in layouts])
    kind = _kind(layouts)
    both = zip(peeked, layouts, strict=True)
    pieces = tuple(_piece(each, replace(layout, kind=kind)) for each, layout in both)
    return Plan(
        pieces,
        kind,
        _n_buckets(pieces, peeked),
        _may_leak(config),
        tuple(tuple(each.first.names) for each in peeked),
        tuple(each for one in peeked for each in one.found.left_out),
        (*_found_notes(peeked), *_late_notes(peeked, layouts)),
    )


def _found_notes(peeked: Sequence[Peeked]) -> Iterator[str]:
    return (one.found.note for one in peeked if one.found.note)


def _late_notes(peeked: Sequence[Peeked], layouts: Sequence[Layout]) -> Iterator[str]:
    for each, layout in zip(peeked, layouts, strict=True):
        if layout.late:
            yield late_columns.note(each.first, layout.late)


def _kind(layouts: Iterable[Layout]) -> Kind:
    return "text" if {each.format for each in layouts} == {"text"} else "conversational"


def _piece(peeked: Peeked, layout: Layout) -> Piece:
    """What is read of a source, whose first rows must be pairs."""
    _check_prompt(peeked.first, layout)
    _check_rows(peeked, layout)
    source = peeked.source
    return Piece(source.path, peeked.found.parts, layout, source.into, source.limit)


def _n_buckets(pieces: Sequence[Piece], peeked: Sequence[Peeked]) -> int:
    size = sum(
        growth(each.first.rows[: each.n_first], piece.layout) * sum(map(_text_bytes, piece.parts))
        for piece, each in zip(pieces, peeked, strict=True)
    )
    return max(1, math.ceil(size / BUCKET_BYTES))


def _may_leak(config: PrepareConfig) -> bool:
    sides = {source.into for source in config.sources}
    return len(sides) > 1 or (config.group_column is not None and sides == {None})


def _refuse_twice(peeked: Sequence[Peeked], columns: Sequence[Mapping[str, str]]) -> None:
    """Rows that two sources read alike would be merged, and their votes counted twice."""
    seen: dict[tuple[str, str], str] = {}
    for each, names in zip(peeked, columns, strict=True):
        for part in each.found.parts:
            key = os.path.realpath(str(part)), str(sorted(names.items()))
            if (first := seen.setdefault(key, each.first.field)) != each.first.field:
                raise ConfigError(
                    f"{each.first.field}.path: {part} is read by {first} as well, by the same "
                    "columns, so that its votes would count twice; leave it out of one of them"
                )


def _text_bytes(part: Part) -> int:
    packed = compression_of(part.uri) is not None
    return part.size * _EXPANSION.get(part.reader, _COMPRESSED if packed else 1)


def _fingerprint(index: int, source: Source) -> Fingerprint:
    if not is_hub_id(source.path):
        return list(find(f"prepare.sources.{index}", source).marks)
    if source.revision is None:
        _warn_unpinned(source.path)
    return source.model_dump(include={"path", "name", "data_dir", "split", "revision"})


@cache
def _warn_unpinned(path: str) -> None:
    logger.warning(
        "prepare.sources: hub data set %r has no revision; name a commit, or a rerun may read "
        "other rows under the same key",
        path,
    )


def _layout(peeked: Peeked, config: PrepareConfig) -> Layout:
    """How the source's rows spell a pair; the kind is the whole run's, and not known yet."""
    first, source = peeked.first, peeked.source
    most_unknown = config.max_reject_fraction
    found = columns.find(first, source.columns, most_unknown, config.pairing)
    written = written_in(first, found.columns)
    spelled = format_of(first, found.columns, source.format, written)
    names = dict(found.columns)
    if spelled == "hh":
        names.pop("history", None)  # transcripts hold their own
    named = (name for _, name in columns.named(source.columns))
    return Layout(
        names,
        spelled,
        "text",
        group=_group(peeked, config),
        kept=tuple(config.keep_columns),
        values=found.values,
        annotators=found.annotators,
        written=written,
        media=found.media,
        nulls_are_absent=any(part.reader in _COLUMNAR for part in peeked.found.parts),
        as_text=source.format == "text",
        pairing=config.pairing,
        late=tuple(name for name in named if not first.has(name)),
        missed=late_columns.missed(first, names, source.columns, found.annotators, config.pairing),
    )


def _check_prompt(first: FirstRows, layout: Layout) -> None:
    """Text without a prompt column must be transcripts, in a run of text."""
    if layout.format != "text" or "prompt" in layout.columns:
        return
    if layout.kind == "conversational":
        raise ConfigError(
            f"{first.field}.format: text transcripts cannot be mixed with conversational "
            "sources; set format: hh"
        )
    cells = (first.texts(name, layout.columns[name]) for name in layout.answers)
    if not any(map(is_transcript, itertools.chain.from_iterable(cells))):
        raise ConfigError(
            f"{first.field}.columns.prompt: {first.path!r} has no column 'prompt' and its "
            f"answers are no transcripts; it has {', '.join(first.names)}. Say which it is: "
            "columns: {prompt: …}"
        )


def _check_rows(peeked: Peeked, layout: Layout) -> None:
    """Where none of the first rows is a pair, what follows would be as bad."""
    tally = Tally()
    for raw in peeked.raws:
        try:
            parse_raw(raw, layout)
        except BadRow as bad:
            tally.add(bad.reason, bad.found)
        else:
            return
    raise refusals.no_pair(peeked.first, layout, tally)


def _check_pairing(config: PrepareConfig, layouts: Iterable[Layout]) -> None:
    """A setting that nothing reads would be taken for one that acts."""
    fields = {field for each in layouts for field in each.columns}
    if config.pairing != "given" and not fields & {"responses", "response"}:
        raise ConfigError(
            f"prepare.pairing: {config.pairing!r}, but no source has responses to make pairs of, "
            "whose column is named under columns: {responses: …} for lists, or {response: …} for "
            "one a row; each row is a pair: set it to given"
        )
    if {"score", "rank"} <= fields and config.pairing != "given":
        raise ConfigError(
            "prepare.sources: some rate a response by its score, and others by its rank, so that "
            "two of one prompt could not be compared; set one of them to null under columns"
        )


def _check_settings(config: PrepareConfig) -> None:
    held_out = config.validation_fraction + config.test_fraction
    if held_out > 1:
        raise ConfigError(
            f"prepare.validation_fraction + prepare.test_fraction = {held_out:g}: at most 1"
        )


def _check_kept_columns(
    config: PrepareConfig, peeked: Sequence[Peeked], layouts: Sequence[Layout]
) -> None:
    reserved = {*whole_schema("text").names, *pair_schema().names}
    if any("response" in layout.columns for layout in layouts):  # whose answers keep them, too
        reserved |= {*answer_schema("text").names}
    for name in config.keep_columns:
        if name in RECORD:
            raise ConfigError(
                f"prepare.keep_columns: {name!r} is read as the pair's own number and kept anyway; "
                "leave it out"
            )
        if name in reserved:
            raise ConfigError(
                f"prepare.keep_columns: {name!r} is a column of the record itself; rename it "
                "in the source"
            )
        if not any(map(partial(_may_keep, name), peeked)):
            raise refusals.no_column("prepare.keep_columns", peeked[0].first, name)


def _may_keep(name: str, peeked: Peeked) -> bool:
    there = name in peeked.first.names
    return there or ("." not in name and peeked.first.rest.may_have(name))


def _with_late(
    config: PrepareConfig, peeked: Sequence[Peeked], layouts: Iterable[Layout]
) -> list[Layout]:
    """The layouts, with the kept columns that no source has in its first rows."""
    late = tuple(
        name for name in config.keep_columns if not any(name in each.first.names for each in peeked)
    )
    return [replace(layout, late=(*layout.late, *late)) for layout in layouts]


def _group(peeked: Peeked, config: PrepareConfig) -> str | None:
    """The group column, which a source that goes to one side as a whole may lack."""
    head = peeked.first.rows[: peeked.n_first]  # without it all of them would be set aside
    if config.group_column is None or any(config.group_column in row for row in head):
        return config.group_column
    if peeked.source.into is None:
        raise refusals.no_column("prepare.group_column", peeked.first, config.group_column)
    return None
