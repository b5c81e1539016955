"""How fast pairs are scored: our forward pass against the stock loop, Ray around it against none.

Usage: python benchmarks/annotate.py [--part forward|answers|pipeline|scale|all] [--help]

forward: one process, one thread, fp32. Our packed rows against the stock Hugging Face loop (right-
    padded batches of 16 sequences) on the same token ids, interleaved, in arrival order and sorted
    by length.
answers: all pairs of some prompts, each of whose answers stands in several: every answer once, in
    rows that share its prompt, from text to scores, against the stock loop on the same pairs'
    sequences. `--data ukp`: people's arguments. `--data demo`: four answers that the model samples
    to each of the demo's prompts, and all six pairs of them.
pipeline: two Ray Data actors against two bare processes, each scoring the same shards from Parquet
    to Parquet; interleaved. Start-up is apart: a process's clock starts with its first shard.
scale: a scorer that only reads lengths, at 20,000 and at 1,000,000 synthetic rows: what Ray costs a
    row, and peak memory.

The last line is one JSON object with all figures.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, groupby, islice
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process, decided before torch

import measure
import numpy as np
import torch
import typer
from forward import Scorer, answers_part, forward_part, peers

from cwpo_dist.config import ModelConfig, PoolConfig
from cwpo_dist.lm.loading import load_annotator_base, save
from cwpo_dist.lm.reading import encoder_for
from cwpo_dist.pairs.answers import Answer, read_answers
from cwpo_dist.pairs.records import (
    REJECT_SCHEMA,
    SCORE_SCHEMA,
    Score,
    pair_id,
    prompt_id,
    prompt_of,
    table_of,
)
from cwpo_dist.pairs.stored import Pair, read_pairs, write_pairs
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.driver import run_shards
from cwpo_dist.scoring.pipeline import ShardJob, commit
from cwpo_dist.scoring.retries import Input, ShardOutput
from cwpo_dist.scoring.scorers import RewardWorker
from cwpo_dist.storage import Store

LARGER = 50  # times as many rows, of the scale part's two sizes
ROWS_PER_SHARD = 1024
WORDS = "the of and to in is you that it he was for on are as with"


def annotator_folder(folder: Path, base: Path, layers: int) -> ModelConfig:
    """The base's first layers under a fresh scalar head, saved as `fit` saves an annotator."""
    settings = ModelConfig(model_name_or_path=str(base), num_hidden_layers=layers, max_length=1024)
    tokenizer = encoder_for(settings, "annotator").tokenizer
    save(load_annotator_base(settings, tokenizer, seed=0), tokenizer, folder)
    return settings.model_copy(
        update={"model_name_or_path": str(folder), "num_hidden_layers": None}
    )


def compared_pairs(folder: Path, data: str, model: Path, prompts: int) -> Store:
    """A shard of all pairs of some prompts."""
    store = Store(str(folder))
    if data == "demo":
        write_pairs(store, 0, sampled_pairs(model, prompts))
        return store
    whole, _ = measure.with_ray(partial(measure.prepared, folder / "whole", data, None, 10**6))
    by_prompt = groupby(read_pairs(whole, 0), lambda pair: prompt_of(pair.pair_id))
    write_pairs(store, 0, [pair for _, of in islice(by_prompt, prompts) for pair in of])
    return store


def sampled_pairs(model: Path, prompts: int) -> list[Pair]:
    """All six pairs of four answers that a model samples to each of the demo's first prompts."""
    encoder = encoder_for(ModelConfig(model_name_or_path=str(model)), "policy")
    lines = map(json.loads, measure.DEMO.read_text().splitlines())
    texts = list(islice(dict.fromkeys(line["prompt"] for line in lines), prompts))
    asked = [encoder.encode(text, ["."]).prompt for text in texts]
    return sorted(
        Pair(pair_id(prompt_id(text), a, b), text, a, b)
        for text, answers in zip(texts, measure.sampled(model, asked, 4), strict=True)
        for a, b in combinations(dict.fromkeys(answers), 2)
    )


