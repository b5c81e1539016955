"""Labels with known errors in; which labels, losses and weights make the better policy, out.

    python benchmarks/noise.py --model FOLDER --caches FOLDER [--data demo|ukp|hh] [--plot FILE.svg]

The annotator is a linear Bradley–Terry head on the states of a frozen model's first layers, the
policy is log-linear on the states of more of them: log π(y|x)/π_ref(y|x) = θ·φ(x, y)/β + a number
of x. So DPO's βh is θ·(φ(y⁺) − φ(y⁻)), every loss of the project trains it to its optimum in
milliseconds, and hundreds of trainings tell small effects from chance. With `demo` the gold rule
says what an answer is worth, and GRA over the answers sampled for a prompt is exact: no answer is
drawn. With `ukp` and `hh` the figure is the share of people's held-out labels.

A seed draws the prompts (of UKP the debates) that are held out, the labelled part and the errors.
CWPO_DATA names a folder with the data; the caches hold the hidden states (minutes, once). The last
line is one JSON object with all figures.

Shapes: N pairs, A answers, H width of a hidden state, K annotators, n pairs of a part.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process, decided before numpy

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import typer
from asking import fitted, told
from asking_states import Data, Places, loaded, made
from measure import environment
from numpy.typing import NDArray

from cwpo_dist.config import ModelConfig
from cwpo_dist.evaluation.calibration import CalibrationError, fit_temperature
from cwpo_dist.evaluation.paired import Items, over_seeds, paired
from cwpo_dist.objectives import OBJECTIVES, LossSettings, PairLogps, level_of
from cwpo_dist.weighting import Floats, Joined, Scale, confidence, join, top_count, weights

BETA = 0.5  # the paper's
TEST_SHARE, VALIDATION_SHARE = 0.25, 0.1  # of 16 debates, or of all prompts
HEADS = 4  # of the ensemble, by bootstrap
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
TUNING = range(1000, 1008)  # seeds that choose ridges and are in no figure
LAYERS = {"demo": (4, None), "ukp": (4, None), "hh": (4, 8)}  # of annotator and policy; None: all


class Method(NamedTuple):
    """What a policy is trained on, and how.

    Attributes:
        labels: whose: human (of the unlabelled part), human100, or the annotators'.
        loss: a key of `OBJECTIVES`.
        smoothing: ε of the loss; None: the share of flipped labels.
        weight: a key of `WEIGHT_FUNCTIONS`, of the annotators' margin.
        top: the most confident share that is kept.
        annotators: one; or how several are joined (ensemble), or one divided by its temperature
            (calibrated).
        cleaned: without human labels that the annotator denies.
    """

    labels: Literal["human", "human100", "annotator"]
    loss: str = "sigmoid"
    smoothing: float | None = 0.0
    weight: str = "one"
    top: float = 1.0
    annotators: Literal["one", "ensemble", "calibrated"] = "one"
    cleaned: bool = False


METHODS = {
    "human100": Method("human100"),
    "human": Method("human"),
    "human, cDPO": Method("human", smoothing=0.1),
    "human, rDPO": Method("human", "robust", 0.1),
    "human, rDPO, share known": Method("human", "robust", None),
    "human, ROPO": Method("human", "ropo"),
    "human, Dr. DPO": Method("human", "dr_dpo"),
    "human, cleaned": Method("human", cleaned=True),
    "weak": Method("annotator"),
    "cw_mean": Method("annotator", weight="confidence"),
    "cw_calibrated": Method("annotator", weight="confidence", annotators="calibrated"),
    "ensemble": Method("annotator", weight="lower_confidence", annotators="ensemble"),
}
ABLATIONS = {
    "weak": Method("annotator"),
    "top 30 %": Method("annotator", top=0.3),
    "top 50 %": Method("annotator", top=0.5),
    "top 75 %": Method("annotator", top=0.75),
    "C": Method("annotator", weight="confidence"),
    "σ(m)": Method("annotator", weight="sigmoid"),
    "min(m, 1)": Method("annotator", weight="clipped"),
    "min(0.2 m, 1)": Method("annotator", weight="clipped_fifth"),
}


class Case(NamedTuple):
    """A method, and the world that it is tried in.

    Attributes:
        method: its name.
        flipped: the share of training labels turned round.
        labelled: the share of training prompts whose labels the annotator learns.
        careful: whether the labels that the annotator learns are not flipped.
    """

    method: str
    flipped: float
    labelled: float = 0.3
    careful: bool = False


FLIPPED = (0.0, 0.1, 0.2, 0.3, 0.4)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
NOISE = [Case(name, share) for share in FLIPPED for name in METHODS]
SMALL = [Case(name, 0.0) for name in ABLATIONS]
SHARED = [Case(name, 0.0, share) for share in SHARES for name in ("weak", "cw_mean")]
QUALITY = [
    Case(name, flipped, share, careful)
    for flipped in FLIPPED
    for share in (0.05, 0.2, 0.5)
    for careful in (False, True)
    for name in ("weak", "cw_mean")
]


@dataclass(frozen=True)
class World:
    """A data set by its annotator's and its policy's states; both have the pairs in one order."""

    weak: Data
    strong: Data


@dataclass(frozen=True)
class Drawn:
    """What a seed draws.

    Attributes:
        labels: [N] 1 or −1: what people say before any label is flipped.
        test: [N] held out for the figures.
        validation: [N] held out for temperatures.
        order: [N] from 0 to 1, by prompt: a pair is labelled below the labelled share.
        luck: [N] from 0 to 1: a label is flipped below the flipped share.
        counts: [K, N] how often each head's bootstrap has a pair.
    """

    labels: Floats
    test: NDArray[np.bool_]
    validation: NDArray[np.bool_]
    order: Floats
    luck: Floats
    counts: Floats

    @classmethod
    def of(cls, data: Data, seed: int) -> Drawn:
        """Draws it."""
        rng = np.random.default_rng(seed)
        groups, group_N = np.unique(data.debates, return_inverse=True)
        place_N = (rng.permutation(len(groups)) / len(groups))[group_N]
        prompts, prompt_N = np.unique(data.prompts, return_inverse=True)
        n = len(data.names)
        labels = data.labels
        if data.gold is not None:
            chance = confidence(data.gold_margin) / 2 + 0.5
            labels = np.where(rng.random(n) < chance, 1.0, -1.0)
        return cls(
            labels,
            test=place_N < TEST_SHARE,
            validation=(place_N >= TEST_SHARE) & (place_N < TEST_SHARE + VALIDATION_SHARE),
            order=(rng.permutation(len(prompts)) / len(prompts))[prompt_N],
            luck=rng.random(n),
            counts=rng.poisson(1.0, (HEADS, n)).astype(np.float64),
        )

    def flipped(self, share: float) -> Floats:
        """[N] labels, some turned round."""
        return np.where(self.luck < share, -self.labels, self.labels)

    def parts(self, labelled: float) -> tuple[Places, Places]:
        """The labelled and the unlabelled part."""
        train = ~(self.test | self.validation)
        low = self.order < labelled
        return np.flatnonzero(train & low), np.flatnonzero(train & ~low)


class Trainer:
    """All trainings of a seed; what several methods read is made once."""

    def __init__(self, world: World, seed: int) -> None:
        """Draws what a seed draws."""
        self.world = world
        self.drawn = Drawn.of(world.weak, seed)
        self.judged = lru_cache(maxsize=None)(self._judged)

    def _judged(self, flipped: float, labelled: float, careful: bool, kind: str) -> Joined:
        """What the annotators say of all pairs."""
        data, drawn = self.world.weak, self.drawn
        places, _ = drawn.parts(labelled)
        labels = drawn.labels if careful else drawn.flipped(flipped)
        counts = drawn.counts[:, places] if kind == "ensemble" else np.ones((1, len(places)))
        heads = fitted(data.differences(places), labels[places], counts)
        scores_AK = data.states @ heads
        margins_NK = scores_AK[data.sides[0]] - scores_AK[data.sides[1]]
        scale = Scale.raw(margins_NK.shape[1])
        if kind == "calibrated":
            held = np.flatnonzero(drawn.validation)
            people = (labels[held] + 1) / 2
            groups = data.prompts[held].tolist()
            with suppress(CalibrationError):  # raw where the annotator is wrong more often
                scale = Scale.raw(1, fit_temperature(margins_NK[held, 0], people, groups).value)
        return join(margins_NK, scale)

    def pairs(self, case: Case) -> tuple[Places, Floats, Floats]:
        """Places [n], labels [n] and weights [n] of what the policy is trained on."""
        method, (known, unknown) = (
            (METHODS | ABLATIONS)[case.method],
            self.drawn.parts(case.labelled),
        )
        people = self.drawn.flipped(case.flipped)
        if method.labels == "human100":
            places = np.concatenate([known, unknown])
            return places, people[places], np.ones(len(places))
        if method.labels == "human" and not method.cleaned:
            return unknown, people[unknown], np.ones(len(unknown))
        said = self.judged(case.flipped, case.labelled, case.careful, method.annotators)
        margin = said.margin[unknown]
        if method.cleaned:
            places = unknown[margin * people[unknown] >= 0]
            return places, people[places], np.ones(len(places))
        weight = weights(method.weight, np.abs(margin), said.disagreement[unknown])
        kept = np.argsort(-np.abs(margin))[: top_count(len(margin), method.top)]
        return unknown[kept], np.sign(margin[kept]), weight[kept]

    def policy(self, case: Case, ridge: float) -> Floats:
        """θ [H]."""
        method = (METHODS | ABLATIONS)[case.method]
        places, labels, weight = self.pairs(case)
        smoothing = case.flipped if method.smoothing is None else method.smoothing
        x = self.world.strong.differences(places) * labels[:, None]
        return trained(x, weight, ridge, method.loss, LossSettings(BETA, smoothing))


def trained(x_nH: Floats, weight_n: Floats, ridge: float, loss: str, told: LossSettings) -> Floats:
    """Least Σ wℓ · n/Σw + λ|θ|²/2 from θ = 0 on; x are the differences, chosen − rejected.

    In their span, which has all of θ. Weights are divided by their mean: a policy's steps by Adam
    hardly know their scale either.
    """
    basis = np.linalg.qr(x_nH.T)[0] if len(x_nH) < x_nH.shape[1] else np.eye(x_nH.shape[1])
    x = torch.from_numpy(x_nH @ basis)
    weight = torch.from_numpy(weight_n / weight_n.mean())
    theta = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    zeros, ones = torch.zeros(len(x), dtype=torch.float64), torch.ones(len(x))
    objective = OBJECTIVES[loss]
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=200, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        pairs = PairLogps(x @ theta / told.beta, zeros, ones, ones, zeros, zeros)
        level = float(level_of(pairs, told).detach()) if objective.looks_ahead else 0.0
        losses = objective.losses(pairs, replace(told, level=level))
        total = (weight * losses).sum() + ridge * theta.square().sum() / 2
        total.backward()
        return total

    optimizer.step(closure)
    found: Floats = basis @ theta.detach().numpy()
    return found


def figure(world: World, drawn: Drawn, theta: Floats) -> Items:
    """What a policy is worth on the held-out part: GRA by prompt, or accuracy by pair."""
    data = world.strong
    score_A = data.states @ theta
    if data.gold is None:
        right = (score_A[data.sides[0]] - score_A[data.sides[1]]) * data.labels
        kept = drawn.test & (right != 0)
        names, groups = data.names[kept].tolist(), data.debates[kept].tolist()
        return Items(names, groups, (right[kept] > 0).astype(np.float64))
    prompts = np.unique(data.prompts[drawn.test]).tolist()
    values = [gold_accuracy(score_A[at], data.gold[at]) for at in map(data.answers.get, prompts)]
    return Items(prompts, prompts, np.array(values))


def gold_accuracy(score: Floats, gold: Floats) -> float:
    """The probability that gold puts an answer of the policy above one of its reference.

    Both answer by one of the answers sampled from the reference, the policy with probability
    ∝ exp(score/β). A tie counts half here, since the same answer may come twice: ½ is no effect.
    """
    chance = np.exp((score - score.max()) / BETA)
    ahead = (np.sign(gold[:, None] - gold[None, :]).mean(axis=1) + 1) / 2
    return float(chance @ ahead / chance.sum())


def one(world: World, ridges: dict[Case, float], seed: int) -> dict[Case, Items]:
    """The figure of each case with its ridge."""
    trainer = Trainer(world, seed)
    return {
        case: figure(world, trainer.drawn, trainer.policy(case, ridge))
        for case, ridge in ridges.items()
    }


def sides_of(world: World, case: Case, seed: int) -> tuple[float, float]:
    """The shares of right labels in the unlabelled part: people's, and the annotator's."""
    trainer = Trainer(world, seed)
    _, places = trainer.drawn.parts(case.labelled)
    data, drawn = world.weak, trainer.drawn
    truth = drawn.labels if data.gold is None else np.sign(data.gold_margin)
    margin = trainer.judged(case.flipped, case.labelled, case.careful, "one").margin
    people = drawn.flipped(case.flipped) * truth
    return float((people[places] > 0).mean()), float(((margin * truth)[places] > 0).mean())


def chosen(world: World, cases: Sequence[Case], pool: ProcessPoolExecutor) -> dict[Case, float]:
    """The best ridge of each case, by the mean figure of the seeds of `TUNING`."""
    means = {case: dict.fromkeys(RIDGES, 0.0) for case in cases}
    for ridge in RIDGES:
        of_ridge = dict.fromkeys(cases, ridge)
        for found in pool.map(partial(one, world, of_ridge), TUNING):
            for case, items in found.items():
                means[case][ridge] += items.values.mean() / len(TUNING)
        print(f"ridge {ridge}", flush=True)
    return {case: max(of, key=lambda ridge: of[ridge]) for case, of in means.items()}


def baselines(case: Case) -> Iterator[Case]:
    """What a case is held against: people's labels with the same errors, and other weights."""
    yield Case("human", case.flipped)
    if (METHODS | ABLATIONS)[case.method].labels == "annotator":
        yield Case("human100", case.flipped)
        yield case._replace(method="weak")


