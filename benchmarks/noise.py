"""Labels with known errors in; which labels, losses and weights make the better policy, out.

    python benchmarks/noise.py --model FOLDER --caches FOLDER [--data demo|ukp|hh] [--plot FILE.svg]

The annotator is a linear Bradley–Terry head on the states of a frozen model's first layers, the
policy is log-linear on the states of more of them: log π(y|x)/π_ref(y|x) = θ·φ(x, y)/β + a term
of x alone. So DPO's βh is θ·(φ(y⁺) − φ(y⁻)), a loss of h trains it in milliseconds, and hundreds of
trainings tell small effects from chance. With `demo` the gold rule says what an answer is worth,
and GRA over the answers sampled for a prompt is exact: no answer is drawn. All policies are judged
at one KL divergence there, for a surer one has a higher GRA. With `ukp` and `hh` the figure is the
share of people's held-out labels.

A seed draws the prompts (of UKP the debates) that are held out, the labelled part and the errors.
CWPO_DATA names a folder with the data; the caches hold the hidden states (minutes, once). The last
line is one JSON object with all figures.

Shapes: N pairs, A answers, P prompts of K answers, H width of a hidden state, n pairs of a part;
of what annotators give, K annotators.
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
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from asking import fitted, told
from asking_states import Data, Places, loaded, made
from measure import environment
from noise_cases import AGAINST_ALL, NOISE, SHARED, TRIED, WEIGHTS, Case
from noise_tables import draw
from numpy.typing import NDArray

from cwpo_dist.config import ModelConfig
from cwpo_dist.evaluation.calibration import CalibrationError, fit_temperature
from cwpo_dist.evaluation.paired import Items, over_seeds, paired
from cwpo_dist.objectives import OBJECTIVES, LossSettings, PairLogps, level_of
from cwpo_dist.weighting import Floats, Joined, Scale, confidence, join, top_count, weights

BETA = 0.5  # the paper's, in training
KL = 1.0  # nats, of each policy that is judged by gold: else the surer one would win
AXES = 256  # main axes of the states that are kept, for time
TEST_SHARE, VALIDATION_SHARE = 0.25, 0.1  # of 16 debates, or of all prompts
HEADS = 4  # of the ensemble, by bootstrap
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
TUNING = range(1000, 1005)  # seeds that choose ridges and are in no figure
LAYERS = {"demo": (4, None), "ukp": (4, None), "hh": (4, 8)}  # of annotator and policy; None: all
RIGHT = ("people_right", "annotator_right")
EVERY = {"demo": 1, "ukp": 8, "hh": 1}  # of so many pairs one is read, for time


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
        low = self.order < max(labelled, self.order[train].min() + 1e-9)  # one prompt at the least
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
        labels = self.people(Case("weak", flipped, labelled, careful))
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
        method, (known, unknown) = TRIED[case.method], self.drawn.parts(case.labelled)
        people = self.people(case)
        of = {"human": unknown, "labelled_only": known, "human100": np.append(known, unknown)}
        places = of.get(method.labels, unknown)
        if method.labels in of and not method.cleaned:
            return places, people[places], np.ones(len(places))
        said = self.judged(case.flipped, case.labelled, case.careful, method.annotators)
        if method.cleaned:
            places = places[said.margin[places] * people[places] >= 0]
            return places, people[places], np.ones(len(places))
        margin = said.margin[unknown]
        weight = weights(method.weight, np.abs(margin), said.disagreement[unknown])
        kept = np.argsort(-np.abs(margin))[: top_count(len(margin), method.top)]
        chosen = unknown[kept], np.sign(margin[kept]), weight[kept]
        if method.labels != "semi":
            return chosen
        ones = np.ones(len(known))
        places, labels, weight = chosen
        both = np.append(people[known], labels), np.append(ones, weight)
        return np.append(known, places), *both

    def people(self, case: Case) -> Floats:
        """[N] what people say, with their errors; the labelled part's may be careful."""
        labels = self.drawn.flipped(case.flipped)
        if case.careful:
            known, _ = self.drawn.parts(case.labelled)
            labels[known] = self.drawn.labels[known]
        return labels

    def policy(self, case: Case, ridge: float) -> Floats:
        """θ [H]."""
        method = TRIED[case.method]
        places, labels, weight = self.pairs(case)
        smoothing = case.flipped if method.smoothing is None else method.smoothing
        x = self.world.strong.differences(places) * labels[:, None]
        return trained(x, weight, ridge, method.loss, LossSettings(BETA, smoothing))


