"""A run's metrics in; tables of its data, its stage outputs, their cost and origin out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cwpo_dist.report.cells import (
    NOT_RUN,
    Cell,
    Metrics,
    Table,
    arm_items,
    at,
    count,
    duration,
    plain,
    together,
)
from cwpo_dist.stage_order import LISTED

# Roles of stage outputs in reading order; a run's other roles come after them.
_ROLES = [role for name, stage in LISTED.items() for role in stage.roles or (name,)]
_NUMBER = re.compile(r"_\d+$")  # of one annotator among several


@dataclass(frozen=True)
class Shared:
    """A stage output and the arms that share it.

    Attributes:
        stage: its name.
        key: its content key; empty where the run recorded none.
        arms: the arms that use it.
        all_arms: whether these are all arms of the run.
    """

    stage: str
    key: str
    arms: tuple[str, ...]
    all_arms: bool

    @property
    def label(self) -> str:
        """The arms in words."""
        if self.all_arms and len(self.arms) > 1:
            return "all arms"
        return together(self.arms)


def shared_outputs(metrics: Metrics, stage: str, having: str) -> list[Shared]:
    """The distinct outputs of a stage, by key, among arms that have `having`[stage].

    Args:
        metrics: the run's.
        stage: fit, sft, …
        having: `curves`, `seconds`, … which part of an arm must know the stage.
    """
    arms: dict[str, list[str]] = {}
    items = arm_items(metrics)
    for name, arm in items:
        if at(arm, having, stage):
            arms.setdefault(at(arm, "keys", stage) or f"\0{name}", []).append(name)
    return [
        Shared(stage, "" if key.startswith("\0") else key, tuple(names), len(names) == len(items))
        for key, names in arms.items()
    ]


def _roles(metrics: Metrics, part: str) -> list[str]:
    """The roles that any arm's `part` knows, in reading order; several annotators stay together."""
    found = {role: None for _, arm in arm_items(metrics) for role in at(arm, part) or {}}
    order = {role: k for k, role in enumerate(_ROLES)}
    return sorted(found, key=lambda role: order.get(_NUMBER.sub("", role), len(order)))


def numbered(metrics: Metrics, stage: str, part: str) -> list[str]:
    """The roles of a stage: itself, or fit_0, fit_1, … where a run has several annotators."""
    return [role for role in _roles(metrics, part) if _NUMBER.sub("", role) == stage]


def data_tables(metrics: Metrics) -> list[Table]:
    """What `prepare` made of its sources; a column a run where several share a page."""
    always = [prepare_table(metrics), _splits_table(metrics), _rejects_table(metrics)]
    return always + [table for table in (_unread_table(metrics), _files_table(metrics)) if table]


def _prepared(metrics: Metrics, word: str) -> dict[str, Metrics | None]:
    """The counts of `prepare` by run, or under `word` those of the only one."""
    return at(metrics, "prepared") or {word: at(metrics, "prepare")}


def prepare_table(metrics: Metrics) -> Table:
    """Where every input row went."""
    found = _prepared(metrics, "count")
    rows = [_rows_of(prepare) for prepare in found.values()]
    names = [name for name in rows[0] if name != _ALONE or any(told[name] for told in rows)]
    cells = tuple((Cell(name), *(count(told[name]) for told in rows)) for name in names)
    note = (
        "Rows read = pairs + merged + rejected, where rows with responses, of a list or of one "
        "each, count as the pairs made of them; anything unaccounted for is a fault."
    )
    return Table("Rows", ("", *found), cells, note)


_ALONE = "answers that stand in no pair"


def _rows_of(prepare: Metrics | None) -> dict[str, int | None]:
    rejects, rows_in = at(prepare, "rejects"), at(prepare, "rows_in")
    rejected = sum(rejects.values()) if rejects is not None else None
    parts = (at(prepare, "pairs"), at(prepare, "merged_duplicates"), rejected)
    alone = at(prepare, "alone") or {"rows": 0, "pairs": 0, "in_no_pair": 0}
    compared = (at(prepare, "lists") or {"rows": 0, "pairs": 0}, alone)
    lost = None
    if rows_in is not None and None not in parts:
        made = rows_in + sum(of["pairs"] - of["rows"] for of in compared)
        lost = made - sum(part for part in parts if part is not None)
    return {
        "rows read": rows_in,
        "pairs": at(prepare, "pairs"),
        "duplicates merged into them": at(prepare, "merged_duplicates"),
        "rejected": rejected,
        "unaccounted for": lost,
        _ALONE: alone["in_no_pair"],
        "pairs with conflicting labels": at(prepare, "conflicting_labels"),
    }


