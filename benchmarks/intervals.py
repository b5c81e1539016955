"""Made-up judgements and seeds in; whether intervals and early stops keep what they promise, out.

    python benchmarks/intervals.py --plot FILE.svg

Two parts, each of draws whose truth is known: how often the 95 % interval of people and a model
together (`prediction_powered`) holds it, of win rates and of accuracies; and how often a trial is
stopped (`stopping`), rightly or wrongly. The last line is one JSON object with all figures.

Shapes: N items, S seeds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process, decided before numpy

import json
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from page_tables import lines

from cwpo_dist.evaluation.paired import Items, paired
from cwpo_dist.evaluation.prediction_powered import powered
from cwpo_dist.evaluation.stopping import LEVEL, looks, lost
from cwpo_dist.weighting import Floats, sigmoid

ITEMS = 1000
HARDNESS = 1.5  # the standard deviation of a prompt's log-odds of a win
PER_PROMPT = 4  # items that share a prompt, where some do: as many seeds


@dataclass(frozen=True)
class Judged:
    """What of people's judgements is drawn.

    Attributes:
        judged: items that people judge, of `ITEMS`.
        rate: the win rate.
        agrees: how often the model says what people say; ½: it throws coins.
        per_prompt: items that share a prompt.
    """

    judged: int
    rate: float
    agrees: float
    per_prompt: int


@dataclass(frozen=True)
class Labelled(Judged):
    """The same of held-out pairs, of which an annotator is right in `rate`.

    People judge all pairs of a prompt, or none.

    Attributes:
        copies: how often the model takes the annotator's side, whatever people say.
    """

    copies: float


@dataclass(frozen=True)
class Covered:
    """Of many draws.

    Attributes:
        people: how often the interval of people alone holds the truth.
        both: how often that of people and model does.
        model: how often the model's own does.
        weight: mean λ.
        people_width: mean width of the first interval.
        width: of the second.
    """

    people: float
    both: float
    model: float
    weight: float
    people_width: float
    width: float


def covered(draws: int, case: Judged) -> Covered:
    """Draws so often `ITEMS` items, of which some are judged by lot."""
    rng = np.random.default_rng([case.judged, int(100 * case.rate), case.per_prompt])
    # σ(c + HARDNESS·z) has the wanted mean: found on a grid of z once.
    z = np.random.default_rng(0).normal(0, HARDNESS, 200_000)
    ends = [-12.0, 12.0]
    for _ in range(60):
        middle = sum(ends) / 2
        ends[float(sigmoid(middle + z).mean()) > case.rate] = middle
    truth = float(sigmoid(ends[0] + z).mean())
    prompts = np.arange(ITEMS) // case.per_prompt
    rows = []
    for _ in range(draws):
        hardness = rng.normal(0, HARDNESS, ITEMS // case.per_prompt)[prompts]
        won = (rng.random(ITEMS) < sigmoid(ends[0] + hardness)).astype(float)
        said = np.where(rng.random(ITEMS) < case.agrees, won, 1 - won)
        people = np.full(ITEMS, np.nan)
        if isinstance(case, Labelled):
            said = np.where(rng.random(ITEMS) < case.copies, 1.0, said)
            drawn = rng.permutation(ITEMS // case.per_prompt)[: case.judged // case.per_prompt]
            places = np.flatnonzero(np.isin(prompts, drawn))
        else:
            places = rng.permutation(ITEMS)[: case.judged]
        people[places] = won[places]
        found = powered(people, said, prompts)
        rows.append(
            [_holds(each, truth) for each in (found.people, found.both, found.model)]
            + [found.weight, _width(found.people), _width(found.both)]
        )
    return Covered(*np.mean(rows, axis=0).tolist())


def _holds(found: Any, truth: float) -> bool:
    """An interval that is none holds nothing."""
    return found.low is not None and bool(found.low <= truth <= found.high)


def _width(found: Any) -> float:
    return 0.0 if found.low is None else float(found.high - found.low)


@dataclass(frozen=True)
class Race:
    """A trial held against the baseline seed by seed.

    Attributes:
        seeds: at most.
        worse: by how many points.
        tails: the distribution of a seed's difference: normal, or Student's of three degrees.
    """

    seeds: int
    worse: float
    tails: str


@dataclass(frozen=True)
class Stopped:
    """Of many draws: how often a rule stops the trial, and which share of its seeds that saves.

    Attributes:
        ours: `stopping`: the wider of Student's and items, Bonferroni over the looks.
        ours_saved: the share of seeds that are not run.
        mixture: the mixture t test (Wang and Ramdas 2025; c² = 0.1), for any number of looks.
        mixture_saved: the same share.
        betting: betting on bounded differences (Waudby-Smith and Ramdas 2024).
        one_seed: an interval over the items of the first seed alone.
    """

    ours: float
    ours_saved: float
    mixture: float
    mixture_saved: float
    betting: float
    one_seed: float


BLOCKS, BLOCK = 20, 10  # 200 items of a seed; what tens of them have in common is the same mean
SPREAD = 0.036  # of a seed's difference beside that of its items; HH has so much in all


def stopped(draws: int, case: Race) -> Stopped:
    """Draws so many races."""
    rng = np.random.default_rng([case.seeds, int(case.worse), case.tails == "heavy"])
    rows = [_race(case, rng) for _ in range(draws)]
    return Stopped(*np.mean(rows, axis=0).tolist())


def _race(case: Race, rng: np.random.Generator) -> list[float]:
    noise = rng.normal(0, 1, case.seeds)
    if case.tails == "heavy":
        noise = rng.standard_t(3, case.seeds) / math.sqrt(3)
    names = [str(k) for k in range(BLOCKS)]
    zeros = Items(names, names, np.zeros(BLOCKS))
    ours = {seed: _differences(case, SPREAD * noise[seed], rng) for seed in range(case.seeds)}
    items = {seed: Items(names, [f"{seed} {k}" for k in names], v) for seed, v in ours.items()}
    means = np.array([values.mean() for values in ours.values()])
    at = case.seeds
    for k in looks(case.seeds):
        difference = paired({s: items[s] for s in range(k)}, dict.fromkeys(range(k), zeros))
        if lost(difference, case.seeds):
            at = k
            break
    mixed = _mixture(means)
    first = paired({0: items[0]}, {0: zeros})
    alone = first.p is not None and first.mean is not None and first.mean < 0 and first.p <= LEVEL
    return [
        *(float(at < case.seeds), 1 - at / case.seeds),
        *(float(mixed < case.seeds), 1 - mixed / case.seeds),
        *(_betting(means), float(alone)),
    ]


def _differences(case: Race, shift: float, rng: np.random.Generator) -> Floats:
    """Mean differences of blocks of items: a fifth are right in one trial alone."""
    mean = shift - case.worse / 100
    chances = [max(0.0, 0.1 + mean / 2), max(0.0, 0.1 - mean / 2)]
    up, down, _ = rng.multinomial(BLOCK, [*chances, 1 - sum(chances)], BLOCKS).T
    return np.asarray((up - down) / BLOCK)


def _mixture(means_S: Floats) -> int:
    """After how many seeds the mixture t test stops."""
    for k in range(2, len(means_S)):
        some = means_S[:k]
        if some.mean() >= 0 or not some.std():
            continue
        t2 = some.mean() ** 2 / (some.var(ddof=1) / k)
        share = 0.1 / (k + 0.1)
        value = math.sqrt(share) * ((1 + t2 / (k - 1)) / (1 + share * t2 / (k - 1))) ** (k / 2)
        if value >= 1 / LEVEL:
            return k
    return len(means_S)


def _betting(means_S: Floats) -> float:
    """Whether one who bets all on "worse" with every seed ever has 2 / level: no bet wins more."""
    return float(np.cumprod(1 - means_S).max() >= 2 / LEVEL)


def _all(kind: Any, cases: list[Any]) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(2) as pool:
        made = pool.map(kind, cases)
        return [asdict(case) | asdict(found) for case, found in zip(cases, made, strict=True)]


def tables(found: dict[str, Any], part: str) -> Iterator[str]:
    """As BENCHMARKS.md has them."""
    return lines(
        {"people": _of_people, "accuracies": _of_accuracies, "stops": _of_stops}[part](found)
    )


def _of_people(found: dict[str, Any]) -> Iterator[list[str]]:
    keys = ("agrees", "rate", "per_prompt", "judged")
    rows = {tuple(row[key] for key in keys): row for row in found["judged"]}
    agreements, rates, shared, sizes = (sorted({*values}) for values in zip(*rows, strict=True))
    heads = ["gold agrees with people", "win rate", "items a prompt"]
    yield [*heads, *(f"{size} judged" for size in sizes)]
    for agrees, rate, items in product(reversed(agreements), rates, shared):
        cells = [_inside(rows[agrees, rate, items, size]) for size in sizes]
        yield [f"{100 * agrees:.0f} %", f"{100 * rate:.0f} %", str(items), *cells]


def _of_accuracies(found: dict[str, Any]) -> Iterator[list[str]]:
    keys = ("agrees", "copies", "per_prompt", "judged")
    rows = {tuple(row[key] for key in keys): row for row in found["accuracies"]}
    agreements, sides, shared, sizes = (sorted({*values}) for values in zip(*rows, strict=True))
    heads = ["gold agrees with people", "takes the annotator's side", "pairs a prompt"]
    yield [*heads, *(f"{size} labelled" for size in sizes)]
    for agrees, side, items in product(reversed(agreements), sides, shared):
        cells = [_inside(rows[agrees, side, items, size]) for size in sizes]
        yield [f"{100 * agrees:.0f} %", f"{100 * side:.0f} %", str(items), *cells]


def _inside(row: dict[str, float]) -> str:
    """How often the truth is inside, and by how much narrower two are than people alone."""
    people, both, model = (100 * row[key] for key in ("people", "both", "model"))
    narrower = max(0.0, 100 * (1 - row["width"] / row["people_width"]))
    return f"{people:.1f} / **{both:.1f}** / {model:.0f}, {narrower:.0f} %"


def _of_stops(found: dict[str, Any]) -> Iterator[list[str]]:
    stopped = ["stopped: ours", "the mixture t test"]
    saved = ["seeds saved: ours", "the mixture t test", "one seed's items alone"]
    yield ["seeds", "worse by, points", *stopped, *saved]
    for row in (row for row in found["races"] if row["tails"] == "normal"):
        stops, saves = (
            [f"**{100 * row[f'ours{of}']:{form}} %**", f"{100 * row[f'mixture{of}']:{form}} %"]
            for of, form in (("", ".1f"), ("_saved", ".0f"))
        )
        alone = f"{100 * row['one_seed']:.0f} %"
        yield [f"{row['seeds']}", f"{row['worse']:.0f}", *stops, *saves, alone]


def draw(judged: list[dict[str, Any]], races: list[dict[str, Any]], place: Path) -> None:
    """Coverage and width by how many people judge; stops by how much worse a trial is."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text
    mpl.rcParams["svg.hashsalt"] = "intervals"
    from matplotlib import pyplot

    chart, (left, middle, right) = pyplot.subplots(1, 3, figsize=(9.5, 3.0), layout="constrained")
    for mark, size, shift in (("people", 3, -1), ("both", 4, 1)):
        at = [row["judged"] + 3 * shift for row in judged]
        shares = [100 * row[mark] for row in judged]
        left.plot(at, shares, "x" if shift < 0 else "o", markersize=size, label=mark)
    left.axhspan(94, 96, color="C0", alpha=0.12)
    left.set(ylim=(92, 98), xlabel="items that people judge", ylabel="truth inside, %")
    left.legend(fontsize=7)
    for agrees in sorted({row["agrees"] for row in judged}):
        some = [r for r in judged if (r["agrees"], r["rate"], r["per_prompt"]) == (agrees, 0.5, 1)]
        widths = [100 * (1 - row["width"] / row["people_width"]) for row in some]
        label = f"agrees {100 * agrees:.0f} %"
        middle.plot([row["judged"] for row in some], widths, "o-", label=label)
    middle.set(xlabel="items that people judge", ylabel="narrower, %")
    middle.legend(fontsize=7)
    for seeds in sorted({row["seeds"] for row in races}):
        some = [row for row in races if (row["seeds"], row["tails"]) == (seeds, "normal")]
        saved = [100 * row["ours_saved"] for row in some]
        right.plot([row["worse"] for row in some], saved, "o-", label=f"{seeds} seeds")
    right.set(xlabel="worse by, points", ylabel="seeds saved, %")
    right.legend(fontsize=7)
    chart.savefig(place, metadata={"Date": None})


def main(
    plot: Annotated[Path | None, typer.Option(help="an SVG file")] = None,
    draws: Annotated[int, typer.Option(help="of each case")] = 2000,
) -> None:
    """Simulates all, and prints it."""
    sizes, rates, agreements = (50, 100, 200), (0.5, 0.7, 0.9), (0.5, 0.7, 0.9)
    cases = [Judged(*each) for each in product(sizes, rates, agreements, (1, PER_PROMPT))]
    races = [Race(*each) for each in product((5, 8, 10), (0.0, 5.0, 10.0, 15.0, 20.0), ("normal",))]
    races += [Race(seeds, 0.0, "heavy") for seeds in (5, 8, 10)]
    pairs = product((100, 500), (0.7,), agreements, (1, PER_PROMPT), (0.0, 0.3))
    cover = partial(covered, draws)
    judged, raced = _all(cover, cases), _all(partial(stopped, draws), races)
    accuracies = _all(cover, [Labelled(*each) for each in pairs])
    if plot is not None:
        draw(judged, raced, plot)
    for row in [*judged, *accuracies, *raced]:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    print(json.dumps({"draws": draws, "judged": judged, "accuracies": accuracies, "races": raced}))


if __name__ == "__main__":
    typer.run(main)
