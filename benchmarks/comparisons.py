"""What `cwpo compare` found in; what is kept of it, and a table of its trials, out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from page_tables import cell, lines

from cwpo_dist.report.arms_in_words import ALL_HUMAN, UNWEIGHTED, has_own_labels
from cwpo_dist.report.cells import at
from cwpo_dist.report.figures import Mean
from cwpo_dist.report.outcomes import Found, rivals_of

_FIGURES = {
    "accuracy": "accuracy",
    "length_balanced": "length-balanced",
    "gra_own_sft": "GRA, own SFT",
    "gra_common": "GRA, common",
}
_BY_SEED = ("kl", "labels_right", "mean_weight")
_FACTS = ("arm", "flipped_labels", "labelled_fraction", "loss", "stopped_after")
_OF_MEAN = ("high", "low", "mean", "smallest", "values")


def kept(found: Found) -> dict[str, Any]:
    """What a table reads, and what it was made with; no place of the machine is among it."""
    return {
        "baseline": found["baseline"],
        "device": found["run"]["device"],
        "seeds": found["seeds"],
        "trials": {name: _kept(found, name) for name in found["trials"]},  # in their order
        "versions": found["run"]["versions"],
    }


def _kept(found: Found, name: str) -> dict[str, Any]:
    trial = found["trials"][name]
    rivals = sorted({rivals[name] for *_, rivals in rivals_of(found) if name in rivals} - {name})
    return {
        **{fact: at(trial, fact) for fact in _FACTS},
        "against": {other: _means(trial["against"][other], _FIGURES) for other in rivals},
        "by_seed": _means(trial["by_seed"], _BY_SEED),
        "figures": _means(trial["figures"], _FIGURES),
    }


def _means(found: Found, names: Iterable[str]) -> dict[str, Any]:
    return {
        name: {key: _rounded(found[name][key]) for key in _OF_MEAN}
        for name in sorted(names)
        if Mean.of(found.get(name)) is not None
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [round(each, 6) for each in value]
    return None if value is None else round(value, 6)


def tables(found: Found, figure: str) -> Iterator[str]:
    """A row a trial: its figures, and how it differs from others by one of them, in points."""
    rows = [_row(found, name, figure) for name in found["trials"]]
    heads = [head for head in rows[0] if any(row[head] for row in rows)]
    return lines([heads, *([row[head] for head in heads] for row in rows)])


def by_seed(found: Found, figure: str) -> Iterator[str]:
    """A row a trial: one of its figures, and its KL, with each seed."""
    columns = {
        _FIGURES[figure]: ("figures", figure, 100, " %"),
        "KL, nats an answer": ("by_seed", "kl", 1, ""),
    }
    seeds = found["seeds"]
    rows = [["trial", *(f"{words}, seed {seed}" for words in columns for seed in seeds)]]
    for name, trial in found["trials"].items():
        row = [f"`{name}`"]
        for kind, key, scale, unit in columns.values():
            told = [f"{scale * value:.1f}{unit}" for value in at(trial, kind, key, "values") or []]
            row += told + [""] * (len(seeds) - len(told))  # of a trial that was stopped
        rows.append(row)
    return lines(rows)


def _row(found: Found, name: str, figure: str) -> Mapping[str, str]:
    trial = found["trials"][name]
    after, weight = at(trial, "stopped_after"), at(trial, "by_seed", "mean_weight", "mean")
    moved = at(trial, "by_seed", "kl", "mean")
    right = _share(at(trial, "by_seed", "labels_right"))
    row = {
        "trial": f"`{name}`" + ("" if after is None else f", {after} seeds"),
        "labels right": right or ("as given" if has_own_labels(trial["arm"]) else ""),
        "mean weight": "" if weight is None else f"{weight:.2f}",
        **{words: _share(at(trial, "figures", key)) for key, words in _FIGURES.items()},
        "KL, nats an answer": "" if moved is None else f"{moved:.1f}",
    }
    groups = zip((found["baseline"], UNWEIGHTED, ALL_HUMAN), rivals_of(found), strict=True)
    for rival, (*_, rivals) in groups:
        points = _points(at(trial, "against", rivals.get(name, name), figure))
        row.setdefault(f"Δ {_FIGURES[figure]}, against `{rival}`", points)
    smallest = at(trial, "against", found["baseline"], figure, "smallest")
    row[f"smallest Δ, against `{found['baseline']}`"] = (
        "" if smallest is None else f"{100 * smallest:.1f}"
    )
    return row


def _share(record: Found | None) -> str:
    mean = Mean.of(record)
    return "" if mean is None else cell(asdict(mean.cut(0, 1)), 100, ".1f", " %")


def _points(record: Found | None) -> str:
    mean = Mean.of(record)
    return "" if mean is None else cell(asdict(mean.cut(-1, 1)), 100, "+.1f")
