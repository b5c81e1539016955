"""Human pairs in; what several heads on one annotator cost, and what they are worth, out.

    python benchmarks/heads.py --model FOLDER [--part cost|worth] [--help]

cost: steps of a training, and the worker of `annotate` from text to scores, with eight heads and
    with one, in turns; a second annotator of one head in the same turns shows the noise. In CPU
    seconds of this process, which has one thread.
worth: annotators of the first layers, fine-tuned on UKP's labels but for their embeddings, judged
    on debates that they have not seen: one, four of other seeds, and eight heads on one.

CWPO_DATA names a folder with ukp_convincing.jsonl.gz. The last line is one JSON object.

Shapes: N pairs, K annotators or heads.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process, decided before torch

import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import measure
import numpy as np
import torch
import typer
from asking_states import debate_of

from cwpo_dist.config import FitConfig, ModelConfig
from cwpo_dist.evaluation.accuracy import annotator_accuracy
from cwpo_dist.evaluation.paired import Items, over_seeds, paired
from cwpo_dist.lm.batches import global_batch
from cwpo_dist.lm.encoder import Asked
from cwpo_dist.lm.fitting import encode_pairs
from cwpo_dist.lm.loading import load_annotator_base, save
from cwpo_dist.lm.modules import AnswerScores
from cwpo_dist.lm.reading import encoder_for
from cwpo_dist.lm.recompute import start_training
from cwpo_dist.lm.rows import Row
from cwpo_dist.pairs.records import pair_id, prompt_id
from cwpo_dist.pairs.stored import Pair, write_pairs
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.forward import RowForward
from cwpo_dist.scoring.scorers import RewardWorker
from cwpo_dist.storage import Store
from cwpo_dist.training.heads import ManyHeads
from cwpo_dist.training.loop import Hooks, Run, gradients, train
from cwpo_dist.training.tasks import BradleyTerry
from cwpo_dist.training.torch_engine import TorchEngine
from cwpo_dist.weighting import Floats, Scale, join, sigmoid

HEADS, ANNOTATORS = 8, 4
BATCH, BUDGET = 16, 2048
TEST_DEBATES = 4  # of 16
Line = dict[str, Any]  # of the file


class Example(NamedTuple):
    """A pair as people judged it, the chosen answer first, and its tokens.

    Attributes:
        pair: with its texts.
        debate: its title.
        share: of people that chose so.
        row: its tokens.
    """

    pair: Pair
    debate: str
    share: float
    row: Row


def ukp() -> list[Line]:
    """Its pairs."""
    with gzip.open(str(measure.source("ukp").path), "rt") as file:
        return [json.loads(line) for line in file]


def examples(model: ModelConfig, lines: list[Line]) -> list[Example]:
    """The pairs that fit."""
    texts = [(line["prompt"], line["chosen"], line["rejected"]) for line in lines]
    asked = [Asked(prompt, answers, None) for prompt, *answers in texts]
    rows = encode_pairs(encoder_for(model, "annotator"), model, asked)
    pairs = [Pair(pair_id(prompt_id(text[0]), *text[1:]), *text, label="a") for text in texts]
    found = zip(pairs, lines, rows, strict=True)
    return [
        Example(pair, debate_of(line["prompt"]), share_of(line), row)
        for pair, line, row in found
        if isinstance(row, Row)
    ]


def share_of(line: Line) -> float:
    """Of the votes; 1 where nobody counted them."""
    yes, no, equal = (line[f"votes_{name}"] or 0 for name in ("chosen", "rejected", "equal"))
    return (yes + equal / 2) / (yes + no + equal) if yes + no + equal else 1.0


class Trainer:
    """A weak model with so many heads, and the pairs that it learns from."""

    def __init__(
        self, model: ModelConfig, given: list[Example], heads: int, seed: int, config: FitConfig
    ) -> None:
        self.encoder = encoder_for(model, "annotator")
        self.model = load_annotator_base(model, self.encoder.tokenizer, seed, heads=heads)
        self.model.get_input_embeddings().requires_grad_(requires_grad=False)
        rows, ids = [each.row for each in given], [each.pair.pair_id for each in given]
        self.task = (
            BradleyTerry(rows, ids) if heads == 1 else ManyHeads(rows, ids, None, heads, seed)
        )
        module = AnswerScores(self.model)
        self.forward = RowForward(module, self.encoder.pad_id, model.max_length, BUDGET)
        start_training(module)
        self.engine = TorchEngine(module, config)
        self.run = Run(config, seed, self.forward.layout, self.encoder.pad_id)

    def fit(self) -> None:
        """To the end."""
        train(self.task, self.engine, self.run, Hooks())
        self.engine.module.eval()

    def step(self, number: int) -> None:
        """One of them, as the loop takes it."""
        _, indices = global_batch(self.task.order, BATCH, 0, number)
        gradients(self.task, self.engine, self.run, number, indices.tolist())
        self.engine.step(1e-5)

    def margins(self, rows: list[Row]) -> Floats:
        """[N, K], chosen less rejected."""
        scores = np.array(self.forward(rows).values, np.float64).reshape(len(rows), 2, -1)
        found: Floats = scores[:, 0] - scores[:, 1]
        return found


def settings(**changes: Any) -> FitConfig:
    """Of `fit`."""
    given = {"learning_rate": 2e-4, "global_batch_size": BATCH, "logging_steps": 10_000}
    return FitConfig(**given, max_tokens_per_micro_batch=BUDGET, **changes)


def in_turns(works: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, Any]:
    """CPU seconds of each, and of the rounds' ratios to `one` the median and both quartiles."""
    took: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-1, rounds):
        for name, work in works.items():
            began = time.process_time()
            work(max(0, number))
            if number >= 0:  # the first round warms up
                took[name].append(time.process_time() - began)
    found: dict[str, Any] = {}
    for name, seconds in took.items():
        ratios = [ours / one for ours, one in zip(seconds, took["one"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        told = {"seconds": statistics.median(seconds), "ratio": middle, "low": low, "high": high}
        found[name] = {key: round(value, 4) for key, value in told.items()}
    return found


def cost(model: ModelConfig, rounds: int) -> dict[str, Any]:
    """Of a step of `fit` and of scoring one shard."""
    some = examples(model, ukp()[::360])
    kinds = {"one": 1, "again": 1, "heads": HEADS}
    trainers = {name: Trainer(model, some, n, 0, settings()) for name, n in kinds.items()}
    found = {"fit": in_turns({name: each.step for name, each in trainers.items()}, rounds)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(Store(name), 0, sorted(each.pair for each in some))
        workers = {}
        for kind, trainer in trainers.items():
            save(trainer.model, trainer.encoder.tokenizer, folder / kind)
            path = {"model_name_or_path": str(folder / kind), "num_hidden_layers": None}
            workers[kind] = RewardWorker(
                AnswersIn(Store(name)), model.model_copy(update=path), kind, BUDGET
            )
        del trainers
        scored = {k: partial(_score, worker) for k, worker in workers.items()}
        found["annotate"] = in_turns(scored, rounds)
        tables = {k: worker(0, worker.read(0)).rows for k, worker in workers.items()}
        for kind, table in tables.items():
            Store(name).create_table(f"{kind}.parquet", table)
            found["annotate"][kind]["bytes"] = (folder / f"{kind}.parquet").stat().st_size
    return found | {"pairs": len(some), "rounds": rounds}


def _score(worker: RewardWorker, _: int) -> None:
    worker(0, worker.read(0))


def judged(margins_NK: Floats, test: list[Example]) -> dict[str, Items]:
    """The figures of the mean margin on the test pairs, as a report has them."""
    joined = join(margins_NK, Scale.raw(margins_NK.shape[1]))
    margin, people = joined.margin, np.array([each.share for each in test])
    names, debates = [each.pair.pair_id for each in test], [each.debate for each in test]
    right, p = (margin > 0).astype(np.float64), sigmoid(margin)
    nll = people * np.logaddexp(0, -margin) + (1 - people) * np.logaddexp(0, margin)
    brier = people * (1 - p) ** 2 + (1 - people) * p**2
    count = np.ones(len(test))
    found = annotator_accuracy(margin, ["a"] * len(test), count, count, debates, people=people)
    spread = np.std(sigmoid(margins_NK), axis=1)
    items = {"accuracy": right, "nll": nll, "brier": brier, "spread": spread}
    numbers = {"ece": found.expected_calibration_error, "spread_finds_errors": ranks(spread, right)}
    numbers["margin_finds_errors"] = ranks(-np.abs(margin), right)
    told = {name: Items(names, debates, values) for name, values in items.items()}
    return told | {name: Items(["all"], ["all"], np.array([v])) for name, v in numbers.items()}


def ranks(value: Floats, right: Floats) -> float:
    """How often, of a pair that is wrong and one that is right, the wrong one has more (AUROC)."""
    wrong, fine = value[right == 0][:, None], value[right == 1][None]
    return float(np.mean((wrong > fine) + 0.5 * (wrong == fine)))


def one_seed(model: ModelConfig, labels: int, tests: int, epochs: float, seed: int) -> Any:
    """The figures of each arm on the held-out debates of a seed."""
    torch.set_num_threads(1)
    lines, rng = ukp(), np.random.default_rng(seed)
    debates = sorted({debate_of(line["prompt"]) for line in lines})
    held_out = set(rng.permutation(debates)[:TEST_DEBATES])
    every = examples(model, [lines[i] for i in rng.permutation(len(lines))[: 8 * (labels + tests)]])
    train_on = [each for each in every if each.debate not in held_out][:labels]
    test = [each for each in every if each.debate in held_out][:tests]
    assert (len(train_on), len(test)) == (labels, tests)
    rows, config = [each.row for each in test], settings(num_train_epochs=epochs)
    margins = []
    for heads, k in [(HEADS, 0), *((1, k) for k in range(ANNOTATORS))]:
        trainer = Trainer(model, train_on, heads, 100 * seed + k, config)
        trainer.fit()
        margins.append(trainer.margins(rows))
        print(f"seed {seed}: {heads} heads, annotator {k}", flush=True)
    longer = np.array([[float(len(r.answers[0]) - len(r.answers[1]))] for r in rows])
    arms = {"one": margins[1], "four": np.concatenate(margins[1:], axis=1)}
    arms |= {"heads": margins[0], "longer": longer}
    return {name: judged(found, test) for name, found in arms.items()}


def summary(found: list[dict[str, dict[str, Items]]]) -> dict[str, Any]:
    """Means over seeds, and differences on the same pairs of the same seeds."""
    told: dict[str, Any] = {}
    for arm, name in product(found[0], found[0]["one"]):
        told.setdefault(arm, {})[name] = shown(over_seeds([of[arm][name] for of in found]))
    for arm, other in (("heads", "one"), ("heads", "four"), ("four", "one")):
        for name in found[0]["one"]:
            ours, theirs = ({k: of[a][name] for k, of in enumerate(found)} for a in (arm, other))
            told.setdefault(f"{arm} less {other}", {})[name] = shown(paired(ours, theirs))
    return told


def shown(mean: Any) -> list[float | None]:
    """The mean and its interval."""
    values = mean.mean, mean.low, mean.high
    return [None if value is None else round(value, 4) for value in values]


def main(
    model: Annotated[Path, typer.Option(help="the folder of a causal language model")],
    part: Literal["cost", "worth"] = "cost",
    layers: int = 2,
    rounds: int = 9,
    seeds: int = 3,
    labels: Annotated[int, typer.Option(help="pairs that are trained on")] = 96,
    tests: Annotated[int, typer.Option(help="held-out pairs")] = 150,
    longest: Annotated[int, typer.Option(help="tokens of prompt and answer")] = 96,
    epochs: float = 2.0,
    processes: int = 3,
) -> None:
    """Measures and prints; see the head of this file."""
    cut = {"num_hidden_layers": layers, "max_length": longest, "chat_template": "plain"}
    given = ModelConfig.model_validate({"model_name_or_path": str(model)} | cut)
    result: dict[str, Any] = {"benchmark": "heads", "environment": measure.environment()}
    if part == "cost":
        result["cost"] = cost(given, rounds)
    else:
        work = partial(one_seed, given, labels, tests, epochs)
        result |= {"seeds": seeds, "labels": labels, "tests": tests, "epochs": epochs}
        with ProcessPoolExecutor(processes) as pool:
            result["worth"] = summary(list(pool.map(work, range(seeds))))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    typer.run(main)
