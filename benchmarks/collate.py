"""Rows in, how many of their tokens a core lays out a second, out: ours and transformers' collator.

    python benchmarks/collate.py --model runs/models/SmolLM2-135M-Instruct [--data hh] [--pairs 512]

Pairs of real data in the model's tokens, batch by batch of 32 pairs, as lists of Python ints (what
scoring holds) and as views of a mapped file (what training holds). The peer pads the same two
sequences of each pair; ours also lays out positions, masks, and which states are read. Rounds are
interleaved; medians.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread, decided before torch

import measure
import numpy as np
import torch
import typer
from transformers import DataCollatorWithPadding

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.encoder import Encoder, load_tokenizer
from cwpo_dist.lm.rows import Layout, Row, collate

BATCH = 32


def views(row: Row) -> Row:
    """The same row as views of int32."""
    prompt, *answers = (np.asarray(ids, np.int32).data for ids in (row.prompt, *row.answers))
    found: Any = (prompt, tuple(answers), row.skipped)
    return Row(*found)


def main(
    model: Annotated[Path, typer.Option(help="a Hugging Face folder of a causal LM")],
    data: str = "hh",
    pairs: int = 512,
    rounds: int = 15,
) -> None:
    """Prints one JSON object."""
    torch.set_num_threads(1)
    settings = ModelConfig(model_name_or_path=str(model), max_length=1024)
    tokenizer = load_tokenizer(settings, distinct_pad=True)
    with tempfile.TemporaryDirectory() as folder:
        store, shards = measure.with_ray(lambda: measure.prepared(Path(folder), data, pairs, 10**6))
        encoder = Encoder(tokenizer, settings.chat_template)
        rows = measure.encoded(store, shards, encoder, settings)
    batches = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
    mapped = [list(map(views, batch)) for batch in batches]
    pad = DataCollatorWithPadding(tokenizer)
    features = [
        [{"input_ids": [*row.prompt, *answer]} for row in batch for answer in row.answers]
        for batch in batches
    ]

    def ours(layout: Layout, of: list[list[Row]]) -> Callable[[], object]:
        return lambda: [collate(batch, layout, 0) for batch in of]

    sides: dict[str, Callable[[], object]] = {
        "transformers, padded": lambda: [pad(each) for each in features],
        "plain, lists": ours("plain", batches),
        "plain, views": ours("plain", mapped),
        "packed, lists": ours("packed", batches),
        "packed, views": ours("packed", mapped),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            started = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - started)
    packed = sum(row.n_tokens for row in rows)
    padded = sum(len(each["input_ids"]) for batch in features for each in batch)
    figures = {
        side: (packed if side.startswith("packed") else padded) / statistics.median(took) / 1e6
        for side, took in seconds.items()
    }
    print(
        json.dumps(
            {
                "environment": measure.environment(),
                "pairs": len(rows),
                "million_tokens_a_second": figures,
                "plain_over_transformers": figures["plain, lists"]
                / figures["transformers, padded"],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    typer.run(main)
