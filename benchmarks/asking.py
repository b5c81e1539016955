"""Human pairs in; whether it matters which of them people label next, as learning curves, out.

    python benchmarks/asking.py --model FOLDER --cache FILE.npz [--data hh] [--plot FILE.svg]

An annotator is a linear Bradley–Terry head on the last hidden states of a frozen model. Eight of
them, by bootstrap over one trunk, are trained in a fraction of a second. A seed draws the debates
(of HH, the prompts) that are held out, the first labels, and the bootstrap; all arms have these in
common. CWPO_DATA names a folder with the data; the cache holds the hidden states (minutes, once).
The last line is one JSON object with all figures.

Shapes: N pairs, A answers, H width of a hidden state, K annotators, n labels, d ≤ H dimensions,
S seeds, R rounds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process, decided before numpy

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import typer
from asking_states import Data, Places, loaded, made
from measure import environment
from numpy.typing import NDArray
from page_tables import cell, lines

from cwpo_dist.acquisition import RIDGE, STRATEGIES, Candidates, informative, most_worth
from cwpo_dist.config import ModelConfig
from cwpo_dist.evaluation.paired import Items, Mean, over_seeds, paired
from cwpo_dist.pairs.records import prompt_of
from cwpo_dist.weighting import Floats, Scale, join, sigmoid

ROUNDS = (32, 64, 128, 256, 512, 1024)  # labels; the first are drawn
HEADS = 8
TEST_SHARE = 0.25  # of 16 debates, or of all prompts


class Arm(NamedTuple):
    """How pairs are chosen.

    Attributes:
        strategy: a key of `STRATEGIES`.
        rule: whether a second pair of a prompt comes behind all first ones.
    """

    strategy: str
    rule: bool


ARMS = [Arm(name, rule) for name in STRATEGIES for rule in (True, False)]


@dataclass(frozen=True)
class Setting:
    """What all arms of a seed have in common.

    Attributes:
        seed: of what is drawn.
        test: [N] whether a pair is of a held-out debate.
        counts: [K, N] how often each annotator's bootstrap has a pair.
        first: [n] the pairs that are labelled before anything is known.
    """

    seed: int
    test: NDArray[np.bool_]
    counts: Floats
    first: Places

    @classmethod
    def of(cls, data: Data, seed: int) -> Setting:
        """Draws it."""
        rng = np.random.default_rng(seed)
        debates = rng.permutation(np.unique(data.debates))
        held_out = debates[: round(TEST_SHARE * len(debates))]
        test = np.isin(data.debates, held_out)
        counts = rng.poisson(1.0, (HEADS, len(test))).astype(np.float64)
        return cls(seed, test, counts, rng.permutation(np.flatnonzero(~test))[: ROUNDS[0]])


def curve(data: Data, setting: Setting, arm: Arm) -> Iterator[Floats]:
    """The annotators' mean margins [N] after each round."""
    labelled, margins_NK = setting.first, np.empty(0)
    for labels in ROUNDS:
        if labels > len(labelled):
            more = asked(data, setting, arm, labelled, margins_NK, labels - len(labelled))
            labelled = np.concatenate([labelled, more])
        x_nH, y_n = data.differences(labelled), data.labels[labelled]
        scores_AK = data.states @ fitted(x_nH, y_n, setting.counts[:, labelled])
        margins_NK = scores_AK[data.sides[0]] - scores_AK[data.sides[1]]
        yield mean_margin(margins_NK)


def mean_margin(margins_NK: Floats) -> Floats:
    """As `cwpo ask` joins several annotators."""
    return join(margins_NK, Scale.raw(HEADS)).margin


def fitted(x_nH: Floats, y_n: Floats, counts_Kn: Floats) -> Floats:
    """Bradley–Terry heads [H, K] by Newton's method: least Σ count·log(1 + exp(−y·x·θ)) + λ|θ|²/2.

    In the span of the differences, which has all of θ.
    """
    basis_Hd, _ = np.linalg.qr(x_nH.T)
    z_nd = x_nH @ basis_Hd * y_n[:, None]
    return basis_Hd @ np.stack([_newton(z_nd[c > 0], c[c > 0]) for c in counts_Kn], axis=1)


def _newton(z_nd: Floats, count_n: Floats) -> Floats:
    theta = np.zeros(z_nd.shape[1])
    for _ in range(50):
        wrong = sigmoid(-z_nd @ theta)
        gradient = RIDGE * theta - (count_n * wrong) @ z_nd
        if np.abs(gradient).max() < 1e-6:
            return theta
        curvature = (z_nd * (count_n * wrong * (1 - wrong))[:, None]).T @ z_nd
        theta = theta - np.linalg.solve(curvature + RIDGE * np.eye(len(theta)), gradient)
    raise SystemExit("Newton's method has not converged")


