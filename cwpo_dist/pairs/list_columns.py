"""The first rows of a source in; which column holds a list of responses, and which rates them, out.

Or which holds a response that has a row of its own. A list of objects is read by paths into all its
items: `answers.*.answer`, `answers.*.rank`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from cwpo_dist.config import ConfigError, Pairing
from cwpo_dist.pairs import column_names, refusals
from cwpo_dist.pairs.first_rows import FirstRows
from cwpo_dist.pairs.layout import ALONE, EACH, LISTS
from cwpo_dist.pairs.written import is_conversation, listed

_RATINGS = LISTS[1:]
# What stands beside responses: all else is about the two answers of a pair.
BESIDE = ("system", "tools", "history", "prompt", "input")


def list_columns(
    first: FirstRows, given: Mapping[str, str], left_out: set[str]
) -> dict[str, str] | None:
    """The columns of responses and of their scores or ranks; None where there are no lists.

    Args:
        first: the source's first rows.
        given: the columns that the configuration names.
        left_out: the fields that it says are not to be read.

    Raises:
        ConfigError: for what could be several columns.
    """
    if "responses" in left_out:
        return None
    path = given.get("responses")
    if path is None:
        there = [name for name in first.named(*column_names.LISTS) if _could_be(first, name)]
        if not there:
            return None
        path = _the_one(first, "responses", there)
        assert path is not None, there
    items = _objects(first, path)
    if items is not None:
        path = f"{path}.{EACH}.{_text_key(first, path, items)}"
    could = {ours: _could_rate(first, ours, path) for ours in _RATINGS}
    rating = _rating(first, given, left_out, path, could)
    if len(rating) > 1:
        raise refusals.could_be_several(first, "scores", list(rating.values()))
    return {"responses": path, **rating}


def one_response(
    first: FirstRows, given: Mapping[str, str], left_out: set[str], pairing: Pairing
) -> dict[str, str] | None:
    """The columns of one response a row, and of its score or rank; None where there is none.

    One that the configuration does not name is read where pairs are to be made: of rows with one
    answer nobody else says what they are for.

    Args:
        first: the source's first rows.
        given: the columns that the configuration names.
        left_out: the fields that it says are not to be read.
        pairing: which responses of a prompt are compared.

    Raises:
        ConfigError: for what could be several columns.
    """
    path = given.get("response")
    if path is None and pairing != "given" and "response" not in left_out:
        path = _the_one(first, "response", first.named(*column_names.ONE))
    if path is None:
        return None
    if (items := first.items(path)) and not any(map(is_conversation, first.values(path))):
        raise refusals.holds_lists(first, path, items)
    if pairing == "given":  # without pairs nobody reads a rating
        return {"response": path}
    names = (first.named(*column_names.RATINGS[of]) for of in _RATINGS)
    could = dict(zip(ALONE[1:], names, strict=True))
    return {"response": path, **_rating(first, given, left_out, path, could)}


def check_responses(
    first: FirstRows, columns: Mapping[str, str], named: set[str], pairing: Pairing
) -> None:
    """Refuses responses of which nobody said what is compared, and fields that say nothing here.

    Args:
        first: the source's first rows.
        columns: those of responses and ratings, and those that the configuration names.
        named: the fields that the configuration names.
        pairing: which responses of a list are compared.

    Raises:
        ConfigError: naming the field and the remedy.
    """
    fields = LISTS if "responses" in columns else ALONE
    _refuse_silent(first, fields, named, pairing)
    ratings = fields[1:]
    rated_by = [columns[name] for name in ratings if name in columns]
    if len(rated_by) > 1:
        raise refusals.could_be_several(first, ratings[0], rated_by)
    if fields is LISTS:
        _refuse_lists(first, columns, pairing)
    if pairing in ("best_worst", "adjacent") and not rated_by:
        score, rank = ratings
        raise ConfigError(
            f"prepare.pairing: {pairing!r} needs to know how good each response is, and "
            f"{first.path!r} ({first.field}) has no {score} or {rank} that we know; name the "
            f"column: columns: {{{score}: …}} (higher is better) or {{{rank}: …}} (lower is "
            "better); or set pairing: all, whose pairs then have no label (weigh.pairing: "
            "best_worst keeps of them the best and the worst by the annotator's scores)"
        )


def _refuse_lists(first: FirstRows, columns: Mapping[str, str], pairing: Pairing) -> None:
    """Refuses lists of which no pair is to be made, or none can be."""
    most = max(map(len, _lists(first, columns["responses"])), default=0)
    if most == 1:
        raise refusals.lists_of_one(first, columns, rated=pairing != "given")
    if pairing == "given":
        raise refusals.needs_pairing(first, columns["responses"], most)


def _refuse_silent(
    first: FirstRows, fields: tuple[str, ...], named: set[str], pairing: Pairing
) -> None:
    """Refuses fields that the configuration names and that say nothing beside such responses."""
    what = "a list of responses" if fields is LISTS else "a response"
    for ours in sorted(named):
        if ours not in (*BESIDE, *fields):
            raise refusals.says_nothing(first, ours, f"says nothing beside {what}")
    rating = sorted(named.intersection(fields[1:]))
    if pairing == "given" and fields is ALONE and rating:
        raise refusals.says_nothing(first, rating[0], "says nothing while prepare.pairing is given")


def _lists(first: FirstRows, path: str) -> Iterator[list[object]]:
    return (items for value in first.values(path) if (items := listed(value)))


def _could_be(first: FirstRows, name: str) -> bool:
    """Whether a column holds responses: under our own name any lists of texts or messages do."""
    if name != "responses" or not _are_lists(first, name):
        return _holds_lists(first, name)
    items = first.items(name)
    return 2 * sum(map(_may_be_response, items)) > len(items)


def _are_lists(first: FirstRows, name: str) -> bool:
    """Whether lists stand in most cells of a column that hold anything."""
    values = [listed(value) for value in first.values(name)]
    return any(values) and 2 * sum(items is not None for items in values) > len(values)


def _holds_lists(first: FirstRows, name: str) -> bool:
    """Whether most of a column's rows hold several texts, or objects with one, in a list."""
    lists = [
        items
        for items in _lists(first, name)
        if len(items) > 1
        and not is_conversation(items)
        and 2 * sum(map(_may_be_response, items)) > len(items)
    ]
    return 2 * len(lists) > len(first.rows)


