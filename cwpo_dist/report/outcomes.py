"""The figures of several trials in; who is held against whom, and what came out, in words, out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cwpo_dist.evaluation.paired import holm
from cwpo_dist.report.arms_in_words import ALL_HUMAN, UNWEIGHTED, is_weighted
from cwpo_dist.report.cells import at, interval, written
from cwpo_dist.report.figures import Mean
from cwpo_dist.report.plots import Dot

Found = Mapping[str, Any]  # what `comparison.json` holds
# Figure → what it says, in words: those by which trials are held against each other.
_FIGURES = {
    "accuracy": "on held-out labels",
    "length_balanced": "on held-out labels, length-balanced",
    "gra_common": "by the gold reward (GRA, common)",
}
LEVEL = 0.05
CHANCE = (
    "Paired differences with their 95 % intervals. Each line is a comparison of its own: of twenty "
    "true zeros one is told apart by chance. Counting all of them (Holm's correction), any true "
    "zero is decided in at most one report of twenty. Length-balanced: pairs whose longer and "
    "whose shorter answer is preferred count alike, so that length alone gains nothing. Held-out "
    "labels are of the kind that arms of the data's own labels were trained to fit, which favours "
    "them; a gold reward model's are not."
)


@dataclass(frozen=True)
class Verdict:
    """Several trials, each held against another by one figure.

    Attributes:
        title: against whom, and by which figure.
        figure: its key.
        lines: one a trial, in words.
        dots: the same differences, to be drawn.
    """

    title: str
    figure: str
    lines: list[str]
    dots: list[Dot]


def verdicts(found: Found) -> list[Verdict]:
    """All against the baseline, weighted against unweighted, and all against all own labels.

    What is told apart is held against the number of all lines, too.
    """
    groups = list(_differences(found))
    every = [mean for *_, means in groups for mean in means.values()]
    ps = [1.0 if mean.p is None else mean.p for mean in every]  # with nothing to tell chance by
    counted = dict(zip(ps, holm(ps), strict=True)), len(ps)
    return [
        Verdict(
            title,
            figure,
            [_verdict(label, mean) + _counted(mean, *counted) for label, mean in means.items()],
            [dot(label, mean) for label, mean in means.items()],
        )
        for title, figure, means in groups
    ]


def _differences(found: Found) -> Iterator[tuple[str, str, dict[str, Mean]]]:
    """Titles and figures, each with the differences under it by their labels."""
    for figure, words in _FIGURES.items():
        for title, pairs in _held_against(found):
            means = {
                label + _stopped(found, name, other): mean.cut(-1, 1)
                for label, (name, other) in pairs.items()
                for mean in [Mean.of(at(found["trials"][name], "against", other, figure))]
                if mean is not None
            }
            if means:
                yield f"{title}, {words}", figure, means


def _stopped(found: Found, *names: str) -> str:
    """What stands behind a label where a trial of the comparison has not all seeds."""
    after = [k for name in names if (k := at(found, "trials", name, "stopped_after")) is not None]
    return f" (stopped after {min(after)} seeds)" if after else ""


def _counted(found: Mean, corrected: Mapping[float, float], n: int) -> str:
    """Whether what is told apart alone is so beside all others."""
    if found.p is None or not found.excludes_zero:
        return ""
    p = corrected[found.p]
    told = "decided" if p < LEVEL else "not decided"
    return f"; counting all {n} comparisons: {told}, p {p_in_words(p)}"


def p_in_words(p: float) -> str:
    """To three digits after the point."""
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"


def dot(label: str, mean: Mean) -> Dot:
    """A mean over seeds, to be drawn."""
    return Dot(label, mean.mean, mean.low, mean.high, tuple(mean.values))


def _held_against(found: Found) -> list[tuple[str, dict[str, tuple[str, str]]]]:
    """Title, and by label a trial and its rival; what one group has said the next leaves out."""
    told, seen = [], set[frozenset[str]]()
    for opening, words, rivals in rivals_of(found):
        pairs = [
            (name, other)
            for name, other in rivals.items()
            if other != name and frozenset((name, other)) not in seen
        ]
        seen.update(map(frozenset, pairs))
        if pairs:
            told.append(_titled(opening, words, pairs))
    return told


def _titled(
    opening: str, words: str, pairs: Sequence[tuple[str, str]]
) -> tuple[str, dict[str, tuple[str, str]]]:
    """A rival of all stands in the title, and several each in their pair's label."""
    first = pairs[0][1]
    if all(other == first for _, other in pairs):
        title = f"{opening} {first}" + (f" ({words})" if words else "")
        return title, {name: (name, other) for name, other in pairs}
    labelled = {f"{name}, against {other}": (name, other) for name, other in pairs}
    return f"{opening} {words}", labelled


def rivals_of(found: Found) -> list[tuple[str, str, dict[str, str]]]:
    """How a title begins, who the rivals are in words, and each trial's, if it has one."""
    trials = found["trials"]
    baseline: str = found["baseline"]
    unweighted = {
        name: _like(trials, name, UNWEIGHTED, ("loss", "labelled_fraction", "flipped_labels"))
        for name, trial in trials.items()
        if is_weighted(str(at(trial, "arm")))
    }
    all_human = {  # it knows all labels, whatever share the others know
        name: _like(trials, name, ALL_HUMAN, ("loss", "flipped_labels"))
        for name, trial in trials.items()
        if at(trial, "arm") != ALL_HUMAN
    }
    return [
        ("Against", "", dict.fromkeys(trials, baseline)),
        ("Weighted, against", "the same labels unweighted", unweighted),
        ("Against", "all of the data's own labels", all_human),
    ]


def _like(trials: Found, name: str, arm: str, facts: tuple[str, ...]) -> str:
    """The first trial of an arm that has these facts in common with another; itself for none."""
    ours = trials[name]
    return next(
        (
            other
            for other, trial in trials.items()
            if at(trial, "arm") == arm and all(at(trial, k) == at(ours, k) for k in facts)
        ),
        name,
    )


def _verdict(label: str, found: Mean) -> str:
    """Told apart where the interval of the paired difference leaves zero out."""
    mean = 100 * found.mean
    if found.low is None or found.high is None:
        return f"{label}: {written(mean, '+.1f')} points, and nothing to tell chance by"
    bounds = f"({interval(100 * found.low, 100 * found.high, '+.1f')})"
    if found.excludes_zero:
        return f"{label}: {abs(mean):.1f} points {'above' if mean > 0 else 'below'} {bounds}"
    said = f"{label}: not told apart, {written(mean, '+.1f')} points {bounds}"
    if found.smallest is None:
        return said
    return f"{said}; a true difference below {100 * found.smallest:.1f} would often go unseen"