def asked(
    data: Data, setting: Setting, arm: Arm, labelled: Places, margins_NK: Floats, budget: int
) -> Places:
    """The pairs whose labels come next."""
    free = np.setdiff1d(np.flatnonzero(~setting.test), labelled)
    strategy = STRATEGIES[arm.strategy]
    if strategy.worth is None:
        return free[designed(data, arm, free, labelled, mean_margin(margins_NK), budget)]
    names = data.names[free].tolist()
    worth = strategy.worth(Candidates(names, margins_NK[free], setting.seed))
    if arm.rule:
        return free[most_worth(worth, pa.chunked_array([names]), budget)]
    return free[np.lexsort((data.names[free], -worth))[:budget]]


def designed(
    data: Data, arm: Arm, free: Places, labelled: Places, margin_N: Floats, budget: int
) -> list[int]:
    """As `cwpo ask --strategy information`, by whole states."""
    chance_N = sigmoid(margin_N) * sigmoid(-margin_N)
    x_nH = data.differences(labelled)
    past = (x_nH * chance_N[labelled, None]).T @ x_nH + RIDGE * np.eye(x_nH.shape[1])
    prompts = np.unique([prompt_of(name) for name in data.names[free]], return_inverse=True)[1]
    groups = prompts if arm.rule else np.arange(len(free))
    return informative(data.differences(free), chance_N[free], past, groups, budget)


def judged(data: Data, setting: Setting, margin_N: Floats) -> dict[str, Items]:
    """Accuracy, without ties, and negative log-likelihood on the test pairs."""
    right_N = margin_N * data.labels
    kept = setting.test & (right_N != 0)
    names, debates = data.names[kept].tolist(), data.debates[kept].tolist()
    right = right_N[kept]
    return {
        "accuracy": Items(names, debates, (right > 0).astype(np.float64)),
        "nll": Items(names, debates, np.logaddexp(0, -right)),
    }


Key = tuple[Arm, int, str]  # what one number is of: arm, labels, figure
LONGER = Arm("the longer answer", False)


def one(data: Data, seed: int) -> dict[Key, Items]:
    """All figures of a seed."""
    setting = Setting.of(data, seed)
    curves = {arm: list(curve(data, setting, arm)) for arm in ARMS}
    curves[LONGER] = [data.lengths[data.sides[0]] - data.lengths[data.sides[1]]]
    print(f"seed {seed}", flush=True)
    return {
        (arm, labels, name): items
        for arm, margins in curves.items()
        for labels, margin_N in zip(ROUNDS, margins, strict=False)
        for name, items in judged(data, setting, margin_N).items()
    }


def table(found: list[dict[Key, Items]]) -> list[dict[str, Any]]:
    """A row an arm and number of labels, with differences on the same pairs of the same seeds."""

    def less(key: Key, other: Arm) -> Mean:
        ours, theirs = (
            {k: of[arm, *key[1:]] for k, of in enumerate(found)} for arm in (key[0], other)
        )
        return paired(ours, theirs)

    rows = []
    for arm, labels in product(ARMS, ROUNDS):
        row: dict[str, Any] = {**arm._asdict(), "labels": labels}
        for name in ("accuracy", "nll"):
            key = arm, labels, name
            row[name] = told(over_seeds([of[key] for of in found]))
            row[f"{name}_less_random"] = told(less(key, Arm("random", arm.rule)))
            if arm.rule:
                row[f"{name}_less_without_rule"] = told(less(key, Arm(arm.strategy, False)))
        rows.append(row)
    return rows


def told(mean: Mean) -> dict[str, float | None]:
    """Without each seed's value."""
    shown = {name: getattr(mean, name) for name in ("mean", "low", "high", "smallest")}
    return {name: None if value is None else round(value, 4) for name, value in shown.items()}


def needed(found: list[dict[Key, Items]], arm: Arm, goal: int) -> list[int | None]:
    """Labels with which an arm is as accurate as random with `goal`; its 95 % interval over seeds.

    By a bootstrap of seeds; None: more than the last round has.
    """
    ours_SR, random_SR = (
        np.array([[of[which, n, "accuracy"].values.mean() for n in ROUNDS] for of in found])
        for which in (arm, Arm("random", True))
    )
    draws = np.random.default_rng(0).integers(len(found), size=(2000, len(found)))
    at = ROUNDS.index(goal)
    drawn = [_first_at(ours_SR[d].mean(0), random_SR[d].mean(0), at) for d in draws]
    ends = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf").tolist()
    values = [_first_at(ours_SR.mean(0), random_SR.mean(0), at), *ends]
    return [None if value == np.inf else round(value) for value in values]