def _splits_table(metrics: Metrics) -> Table:
    """Pairs of each split."""
    found = {run: at(told, "splits") for run, told in _prepared(metrics, "pairs").items()}
    return _counts("Splits", "split", found)


def _rejects_table(metrics: Metrics) -> Table:
    """Rejected rows by reason."""
    found = {run: at(told, "rejects") for run, told in _prepared(metrics, "rows").items()}
    if all(told == {} for told in found.values()):
        none = (Cell("none"), *(Cell("0") for _ in found))
        return Table("Rejects", ("reason", *found), (none,))
    return _counts("Rejects", "reason", found)


def _unread_table(metrics: Metrics) -> Table | None:
    """Columns and message keys with values that nothing read; None where there are none."""
    rows = [
        (*map(Cell, (source, what, name)), count(number))
        for told in _prepared(metrics, "rows").values()
        for source, found in (at(told, "not_read") or {}).items()
        for what, key in (("column", "columns"), ("message key", "message_keys"))
        for name, number in found[key].items()
    ]
    columns = ("source", "what", "name", "rows")
    return Table("Not read", columns, tuple(rows), n_names=3) if rows else None


def _files_table(metrics: Metrics) -> Table | None:
    """Files that no source read, and why; None where there are none."""
    told = [at(each, "files_left_out") or {} for each in _prepared(metrics, "files").values()]
    rows = tuple(
        tuple(Cell(file[name]) for name in ("source", "file", "why"))
        for each in told
        for file in each.get("files", [])
    )
    total = sum(each.get("count", 0) for each in told)
    note = f"The first {len(rows)} of {total}." if total > len(rows) else ""
    return Table("Files left out", ("source", "file", "why"), rows, note, 3) if rows else None


def _counts(title: str, word: str, found: Mapping[str, Mapping[str, int] | None]) -> Table:
    """Names and their counts, a column each; what a run has none of reads 0."""
    columns = (word, *found)
    named = dict.fromkeys(name for told in found.values() for name in told or {})
    if not named:
        return Table(title, columns, ((NOT_RUN, *(Cell("") for _ in found)),))
    rows = tuple(
        (
            Cell(str(name)),
            *(NOT_RUN if told is None else count(told.get(name, 0)) for told in found.values()),
        )
        for name in named
    )
    return Table(title, columns, rows)


def cost_table(metrics: Metrics) -> Table:
    """Time and tokens of each stage, once where arms share it."""
    rows: list[tuple[Cell, ...]] = []
    seen: set[str] = set()
    for stage in _roles(metrics, "seconds"):
        for output in shared_outputs(metrics, stage, having="seconds"):
            if output.key and output.key in seen:  # one output in two roles was made once
                continue
            seen.add(output.key)
            rows.append((Cell(stage), Cell(output.label), *_cost(metrics, output)))
    if not rows:
        rows = [(NOT_RUN, *[Cell("") for _ in range(4)])]
    columns = ("stage", "for", "time", "tokens", "tokens/s")
    return Table("Time and tokens", columns, tuple(rows), n_names=2)


def _cost(metrics: Metrics, output: Shared) -> tuple[Cell, Cell, Cell]:
    """Its time, its tokens, and how many of them a second."""
    arm, none = at(metrics, "arms", output.arms[0]), Cell("–", missing=True)
    seconds, tokens = at(arm, "seconds", output.stage), at(arm, "tokens", output.stage)
    if tokens is None:
        return Cell(duration(seconds)), none, none
    speed = count(round(tokens / seconds)) if seconds else none
    return Cell(duration(seconds)), count(tokens), speed


def provenance_table(metrics: Metrics) -> Table:
    """Run directory, seed and versions."""
    run = at(metrics, "run") or {}
    names = ["output_dir", "seed", "simulated_labels"]
    names += [name for name in run if name not in [*names, "versions"]]
    rows = [(Cell(str(name).replace("_", " ")), plain(at(run, name))) for name in names]
    versions = at(run, "versions") or {}
    rows += [(Cell(str(name)), plain(version)) for name, version in sorted(versions.items())]
    return Table("Run", ("", "value"), tuple(rows))


def keys_table(metrics: Metrics) -> Table:
    """Each arm's stage outputs by content key."""
    items = arm_items(metrics)
    rows = tuple(
        (Cell(stage), *(plain(at(arm, "keys", stage)) for _, arm in items))
        for stage in _roles(metrics, "keys")
    )
    return Table(
        "Keys",
        ("stage", *(name for name, _ in items)),
        rows or ((NOT_RUN, *[Cell("") for _ in items]),),
        note="Arms that show one key share that stage's output.",
    )