def trained(
    x_nH: Floats, weight_n: Floats, ridge: float, loss: str, settings: LossSettings
) -> Floats:
    """Least Σ wℓ · n/Σw + λ|θ|²/2 from θ = 0 on; x are the differences, chosen − rejected.

    Weights are divided by their mean: a policy's steps by Adam hardly know their scale either. By
    Newton's method with the absolute curvature, and steps halved until they gain: not all losses
    are convex, and where they are not this ends in the valley that the reference lies in.
    """
    objective, weight = OBJECTIVES[loss], torch.from_numpy(weight_n / weight_n.mean())
    zeros, ones = torch.zeros(len(weight), dtype=torch.float64), torch.ones(len(weight))

    def losses(h_n: torch.Tensor) -> torch.Tensor:
        pairs = PairLogps(h_n, zeros, ones, ones, zeros, zeros)
        level = float(level_of(pairs, settings).detach()) if objective.looks_ahead else 0.0
        return weight * objective.losses(pairs, replace(settings, level=level))

    def total(theta: Floats) -> float:
        return float(
            losses(torch.from_numpy(x_nH @ theta / BETA)).sum() + ridge * theta @ theta / 2
        )

    theta = np.zeros(x_nH.shape[1])
    least = total(theta)
    for _ in range(60):
        h = torch.from_numpy(x_nH @ theta / BETA).requires_grad_()
        (slope,) = torch.autograd.grad(losses(h).sum(), h, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), h)
        gradient = x_nH.T @ slope.detach().numpy() / BETA + ridge * theta
        curvature = (x_nH * bend.abs().numpy()[:, None]).T @ x_nH / BETA**2
        step = np.linalg.solve(curvature + ridge * np.eye(len(theta)), gradient)
        reached, size = total(theta - step), 1.0
        while reached > least and size > 1e-4:
            size /= 2
            reached = total(theta - size * step)
        if least - reached < 1e-4:  # of a sum of hundreds
            break
        theta, least = theta - size * step, reached
    return theta


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
    places = [data.answers[prompt] for prompt in prompts]
    # Prompts that have fewer answers are filled up by some without a chance.
    many = max(map(len, places))
    at_PK = np.array([np.pad(each, (0, many - len(each)), constant_values=-1) for each in places])
    score_PK = np.where(at_PK < 0, -np.inf, score_A[at_PK])
    values = gold_accuracy(score_PK, data.gold[at_PK], beta_of(score_PK, KL))
    return Items(prompts, prompts, values)


def beta_of(score_PK: Floats, kl: float) -> float:
    """β of policies ∝ exp(score/β) whose mean KL divergence from evenly drawn answers is `kl`."""
    low, high = 1e-6, 1e6
    for _ in range(60):
        middle = float(np.sqrt(low * high))
        chance_PK = softmax(score_PK / middle)
        logs_PK = np.log(np.where(chance_PK > 0, chance_PK, 1.0))
        even_P = np.log(np.isfinite(score_PK).sum(axis=1))
        far = float(((chance_PK * logs_PK).sum(axis=1) + even_P).mean()) > kl
        low, high = (middle, high) if far else (low, middle)
    return high


def softmax(score_PK: Floats) -> Floats:
    """Over K; never overflows."""
    raised_PK = np.exp(score_PK - score_PK.max(axis=1, keepdims=True))
    found: Floats = raised_PK / raised_PK.sum(axis=1, keepdims=True)
    return found


def gold_accuracy(score_PK: Floats, gold_PK: Floats, beta: float) -> Floats:
    """The probability [P] that gold puts an answer of the policy above one of its reference.

    Both answer by one of the K answers sampled from the reference, the policy with probability
    ∝ exp(score/β). A tie counts half here, since the same answer may come twice: ½ is no effect.
    A score of −∞ is of no answer.
    """
    even_PK = softmax(np.where(np.isfinite(score_PK), 0.0, -np.inf))
    wins_PKK = (np.sign(gold_PK[:, :, None] - gold_PK[:, None, :]) + 1) / 2
    found: Floats = np.einsum("pk,pkj,pj->p", softmax(score_PK / beta), wins_PKK, even_PK)
    return found


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


def baselines(case: Case) -> list[Case]:
    """What a case is held against: all else alike."""
    named = ("human", "human100", "weak", "cw_mean", "labelled_only")
    return [case._replace(method=name) for name in named if name != case.method]


def rows(
    cases: Sequence[Case],
    found: Sequence[dict[Case, Items]],
    ridges: dict[Case, float],
    right: dict[Case, Any],
) -> Iterator[dict[str, Any]]:
    """A row a case: its figure, and differences on the same items of the same seeds."""
    for case in cases:
        row: dict[str, Any] = {**case._asdict(), "ridge": ridges[case.plain], **right.get(case, {})}
        row["figure"] = told(over_seeds([of[case.plain] for of in found]))
        for other in baselines(case):
            if other.plain in ridges:
                ours, theirs = (
                    {k: of[each.plain] for k, of in enumerate(found)} for each in (case, other)
                )
                row[f"less_{other.method}"] = told(paired(ours, theirs))
        yield row


def labels_right(world: World, cases: Sequence[Case], seeds: int) -> dict[Case, Any]:
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
    world = World(world.weak.every(EVERY[data]), world.strong.every(EVERY[data]))
    cases = list(dict.fromkeys(NOISE + WEIGHTS + SHARED + (AGAINST_ALL if data == "demo" else [])))
    with ProcessPoolExecutor(processes) as pool:
        ridges = chosen(world, list({case.plain: None for case in cases}), pool)
        found = []
        for seed, figures in enumerate(pool.map(partial(one, world, ridges), range(seeds))):
            found.append(figures)
            print(f"seed {seed}", flush=True)
    table = list(rows(cases, found, ridges, labels_right(world, cases, seeds)))
    result: dict[str, Any] = {"benchmark": "noise", "data": data, "seeds": seeds}
    result |= {"environment": environment(), "rows": table}
    print(json.dumps(result), flush=True)
    if plot is not None:
        draw(result, plot)


def states(model: Path, caches: Path, name: str, layers: int | None) -> Data:
    """The states of a model's first layers, along their main axes; from the cache where it is."""
    cache = caches / f"{name}-{layers or 'all'}.npz"
    if not cache.exists():
        caches.mkdir(parents=True, exist_ok=True)
        frozen = ModelConfig(
            model_name_or_path=str(model), num_hidden_layers=layers, max_length=1024
        )
        np.savez(cache, **made(frozen, name))
    data = loaded(cache)
    axes = np.linalg.svd(data.states, full_matrices=False)[2][:AXES]
    return replace(data, states=data.states @ axes.T)


if __name__ == "__main__":
    typer.run(main)