def rows(
    found: list[dict[Case, Items]], ridges: dict[Case, float], right: dict[Case, Any]
) -> Iterator[dict[str, Any]]:
    """A row a case: its figure, and differences on the same items of the same seeds."""
    for case in ridges:
        row: dict[str, Any] = {**case._asdict(), "ridge": ridges[case], **right.get(case, {})}
        row["figure"] = told(over_seeds([of[case] for of in found]))
        for other in baselines(case):
            if other != case and other in ridges:
                ours, theirs = ({k: of[c] for k, of in enumerate(found)} for c in (case, other))
                row[f"less_{other.method}"] = told(paired(ours, theirs))
        yield row


RIGHT = ("people_right", "annotator_right")


def known(world: World, cases: Sequence[Case], seeds: int) -> dict[Case, Any]:
    """Of the cases of `weak` and `cw_mean`, how many labels people and the annotator have right."""
    of = [case for case in cases if case.method in {"weak", "cw_mean"}]
    shares = {
        case: np.mean([sides_of(world, case, seed) for seed in range(seeds)], axis=0)
        for case in {each._replace(method="weak") for each in of}
    }
    named = {
        case: dict(zip(RIGHT, of.round(4).tolist(), strict=True)) for case, of in shares.items()
    }
    return {case: named[case._replace(method="weak")] for case in of}


