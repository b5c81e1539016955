"""A run's metrics in, tables of words and formatted numbers out, for the terminal and the page.

What a run did not do reads "not run"; what it did on no pairs reads "no pairs". Neither is a zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cwpo_dist.config import ARMS

Metrics = Mapping[str, Any]

# Roles of stage outputs in reading order; a run's other roles come after them.
_ROLES = (
    "prepare",
    "fit",
    "annotate",
    "weigh",
    "tokens",
    "sft",
    "reference",
    "align",
    "aligned",
    "answers_base",
    "answers_sft",
    "answers_aligned",
    "evaluate",
)
COMPARISONS = {
    "own_sft": "its own SFT model",
    "common": "the common reference",
}
SIMULATED = (
    "SIMULATED LABELS: the preferences come from a rule, not from people. The figures say how "
    "well that rule was recovered, and nothing about what people prefer."
)


@dataclass(frozen=True)
class Cell:
    """One value; `details` stand smaller beside it; `missing` is greyed."""

    text: str
    details: tuple[str, ...] = ()
    missing: bool = False


@dataclass(frozen=True)
class Table:
    """A titled table: its first `n_names` columns name the row, the others hold values."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    n_names: int = 1


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
        return ", ".join(self.arms)


NOT_RUN = Cell("not run", missing=True)
NO_PAIRS = Cell("no pairs", missing=True)
AS_GIVEN = Cell("as given", missing=True)


def tables(metrics: Metrics) -> list[Table]:
    """Every table, in reading order."""
    return [
        arms_table(metrics),
        gra_table(metrics),
        annotator_table(metrics),
        prepare_table(metrics),
        splits_table(metrics),
        rejects_table(metrics),
        cost_table(metrics),
    ]


def is_simulated(metrics: Metrics) -> bool:
    """Whether labels come from a rule."""
    return bool(at(metrics, "run", "simulated_labels"))


def held_out(metrics: Metrics) -> str:
    """What annotators and policies are measured against."""
    return "held-out simulated labels" if is_simulated(metrics) else "held-out human labels"


def at(metrics: Any, *path: str) -> Any:
    """The value at a path of keys; None where a part is missing."""
    for key in path:
        if not isinstance(metrics, Mapping):
            return None
        metrics = metrics.get(key)
    return metrics


def arm_items(metrics: Metrics) -> list[tuple[str, Metrics]]:
    """The arms, in the order of the run."""
    return list((at(metrics, "arms") or {}).items())


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
    """The roles that any arm's `part` knows, in reading order."""
    found = {role: None for _, arm in arm_items(metrics) for role in at(arm, part) or {}}
    known = [role for role in _ROLES if role in found]
    return known + [role for role in found if role not in _ROLES]


def _is_human(name: str) -> bool:
    """Whether the arm trains on the data's own labels, so that no annotator's apply to it."""
    return name in ARMS and ARMS[name].labels == "human"


def arms_table(metrics: Metrics) -> Table:
    """One row an arm: what it was trained on and how it did."""
    rows = tuple(
        (
            Cell(name),
            count(at(arm, "pairs")),
            number(at(arm, "mean_weight"), 3),
            AS_GIVEN
            if _is_human(name)
            else share(at(arm, "annotator", "agreement"), with_ties=True),
            share(at(arm, "policy", "agreement"), with_ties=True),
            *(share(at(arm, "gra", key), with_ties=True) for key in COMPARISONS),
        )
        for name, arm in arm_items(metrics)
    )
    return Table(
        "Results by arm",
        (
            "arm",
            "pairs",
            "mean weight",
            "labels right",
            "policy right",
            "GRA, own SFT",
            "GRA, common",
        ),
        rows,
        note=f"Labels right: the annotator's choice against {held_out(metrics)}; as given: the arm "
        "trains on the data's own labels. Policy right: the policy's implicit reward against the "
        "same labels. Both are shares of the decided pairs. GRA: share of prompts on which the "
        "gold reward puts the arm's answer above the other model's; each arm has an SFT model of "
        "its own, so only the common reference, the policy as it was given, compares arms. A tie "
        "counts as a loss in GRA. Small: the 95 % interval of this one run, which does not hold "
        "the spread between seeds, and ties.",
    )


