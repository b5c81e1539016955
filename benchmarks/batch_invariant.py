"""What `annotate.batch_invariant` costs: the same pairs scored with it and without, interleaved.

Usage: python benchmarks/batch_invariant.py [--help]

One process, one thread, fp32. Pairs go in slices, each scored both ways one after the other, the
first of the two in turn. Seconds are of the process's own CPU time, which other work on the machine
disturbs least; those of the wall clock stand beside them. How many scores have other bits in other
batches is counted both ways: from batches of half the tokens, in another order.

The last line is one JSON object with all figures.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process, decided before torch

import measure
import torch
import typer
from annotate import annotator_folder

from cwpo_dist.lm.loading import load_reward_model
from cwpo_dist.lm.modules import AnswerScores
from cwpo_dist.lm.reading import encoder_for
from cwpo_dist.lm.rows import Row
from cwpo_dist.scoring.forward import RowForward
from cwpo_dist.scoring.invariant import InvariantForward

Forwards = dict[str, RowForward]
COUNTED = 30  # pairs whose bits are compared


def compared(forwards: Forwards, rows: list[Row], size: int, repeats: int) -> dict[str, Any]:
    """Seconds of each way a repeat, and the median of the repeats' ratios."""
    slices = [rows[start : start + size] for start in range(0, len(rows), size)]
    names = list(forwards)
    cpu: dict[str, list[float]] = {name: [] for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        spent, passed = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for number, part in enumerate(slices):
            for name in names if (number + repeat) % 2 else names[::-1]:
                began, started = time.process_time(), time.perf_counter()
                forwards[name](part)
                spent[name] += time.process_time() - began
                passed[name] += time.perf_counter() - started
        for name in names:
            cpu[name].append(spent[name])
            wall[name].append(passed[name])
        print(f"  repeat {repeat + 1}: CPU {spent}, wall {passed}", flush=True)
    cpu_ratios, wall_ratios = (
        [with_it / without for without, with_it in zip(*each.values(), strict=True)]
        for each in (cpu, wall)
    )
    return {
        "cpu_s": {name: statistics.median(each) for name, each in cpu.items()},
        "cpu_ratio": statistics.median(cpu_ratios),
        "cpu_ratios": [round(ratio, 3) for ratio in cpu_ratios],
        "wall_ratio": statistics.median(wall_ratios),
        "wall_ratios": [round(ratio, 3) for ratio in wall_ratios],
    }


def other_bits(forward: RowForward, rows: list[Row], tokens: int) -> int:
    """How many answers get other bits from smaller batches in another order."""
    values = forward(rows).values
    forward.max_tokens = tokens // 2
    turned = forward(rows[::-1]).values[::-1]
    forward.max_tokens = tokens
    pairs = zip(values, turned, strict=True)
    return sum(one != other for pair in pairs for one, other in zip(*pair, strict=True))


def main(
    model: Annotated[Path, typer.Option(help="a Hugging Face folder of a causal LM")] = Path(
        "runs/models/SmolLM2-135M-Instruct"
    ),
    layers: Annotated[int, typer.Option(help="keep its first layers")] = 30,
    data: Annotated[
        Literal["hh", "ukp", "demo"], typer.Option(help="hh and ukp: CWPO_DATA")
    ] = "hh",
    pairs: Annotated[int, typer.Option(help="rows read")] = 200,
    max_tokens: Annotated[int, typer.Option(help="of one forward pass")] = 4096,
    size: Annotated[int, typer.Option(help="pairs of a slice")] = 50,
    repeats: Annotated[int, typer.Option()] = 3,
) -> None:
    """Measures and prints; see the head of this file for what is compared with what."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        annotator = annotator_folder(scratch / "annotator", model, layers)
        prepare = partial(measure.prepared, scratch / "pairs", data, pairs, 64)
        store, shards = measure.with_ray(prepare)
        encoder = encoder_for(annotator, "reward model")
        rows, pad = measure.encoded(store, shards, encoder, annotator), encoder.pad_id
        modules = [AnswerScores(load_reward_model(annotator)) for _ in range(2)]
    started = time.process_time()
    plain = RowForward(modules[0], pad, annotator.max_length, max_tokens)
    proved = time.process_time()
    invariant = InvariantForward(modules[1], pad, annotator.max_length, max_tokens)
    figures: dict[str, Any] = {
        "benchmark": "batch_invariant",
        "data": data,
        "layers": layers,
        "pairs": len(rows),
        "tokens": sum(row.n_tokens for row in rows),
        "max_tokens": max_tokens,
        "tiled": invariant.tiled,
        "start_cpu_s": {"off": proved - started, "on": time.process_time() - proved},
    }
    figures |= compared({"off": plain, "on": invariant}, rows, size, repeats)
    few = rows[:COUNTED]
    figures["answers_compared"] = 2 * len(few)
    figures["other_bits"] = {
        "off": other_bits(plain, few, max_tokens),
        "on": other_bits(invariant, few, max_tokens),
    }
    figures["environment"] = measure.environment()
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
