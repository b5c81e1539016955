"""The first rows of a source that cannot be read in; the error that says what stands there out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from cwpo_dist.config import ConfigError
from cwpo_dist.pairs import column_names
from cwpo_dist.pairs.first_rows import FirstRows
from cwpo_dist.pairs.layout import ALONE, EACH, LISTS, Layout
from cwpo_dist.pairs.rejects import Tally, printable, shown
from cwpo_dist.pairs.verdicts import MOST_SHOWN, ValueMap, is_number, spelled

_SINGLE = (*column_names.ONE, "chosen")
_TAGS = ("label", "kto_tag", "rating", "score")


def no_column(field: str, first: FirstRows, name: str) -> ConfigError:
    """A column that is named, but not there."""
    return ConfigError(
        f"{field}: {first.path!r} has no column {name!r} in the {len(first.rows)} rows that were "
        f"looked at; it has {', '.join(first.names)}. Correct the name (our names are mapped to "
        "theirs under `columns:`)"
    )


def could_be_several(first: FirstRows, ours: str, found: Sequence[str]) -> ConfigError:
    """A field that several columns could be."""
    return ConfigError(
        f"{first.field}.columns.{ours}: {first.path!r} has {' and '.join(map(repr, found))}, which "
        f"could each be it; say which: columns: {{{ours}: …}}, or null for none"
    )


def not_read(first: FirstRows, ours: str, why: str) -> ConfigError:
    """A column of votes or labels that nothing ties to the answers."""
    return ConfigError(
        f"{first.field}.columns.{ours}: {why}. Name what belongs together: response_a, response_b, "
        "label, votes_a, votes_b; or chosen, rejected, votes_chosen, votes_rejected; null for what "
        "is not to be read"
    )


def says_nothing(first: FirstRows, ours: str, why: str) -> ConfigError:
    """A field that is named, and nothing reads."""
    return ConfigError(f"{first.field}.columns.{ours}: it {why}; leave it out")


def holds_lists(first: FirstRows, path: str, items: Sequence[object]) -> ConfigError:
    """A column of one response a row that holds lists of them."""
    return ConfigError(
        f"{first.field}.columns.response: {path!r} of {first.path!r} holds lists "
        f"({shown(items[0])} is in one); name it as a list of responses: columns: {{responses: "
        f"{path}}}, or the only one of each: {{response: {path}.0}}"
    )


def lists_of_one(first: FirstRows, columns: Mapping[str, str], *, rated: bool) -> ConfigError:
    """Rows with a list of a single response, of which no pair can be made.

    Args:
        first: the source's first rows.
        columns: those of responses and ratings.
        rated: whether ratings are read of one response a row.
    """
    one = zip(ALONE, LISTS, strict=True)
    named = {ours: _item(columns[many], 0) for ours, many in one if many in columns}
    if not rated:
        named = {"response": named["response"]}
    said = ", ".join(f"{ours}: {path}" for ours, path in named.items())
    outer = columns["responses"].partition(f".{EACH}")[0]
    return ConfigError(
        f"{first.field}.columns.responses: {outer!r} of {first.path!r} holds lists of one answer, "
        f"of which no pair is made; name it as one response a row: columns: {{{said}}}; with "
        "prepare.pairing: all, best_worst or adjacent it is compared with those of other rows to "
        "the same prompt"
    )


def _item(path: str, place: int) -> str:
    """The path into one item of a list."""
    outer, _, key = path.partition(f".{EACH}")
    return f"{outer}.{place}{key}"


def needs_pairing(first: FirstRows, path: str, most: int) -> ConfigError:
    """Rows with a list of responses, of which nobody said what is compared."""
    outer = path.partition(f".{EACH}")[0]
    two = [_item(path, k) for k in range(2)]
    return ConfigError(
        f"prepare.pairing: in {first.path!r} ({first.field}) {outer!r} holds lists of up to {most} "
        "answers; say which are compared: all (all two of them), best_worst (one pair a row), or "
        "adjacent (neighbours by score or rank). Or name two of them: columns: "
        f"{{response_a: {two[0]}, response_b: {two[1]}}} (chosen and rejected, where their order "
        "says which is better)"
    )


def no_answers(first: FirstRows) -> ConfigError:
    """Rows without two answers: of one answer, or under names that we do not know."""
    where = f"{first.field}.columns: {first.path!r} has no columns for two answers; it has "
    head = f"{where}{', '.join(first.names)}. "
    if lists := [name for name in first.named(*column_names.LISTS) if first.items(name)]:
        return ConfigError(
            f"{head}If the lists in {lists[0]!r} are responses, name it: columns: {{responses: "
            f"{lists[0]}}}, or, for lists of one, {{response: {lists[0]}.0}}"
        )
    if single := first.named(*_SINGLE):
        tags = [name for name in first.named(*_TAGS) if _is_tag(first, name)]
        label = f", and {tags[0]!r} says whether it is good (as for KTO)" if tags else ""
        score = f", with columns: {{response: {single[0]}, score: {tags[0]}}}" if tags else ""
        return ConfigError(
            f"{head}Each row has one answer, {single[0]!r}{label}. Where other rows answer the "
            "same prompt, set prepare.pairing: all, best_worst or adjacent, to make pairs of them"
            f"{score}; or name it, to have it scored alone: columns: {{response: {single[0]}}}"
        )
    return ConfigError(
        f"{head}Say which they are: columns: {{chosen: …, rejected: …}}, or {{response_a: …, "
        "response_b: …}"
    )


def more_answers(first: FirstRows, names: Sequence[str]) -> ConfigError:
    """Rows of more than two answers, a column each."""
    return ConfigError(
        f"{first.field}.columns: {first.path!r} has {len(names)} answers a row, "
        f"{', '.join(names)}: write them into one list (responses), or a row for each comparison, "
        f"or name two of them: columns: {{response_a: {names[0]}, response_b: {names[1]}}}"
    )


def unknown_values(
    first: FirstRows, labels: Sequence[str], seen: Counter[str | None], values: ValueMap
) -> ConfigError:
    """Labels whose values could mean this or that."""
    unknown = _unknown(seen, values)
    counted = [f"{printable(str(v))} in {n:,} rows" for v, n in seen.most_common(MOST_SHOWN)]
    more = f" and {len(seen) - MOST_SHOWN} more" if len(seen) > MOST_SHOWN else ""
    column = labels[0] if len(labels) == 1 else f"[{', '.join(labels)}]"
    if named := _by_row(first, unknown):
        return ConfigError(
            f"{first.field}.columns.label: {', '.join(map(repr, labels))} holds "
            f"{_listed(unknown)}, which are names that stand in "
            f"{' and '.join(map(repr, named))}: which answer they mean changes from row to row. "
            "Write a or b, or label: null to read no label"
        )
    return ConfigError(
        f"{first.field}.columns.label: {', '.join(map(repr, labels))} holds {', '.join(counted)}"
        f"{more}; the meaning of {_listed(unknown)} is not known. Say it: columns: {{label: "
        f"{{from: {column}, a: …, b: …, tie: …, none: …}}}}, where a is the value that says "
        "that the first answer is better (tie and none where there are such), or label: null to "
        "read no label"
    )


def _unknown(seen: Counter[str | None], values: ValueMap) -> list[str]:
    found = [printable(str(value)) for value, _ in seen.most_common()]
    unknown = [value for value in found if value not in values.meanings]
    if any(map(is_number, unknown)):  # one scale: those that are known may mean something else
        return [value for value in found if value in unknown or is_number(value)]
    return unknown


def no_pair(first: FirstRows, layout: Layout, tally: Tally) -> ConfigError:
    """First rows of which none is a pair, each with its reason."""
    lines = "\n".join(tally.lines())
    what = "can be used" if "response" in layout.columns else "is a pair"
    return ConfigError(
        f"{first.field}: none of the first {tally.reasons.total()} rows of {first.path!r} {what}:"
        f"\n{lines}\n  its columns are {', '.join(first.names)}; we read {layout.described()}"
    )


def written_as_text(first: FirstRows, columns: Sequence[str]) -> ConfigError:
    """Message lists in columns that are to be text."""
    return ConfigError(
        f"{first.field}.format: text, but {', '.join(map(repr, columns))} of {first.path!r} holds "
        "messages written as text; set format: auto, to read them"
    )


def _by_row(first: FirstRows, values: Sequence[str]) -> tuple[str, ...]:
    """Two columns, `…_a` and `…_b`, that hold such values themselves: who gave which answer."""
    for name in first.names:
        other = f"{name[:-1]}b"
        if name.endswith("_a") and other in first.names:
            held = {spelled(value) for column in (name, other) for value in first.values(column)}
            if set(values) <= held:
                return name, other
    return ()


def _listed(values: Sequence[str]) -> str:
    """`1, 2 and 3`; of many the first."""
    shown_here = list(values[:MOST_SHOWN])
    rest = len(values) - len(shown_here)
    last = f"{rest} more" if rest else shown_here.pop()
    return f"{', '.join(shown_here)} and {last}" if shown_here else last


def _is_tag(first: FirstRows, name: str) -> bool:
    return {shown(value) for value in first.values(name)} <= {"true", "false", "0", "1"}