def gra_table(metrics: Metrics) -> Table:
    """Wins, ties and losses behind each GRA."""
    rows = []
    for name, arm in arm_items(metrics):
        for key, words in COMPARISONS.items():
            found = at(arm, "gra", key)
            rows.append(
                (
                    Cell(name if key == "own_sft" else ""),
                    Cell(words),
                    *(count(at(found, part)) for part in ("wins", "ties", "losses")),
                    share(found),
                    percent(found, "accuracy_ties_halved"),
                )
            )
    return Table(
        "Gold reward accuracy",
        ("arm", "against", "wins", "ties", "losses", "GRA", "with ties halved"),
        tuple(rows),
        n_names=2,
    )


def annotator_table(metrics: Metrics) -> Table:
    """One column of figures for each distinct annotator."""
    columns = annotators(metrics)
    names = tuple(label for label, _ in columns) or ("annotator",)
    found: list[Metrics | None] = [record for _, record in columns] or [None]
    length = [at(record, "length_baseline") for record in found]
    rows = (
        (Cell("accuracy"), *(share(at(record, "agreement"), with_ties=True) for record in found)),
        (Cell("longer answer wins"), *(share(record, with_ties=True) for record in length)),
        (
            Cell("calibration error (ECE)"),
            *(percent(r, "expected_calibration_error") for r in found),
        ),
        (Cell("mean probability"), *(percent(r, "mean_probability") for r in found)),
        (Cell("mean confidence"), *(inner(r, "mean_confidence") for r in found)),
        (
            Cell("margin × length difference"),
            *(_correlation(at(record, "margin_length")) for record in found),
        ),
        (
            Cell("confidence × |length difference|"),
            *(_correlation(at(record, "confidence_length")) for record in found),
        ),
    )
    return Table(
        f"Annotator on {held_out(metrics)}",
        ("", *names),
        rows,
        note="Mean probability is σ(|margin|) of the predicted answers: above the accuracy it "
        "means overconfident. ECE is over ten bins of it. Correlations: Pearson's, with "
        "Spearman's on the second line; far from zero they say that length is part of the score.",
    )


def annotators(metrics: Metrics) -> list[tuple[str, Metrics]]:
    """(arms in words, evaluation) of each distinct annotator."""
    groups: list[tuple[list[str], Metrics]] = []
    items = arm_items(metrics)
    for name, arm in items:
        record = at(arm, "annotator")
        if record is None:
            continue
        same = [names for names, other in groups if other == record]
        if same:
            same[0].append(name)
        else:
            groups.append(([name], record))
    if len(groups) == 1:
        return [("annotator", groups[0][1])]
    return [(", ".join(names), record) for names, record in groups]


def prepare_table(metrics: Metrics) -> Table:
    """Where every input row went."""
    prepare = at(metrics, "prepare")
    rejects = at(prepare, "rejects")
    rejected = sum(rejects.values()) if rejects is not None else None
    parts = (at(prepare, "pairs"), at(prepare, "merged_duplicates"), rejected)
    rows_in = at(prepare, "rows_in")
    lost = None
    if rows_in is not None and None not in parts:
        lost = rows_in - sum(part for part in parts if part is not None)
    rows = (
        (Cell("rows read"), count(rows_in)),
        (Cell("pairs"), count(at(prepare, "pairs"))),
        (Cell("duplicates merged into them"), count(at(prepare, "merged_duplicates"))),
        (Cell("rejected"), count(rejected)),
        (Cell("unaccounted for"), count(lost)),
        (Cell("pairs with conflicting labels"), count(at(prepare, "conflicting_labels"))),
    )
    note = "Rows read = pairs + merged + rejected; anything unaccounted for is a fault."
    return Table("Rows", ("", "count"), rows, note)