def _may_be_response(item: object) -> bool:
    return item is None or isinstance(item, str | Mapping) or is_conversation(item)


def _objects(first: FirstRows, path: str) -> FirstRows | None:
    """The items of a list as rows of their own, where they are objects and no messages."""
    items = first.items(path)
    objects = [each for each in items if isinstance(each, Mapping) and not is_conversation(each)]
    return replace(first, rows=tuple(objects)) if 2 * len(objects) > len(items) else None


def _text_key(first: FirstRows, path: str, items: FirstRows) -> str:
    there = items.named(*column_names.IN_LISTS)
    if len(there) != 1:
        found = [f"{path}.{EACH}.{name}" for name in there or items.names]
        raise refusals.could_be_several(first, "responses", found)
    return there[0]


def _rating(
    first: FirstRows,
    given: Mapping[str, str],
    left_out: set[str],
    path: str,
    could: Mapping[str, Iterable[str]],
) -> dict[str, str]:
    """Of the columns that could, those that say how good each response is; none if one is named."""
    if could.keys() & given.keys():
        return {}
    taken = {*given.values(), path}
    found: dict[str, str] = {}
    for ours, names in could.items():
        free = [] if ours in left_out else [name for name in names if name not in taken]
        name = _the_one(first, ours, free)
        if name is not None:
            found[ours] = name
    return found


def _could_rate(first: FirstRows, ours: str, path: str) -> Iterator[str]:
    """Columns with a list of ratings; keys of them beside the text of each response."""
    for name in first.named(*column_names.RATINGS[ours]):
        values = first.values(name)
        if 2 * sum(listed(value) is not None for value in values) > len(values):
            yield name
    outer = path.partition(f".{EACH}")[0]
    if (items := _objects(first, outer)) is not None:
        for name in items.named(*column_names.RATINGS[ours]):
            yield f"{outer}.{EACH}.{name}"


def _the_one(first: FirstRows, ours: str, found: list[str]) -> str | None:
    if len(found) > 1:
        raise refusals.could_be_several(first, ours, found)
    return found[0] if found else None