def _first_at(curve_R: Floats, random_R: Floats, at: int) -> float:
    """Where a curve first reaches a round of random's, straight in log labels between rounds."""
    goal, places = random_R[at], np.flatnonzero(curve_R >= random_R[at])
    if not len(places) or places[0] == 0:
        return float(ROUNDS[0]) if len(places) else np.inf
    two = slice(places[0] - 1, places[0] + 1)
    return float(2 ** np.interp(goal, curve_R[two], np.log2(ROUNDS[two])))


def tables(found: dict[str, Any], figure: str) -> Iterator[str]:
    """As BENCHMARKS.md has them: `random`, and by how much others are better than it."""
    scale, form, unit = {"accuracy": (100, ".1f", " %"), "nll": (1, ".3f", "")}[figure]
    rows = {(row["strategy"], row["labels"]): row for row in found["rows"] if row["rule"]}
    enough = {(e["strategy"], e["goal"]): e["labels"] for e in found["labels_needed"] if e["rule"]}
    goals = sorted({goal for _, goal in enough}) if figure == "accuracy" else []
    words = "labels for `random`'s", "for its"
    heads = [f"{words[k > 0]} {goal:,}" for k, goal in enumerate(goals)]
    told = [["labels", *(f"{n:,}" for n in ROUNDS[1:]), *heads]]
    for name in dict.fromkeys(name for name, _ in rows):
        less = name != "random"
        key, shown = (f"{figure}_less_random", f"+{form}") if less else (figure, form)
        cells = [cell(rows[name, n][key], scale, shown, "" if less else unit) for n in ROUNDS[1:]]
        told.append([f"`{name}`", *cells, *(_enough(enough[name, goal]) for goal in goals)])
    return lines(told)


def _enough(labels: list[int | None]) -> str:
    """A number of labels with its interval; None is more than there are."""
    value, low, high = ("–" if n is None else f"{n:,}" for n in labels)
    told = f"> {ROUNDS[-1]:,}" if value == "–" else value
    return told if low == high else f"{told} [{low}, {high}]"


def draw(rows: list[dict[str, Any]], to: Path) -> None:
    """Each arm's accuracy by the number of labels."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot

    chart, axes = pyplot.subplots(figsize=(6.0, 3.2), layout="constrained")
    for number, arm in enumerate(ARMS):
        of = [row["accuracy"] for row in rows if (row["strategy"], row["rule"]) == arm]
        style, label = ("-", arm.strategy) if arm.rule else (":", None)
        means = [each["mean"] for each in of]
        axes.plot(ROUNDS, means, style, color=f"C{number // 2}", label=label)
    axes.set(xscale="log", xlabel="labels", ylabel="accuracy on held-out debates")
    axes.set_xticks(ROUNDS, map(str, ROUNDS))
    axes.minorticks_off()
    axes.legend(fontsize=8)
    chart.savefig(to)


def main(
    model: Annotated[Path, typer.Option(help="the folder of a causal language model")],
    cache: Annotated[Path, typer.Option(help="of its hidden states; made where it is missing")],
    data: Annotated[Literal["ukp", "hh"], typer.Option(help="whose labels")] = "ukp",
    layers: Annotated[int | None, typer.Option(help="of the model, the first; all")] = None,
    seeds: int = 40,
    plot: Annotated[Path | None, typer.Option(help="an SVG file")] = None,
) -> None:
    """Measures and prints; see the head of this file."""
    if not cache.exists():
        frozen = ModelConfig(
            model_name_or_path=str(model), num_hidden_layers=layers, max_length=1024
        )
        np.savez(cache, **made(frozen, data))
    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(partial(one, loaded(cache)), range(seeds)))
    rows = table(found)
    longer = over_seeds([of[LONGER, ROUNDS[0], "accuracy"] for of in found])
    labels_needed = [
        {**arm._asdict(), "goal": goal, "labels": needed(found, arm, goal)}
        for goal, arm in product(ROUNDS[-2:], ARMS)
    ]
    result: dict[str, Any] = {
        "benchmark": "asking",
        "data": data,
        "environment": environment(),
        "seeds": seeds,
    }
    result |= {"longer_answer": told(longer), "labels_needed": labels_needed, "rows": rows}
    for figure in ("accuracy", "nll"):
        print(*tables(result, figure), sep="\n")
    print(json.dumps(result), flush=True)
    if plot is not None:
        draw(rows, plot)


if __name__ == "__main__":
    typer.run(main)