class Clocked:
    """A worker that notes when each of its shards began and ended, in a file of its own."""

    def __init__(self, make_worker: Callable[[], Any], notes: Path) -> None:
        """Builds the worker; `notes` is a folder that all processes share."""
        torch.set_num_threads(1)
        self.worker, self.notes = make_worker(), notes / f"{os.getpid()}.jsonl"

    def read(self, index: int) -> Sequence[Input[Any]]:
        """The worker's rows; a shard's clock starts here."""
        self.started = time.time()
        rows: Sequence[Input[Any]] = self.worker.read(index)
        return rows

    def __call__(self, index: int, rows: Sequence[Input[Any]]) -> ShardOutput:
        """The worker's output, timed by the wall clock that all processes share."""
        output: ShardOutput = self.worker(index, rows)
        with self.notes.open("a") as file:
            note = {"start": self.started, "end": time.time(), "rows": output.rows.num_rows}
            file.write(json.dumps(note) + "\n")
        return output


def rate_of(notes: Path, shared_end: bool) -> float:
    """Rows a second of all processes together, each from its own first shard on.

    Args:
        notes: what `Clocked` left.
        shared_end: count every process up to the end of the last one: a tail then costs.
    """
    clocks = [list(map(json.loads, path.read_text().splitlines())) for path in notes.iterdir()]
    ends = [max(note["end"] for note in clock) for clock in clocks]
    total = 0.0
    for clock, own_end in zip(clocks, ends, strict=True):
        end = max(ends) if shared_end else own_end
        start = min(note["start"] for note in clock)
        total += sum(note["rows"] for note in clock) / (end - start)
    return total


def bare(job: ShardJob, numbers: Sequence[int], ready: Any) -> None:
    """What an actor does, without Ray: some shards, one after another."""
    worker = job.make_worker()
    ready.wait()
    for index in numbers:
        commit(job, index, worker(index, worker.read(index)))