def splits_table(metrics: Metrics) -> Table:
    """Pairs of each split."""
    return _counts("Splits", ("split", "pairs"), at(metrics, "prepare", "splits"))


def rejects_table(metrics: Metrics) -> Table:
    """Rejected rows by reason."""
    found = at(metrics, "prepare", "rejects")
    if found == {}:
        return Table("Rejects", ("reason", "rows"), ((Cell("none"), Cell("0")),))
    return _counts("Rejects", ("reason", "rows"), found)


def cost_table(metrics: Metrics) -> Table:
    """Time and tokens of each stage, once where arms share it."""
    rows: list[tuple[Cell, ...]] = []
    seen: set[str] = set()
    for stage in _roles(metrics, "seconds"):
        for output in shared_outputs(metrics, stage, having="seconds"):
            if output.key and output.key in seen:  # one output in two roles was made once
                continue
            seen.add(output.key)
            arm = at(metrics, "arms", output.arms[0])
            seconds, tokens = at(arm, "seconds", stage), at(arm, "tokens", stage)
            speed = tokens / seconds if tokens is not None and seconds else None
            rows.append(
                (
                    Cell(stage),
                    Cell(output.label),
                    Cell(duration(seconds)),
                    count(tokens) if tokens is not None else Cell("–", missing=True),
                    count(round(speed)) if speed is not None else Cell("–", missing=True),
                )
            )
    if not rows:
        rows = [(NOT_RUN, *[Cell("") for _ in range(4)])]
    columns = ("stage", "for", "time", "tokens", "tokens/s")
    return Table("Time and tokens", columns, tuple(rows), n_names=2)


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


def share(record: Metrics | None, *, with_ties: bool = False) -> Cell:
    """An accuracy with its interval and, if asked, its ties."""
    if record is None:
        return NOT_RUN
    ties = (_ties(record["ties"]),) if with_ties else ()
    if record.get("accuracy") is None:
        return Cell("no pairs", ties, missing=True)
    interval = f"{100 * record['low']:.1f} – {100 * record['high']:.1f}"
    return Cell(f"{100 * record['accuracy']:.1f} %", (interval, *ties))


def percent(record: Metrics | None, key: str) -> Cell:
    """A share of a record, in per cent."""
    if record is None:
        return NOT_RUN
    value = record.get(key)
    return NO_PAIRS if value is None else Cell(f"{100 * value:.1f} %")


def inner(record: Metrics | None, key: str) -> Cell:
    """A number of a record."""
    if record is None:
        return NOT_RUN
    value = record.get(key)
    return NO_PAIRS if value is None else Cell(f"{value:.3f}")


def number(value: float | None, digits: int) -> Cell:
    """A number that a stage makes."""
    return NOT_RUN if value is None else Cell(f"{value:.{digits}f}")


def count(value: int | None) -> Cell:
    """A count that a stage makes."""
    return NOT_RUN if value is None else Cell(f"{value:,}")


def plain(value: Any) -> Cell:
    """Any recorded value, in words."""
    if value is None:
        return NOT_RUN
    return Cell({True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value))


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _ties(n: int) -> str:
    return f"{n:,} tie" if n == 1 else f"{n:,} ties"


def _correlation(record: Metrics | None) -> Cell:
    if record is None:
        return NOT_RUN
    if record.get("pearson") is None:
        return NO_PAIRS
    return Cell(f"{record['pearson']:+.2f}", (f"{record['spearman']:+.2f}",))


def _counts(title: str, columns: tuple[str, ...], found: Mapping[str, int] | None) -> Table:
    if not found:
        return Table(title, columns, ((NOT_RUN, Cell("")),))
    return Table(title, columns, tuple((Cell(str(k)), count(n)) for k, n in found.items()))