def tables(rows: list[dict[str, Any]], which: str) -> Iterator[str]:
    """As BENCHMARKS.md has them.

    Args:
        rows: of the JSON.
        which: noise: methods by flipped labels; all: weighted labels beside all of people's, by
            what the annotator has learned; weights; shares: by the labelled share.
    """
    plain = {"flipped": 0.0, "labelled": 0.3, "careful": False}
    if which == "noise":
        yield from _table("labels flipped", [f"{share:.0%}" for share in FLIPPED])
        for name in sorted(METHODS, key=lambda name: name != "human"):
            cells = [_row(rows, plain | {"method": name, "flipped": share}) for share in FLIPPED]
            key = "figure" if name == "human" else "less_human"
            yield f"| `{name}` | " + " | ".join(_cell(row[key], key) for row in cells) + " |"
    elif which == "all":
        yield from _table("labelled, and labels flipped", [f"{share:.0%}" for share in FLIPPED])
        for careful in (False, True):
            for share in sorted({case.labelled for case in QUALITY}):
                told = {"method": "cw_mean", "labelled": share, "careful": careful}
                cells = [_row(rows, told | {"flipped": flipped}) for flipped in FLIPPED]
                name = f"{share:.0%}, {'none of these' if careful else 'these, too'}"
                yield (
                    f"| {name} | "
                    + " | ".join(
                        f"{100 * row['people_right']:.0f} → {100 * row['annotator_right']:.0f} %: "
                        + _cell(row["less_human100"], "less")
                        for row in cells
                    )
                    + " |"
                )
    elif which == "weights":
        yield from _table("weights", ["figure", "less `weak`", "less `human100`"])
        for name in ABLATIONS:
            row = _row(rows, plain | {"method": name})
            keys = ("figure", "less_weak", "less_human100")
            yield f"| {name} | " + " | ".join(_cell(row.get(key), key) for key in keys) + " |"
    else:
        yield from _table(
            "labelled", ["labels right", "`weak`", "`cw_mean` less `weak`", "less `human100`"]
        )
        for share in SHARES:
            weak, cw = (
                _row(rows, plain | {"method": m, "labelled": share}) for m in ("weak", "cw_mean")
            )
            cells = (
                _cell(weak["figure"], "figure"),
                *(_cell(cw[k], k) for k in ("less_weak", "less_human100")),
            )
            yield (
                f"| {share:.0%} | {100 * weak['annotator_right']:.1f} % | "
                + " | ".join(cells)
                + " |"
            )