def run_bare(job: ShardJob) -> None:
    """Two processes, every other shard each, that start together."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(2)
    processes = [
        context.Process(target=bare, args=(job, range(first, job.shards, 2), ready))
        for first in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def pipeline_part(
    pairs: Store, shards: int, model: ModelConfig, tokens: int, rounds: int, scratch: Path
) -> dict[str, Any]:
    """Interleaved rounds of bare processes and Ray actors over the same shards."""
    rates: dict[str, list[float]] = {"bare": [], "ray": []}
    make = partial(RewardWorker, AnswersIn(pairs), model, "bench", tokens)
    for number in range(rounds):
        for name in ("bare", "ray"):
            notes = scratch / f"{name}-{number}-notes"
            notes.mkdir()
            output = Store(str(scratch / f"{name}-{number}"))
            job = ShardJob("scores", output, shards, partial(Clocked, make, notes))
            if name == "bare":
                run_bare(job)
            else:
                measure.with_ray(partial(run_shards, job, PoolConfig(num_actors=2)))
            rates[name].append(rate_of(notes, shared_end=name == "ray"))
            print(f"  round {number + 1}: {name} {rates[name][-1]:.2f} answers/s", flush=True)
    shares = [ray / bare for ray, bare in zip(rates["ray"], rates["bare"], strict=True)]
    return {
        "shards": shards,
        "bare_answers_s": statistics.median(rates["bare"]),
        "ray_answers_s": statistics.median(rates["ray"]),
        "ray_efficiency": statistics.median(shares),
        "ray_efficiency_rounds": [round(share, 3) for share in shares],
    }


class LengthWorker:
    """Scores an answer by its length: all that is left is what the pipeline costs."""

    def __init__(self, pairs: Store) -> None:
        """Reads from the folder `pairs`."""
        self.pairs = pairs

    def read(self, index: int) -> list[Input[Answer]]:
        """The answers."""
        answers = read_answers(self.pairs, index)
        return [Input(answer.answer_id, place, answer) for place, answer in enumerate(answers)]

    def __call__(self, index: int, rows: Sequence[Input[Answer]]) -> ShardOutput:
        """The length of each answer."""
        scores = [Score(row.name, "length", len(row.given.answer)) for row in rows]
        counts = {"rows_in": len(rows), "rows": len(rows), "rejects": 0}
        return ShardOutput(table_of(scores, SCORE_SCHEMA), REJECT_SCHEMA.empty_table(), counts)


def synthetic_pairs(store: Store, rows: int) -> int:
    """Short made-up pairs in shards of 1024; returns how many shards."""
    generator = np.random.default_rng(0)
    words = np.array(
        [
            "the",
            "of",
            "and",
            "to",
            "in",
            "is",
            "you",
            "that",
            "it",
            "he",
            "was",
            "for",
            "on",
            "are",
            "as",
            "with",
        ]
    )
    shards = -(-rows // ROWS_PER_SHARD)
    for shard in range(shards):
        count = min(ROWS_PER_SHARD, rows - shard * ROWS_PER_SHARD)
        text = [[" ".join(line) for line in generator.choice(words, (count, 12))] for _ in range(3)]
        ids = [f"{shard:08x}{row:08x}" for row in range(count)]
        made = [Pair(*texts) for texts in zip(ids, *text, strict=True)]
        write_pairs(store, shard, made)
    return shards


def scale_part(scratch: Path, most: int) -> dict[str, Any]:
    """Microseconds a row and peak memory at both sizes."""
    figures: dict[str, Any] = {}
    for name, rows in (("small", most // LARGER), ("large", most)):
        pairs = Store(str(scratch / f"{name}-pairs"))
        shards = synthetic_pairs(pairs, rows)
        notes = scratch / f"{name}-length-notes"
        notes.mkdir()
        make = partial(Clocked, partial(LengthWorker, pairs), notes)
        job = ShardJob("scores", Store(str(scratch / f"{name}-lengths")), shards, make)
        with measure.PeakMemory() as memory:
            measure.with_ray(partial(run_shards, job, PoolConfig(num_actors=2)))
        figures[f"us_per_row_{name}"] = 1e6 / rate_of(notes, shared_end=True)
        figures[f"peak_mib_{name}"] = memory.peak / 2**20
        print(f"  {rows} rows: {figures}", flush=True)
    figures["us_per_row_ratio"] = figures["us_per_row_large"] / figures["us_per_row_small"]
    figures["peak_memory_ratio"] = figures["peak_mib_large"] / figures["peak_mib_small"]
    return figures


def main(
    model: Annotated[Path, typer.Option(help="a Hugging Face folder of a causal LM")] = Path(
        "runs/models/SmolLM2-135M-Instruct"
    ),
    layers: Annotated[int, typer.Option(help="keep its first layers")] = 4,
    data: Annotated[
        Literal["hh", "ukp", "demo"], typer.Option(help="hh and ukp: CWPO_DATA")
    ] = "hh",
    scorer: Annotated[Scorer, typer.Option(help="of the forward part")] = "reward",
    pairs: Annotated[int, typer.Option(help="rows read")] = 160,
    part: Annotated[
        Literal["forward", "answers", "pipeline", "scale", "all"], typer.Option()
    ] = "all",
    prompts: Annotated[int, typer.Option(help="of the answers part")] = 4,
    stock_pairs: Annotated[int, typer.Option(help="of the answers part, at most")] = 1000,
    max_tokens: Annotated[int, typer.Option(help="of one forward pass")] = 2048,
    repeats: Annotated[int, typer.Option(help="of the forward part")] = 3,
    rounds: Annotated[int, typer.Option(help="of the pipeline part")] = 5,
    rows: Annotated[int, typer.Option(help="of the scale part, at most")] = 1_000_000,
) -> None:
    """Measures and prints; see the head of this file for what is compared with what."""
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"benchmark": "annotate", "data": data, "layers": layers}
    figures |= {"scorer": scorer, "max_tokens": max_tokens, "environment": measure.environment()}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        given = ModelConfig(
            model_name_or_path=str(model), num_hidden_layers=layers, max_length=1024
        )
        annotator = annotator_folder(scratch / "annotator", model, layers)
        prepare = partial(measure.prepared, scratch / "pairs", data)
        if part in {"forward", "all"}:
            store, shards = measure.with_ray(partial(prepare, pairs, 64))
            scored = annotator if scorer == "reward" else given
            both = peers(scorer, scored, store, shards, max_tokens)
            figures |= forward_part(both, repeats)
            print(json.dumps(figures, indent=1), flush=True)
        if part in {"answers", "all"}:
            compared = compared_pairs(scratch / "compared", data, model, prompts)
            scored = annotator if scorer == "reward" else given
            figures |= answers_part(scorer, scored, compared, max_tokens, repeats, stock_pairs)
            print(json.dumps(figures, indent=1), flush=True)
        if part in {"pipeline", "all"}:
            prepare = partial(measure.prepared, scratch / "pipeline-pairs", data)
            store, shards = measure.with_ray(
                partial(prepare, 8 * pairs, 64)
            )  # 20: a tail of one is 5 %
            figures |= pipeline_part(store, shards, annotator, max_tokens, rounds, scratch)
        if part in {"scale", "all"}:
            figures |= scale_part(scratch, rows)
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