def _table(corner: str, columns: Sequence[str]) -> Iterator[str]:
    yield f"| {corner} | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"


def _row(rows: list[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))


def _cell(mean: dict[str, float] | None, key: str) -> str:
    """In percent, or in points with a sign, bold where the interval leaves zero out."""
    if mean is None:
        return ""
    form = ".1f" if key == "figure" else "+.1f"
    value, low, high = (f"{100 * mean[end]:{form}}" for end in ("mean", "low", "high"))
    bold = "**" if key != "figure" and mean["low"] * mean["high"] > 0 else ""
    return f"{bold}{value}{bold} [{low}, {high}]".replace("-", "−")


def draw(table: list[dict[str, Any]], to: Path) -> None:
    """How far weighted labels are from all of people's, by the errors of both."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot

    chart, axes = pyplot.subplots(1, 2, figsize=(9.0, 3.4), sharey=True, layout="constrained")
    for careful, panel in zip((False, True), axes, strict=True):
        for number, share in enumerate(sorted({case.labelled for case in QUALITY})):
            of = [
                row
                for row in table
                if (row["method"], row["labelled"], row["careful"]) == ("cw_mean", share, careful)
            ]
            points = {
                row["flipped"]: row["less_human100"] for row in of if row["flipped"] in FLIPPED
            }
            at = [100 * flipped + 0.5 * (number - 1) for flipped in points]
            means, lows, highs = (
                100 * np.array([each[key] for each in points.values()])
                for key in ("mean", "low", "high")
            )
            bars, label = (means - lows, highs - means), f"{100 * share:g} %"
            panel.errorbar(at, means, bars, label=label, capsize=2)
        panel.axhline(0, color="gray", linewidth=0.8)
        whose = "right, as careful people gave them" if careful else "flipped, too"
        panel.set(xlabel="training labels flipped, %", title=f"the annotator's labels are {whose}")
        panel.title.set_fontsize(9)
    axes[0].set_ylabel("GRA of cw_mean less human100, points")
    axes[0].legend(title="labelled", fontsize=8)
    chart.savefig(to)


def main(
    model: Annotated[Path, typer.Option(help="the folder of a causal language model")],
    caches: Annotated[Path, typer.Option(help="a folder of hidden states; made where missing")],
    data: Annotated[Literal["demo", "ukp", "hh"], typer.Option(help="whose pairs")] = "demo",
    seeds: int = 40,
    processes: int = 2,
    plot: Annotated[Path | None, typer.Option(help="an SVG file, of the demo's pairs")] = None,
) -> None:
    """Measures and prints; see the head of this file."""
    world = World(*(states(model, caches, data, layers) for layers in LAYERS[data]))
    cases = list(dict.fromkeys(NOISE + SMALL + SHARED + (QUALITY if data == "demo" else [])))
    with ProcessPoolExecutor(processes) as pool:
        ridges = chosen(world, cases, pool)
        found = []
        for seed, figures in enumerate(pool.map(partial(one, world, ridges), range(seeds))):
            found.append(figures)
            print(f"seed {seed}", flush=True)
    table = list(rows(found, ridges, known(world, cases, seeds)))
    result: dict[str, Any] = {"benchmark": "noise", "data": data, "seeds": seeds}
    result |= {"environment": environment(), "rows": table}
    print(json.dumps(result), flush=True)
    if plot is not None:
        draw(table, plot)


def states(model: Path, caches: Path, data: str, layers: int | None) -> Data:
    """The states of a model's first layers, from the cache where it has them."""
    cache = caches / f"{data}-{layers or 'all'}.npz"
    if not cache.exists():
        caches.mkdir(parents=True, exist_ok=True)
        frozen = ModelConfig(
            model_name_or_path=str(model), num_hidden_layers=layers, max_length=1024
        )
        np.savez(cache, **made(frozen, data))
    return loaded(cache)
