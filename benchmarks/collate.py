"""Texts in, how many of their tokens a core reads and lays out a second, out: ours and its peers.

    python benchmarks/collate.py --model runs/models/SmolLM2-135M-Instruct [--template plain]

Pairs of real data, read 256 at a time as an actor does, and laid out in batches of 32: of lists of
Python ints (what scoring holds) and of views of a mapped file (what training holds). Tokens are
useful ones, a prompt's once; of padded batches all are counted.

The peers: each pair's three texts (the prompt, and it with either answer) in one call of the
tokenizer, as the first version read them; its way of laying out, by lists, which the tests keep as
an oracle; and transformers' collator, which pads the same two sequences of each pair. Ours also
lays out positions, masks, which states are read and, where said, what the kernel of packed rows is
given. CPU seconds of one thread; rounds are interleaved; medians.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread, decided before torch
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import measure
import numpy as np
import torch
import typer
from transformers import DataCollatorWithPadding

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.encoder import Asked, Encoder, load_tokenizer
from cwpo_dist.lm.fitting import encode_pairs
from cwpo_dist.lm.ids import common_prefix
from cwpo_dist.lm.last_layer import read_tokens
from cwpo_dist.lm.packed import packed_lengths
from cwpo_dist.lm.rows import Layout, Row, collate
from cwpo_dist.lm.varlen import Segments
from cwpo_dist.pairs.stored import read_pairs

BATCH, SLICE = 32, 256
CPU = torch.device("cpu")


def views(row: Row) -> Row:
    """The same row as views of int32."""
    prompt, *answers = (np.asarray(ids, np.int32).data for ids in (row.prompt, *row.answers))
    found: Any = (prompt, tuple(answers), row.skipped)
    return Row(*found)


def each_text(encoder: Encoder, asked: Sequence[Asked]) -> list[Row]:
    """The rows of pairs, whose three texts are all tokenised."""
    rendered: list[Any] = [encoder._rendered(each) for each in asked]
    texts = [text for (opening, a), (_, b) in rendered for text in (opening, a, b)]
    ids = encoder.tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows = []
    for opening, *wholes in zip(ids[::3], ids[1::3], ids[2::3], strict=True):
        shared = common_prefix([opening, *wholes])
        answers = tuple([*whole[shared:], encoder.eos_id] for whole in wholes)
        rows.append(Row(opening[:shared], answers))
    return rows


def with_kernel(rows: Sequence[Row]) -> object:
    """Packed rows, and what attention and the last layer are given of them."""
    batch = collate(rows, "packed", 0)
    lengths = packed_lengths(batch.attention_mask)
    assert lengths is not None
    return batch, Segments.of(lengths, CPU), read_tokens(lengths, "answers")


def sliced(of: Sequence[Any], size: int) -> list[Any]:
    """Parts of so many."""
    return [of[at : at + size] for at in range(0, len(of), size)]


def rates(sides: dict[str, tuple[int, Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Tokens a CPU second of each, in thousands."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, (_, run) in sides.items():
            started = time.process_time()
            run()
            seconds[side].append(time.process_time() - started)
    return {
        side: round(tokens / statistics.median(seconds[side]) / 1e3)
        for side, (tokens, _) in sides.items()
    }


def main(
    model: Annotated[Path, typer.Option(help="a Hugging Face folder of a causal LM")],
    data: str = "hh",
    pairs: int = 512,
    rounds: int = 15,
    template: str = "tokenizer",
) -> None:
    """Prints one JSON object."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    listed = importlib.import_module("listed_rows").listed_batch
    given = ModelConfig(model_name_or_path=str(model), max_length=1024, chat_template=template)
    tokenizer = load_tokenizer(given)
    encoder = Encoder(tokenizer, given.chat_template)
    with tempfile.TemporaryDirectory() as folder:
        store, shards = measure.with_ray(lambda: measure.prepared(Path(folder), data, pairs, 10**6))
        read = [pair for index in range(shards) for pair in read_pairs(store, index)]
    asked = [Asked(pair.prompt, pair.answers, pair.tools) for pair in read]
    asked = [each for each in asked if isinstance(encode_pairs(encoder, given, [each])[0], Row)]
    rows: list[Any] = encode_pairs(encoder, given, asked)
    batches = sliced(rows, BATCH)
    mapped = [list(map(views, batch)) for batch in batches]
    pad = DataCollatorWithPadding(tokenizer)
    features = [
        [{"input_ids": [*row.prompt, *answer]} for row in batch for answer in row.answers]
        for batch in batches
    ]
    packed = sum(row.n_tokens for row in rows)
    padded = sum(len(each["input_ids"]) for batch in features for each in batch)

    def laid_out(by: Callable[..., object], layout: Layout, of: Any) -> tuple[int, Any]:
        tokens = packed if layout == "packed" else padded
        return tokens, lambda: [by(batch, layout, 0) for batch in of]

    def before() -> None:
        for part in sliced(asked, SLICE):
            for batch in sliced(each_text(encoder, part), BATCH):
                listed(batch, "packed", 0)

    def now() -> None:
        for part in sliced(asked, SLICE):
            for batch in sliced(encode_pairs(encoder, given, part), BATCH):
                with_kernel(batch)

    sides: dict[str, tuple[int, Callable[[], object]]] = {
        "read, each text": (packed, lambda: [each_text(encoder, x) for x in sliced(asked, SLICE)]),
        "read, ours": (
            packed,
            lambda: [encode_pairs(encoder, given, x) for x in sliced(asked, SLICE)],
        ),
        "plain, transformers": (padded, lambda: [pad(each) for each in features]),
        "plain, by lists": laid_out(listed, "plain", batches),
        "plain, ours": laid_out(collate, "plain", batches),
        "plain, ours, of views": laid_out(collate, "plain", mapped),
        "packed, by lists": laid_out(listed, "packed", batches),
        "packed, ours": laid_out(collate, "packed", batches),
        "packed, ours, of views": laid_out(collate, "packed", mapped),
        "packed, ours, for the kernel": (packed, lambda: [with_kernel(x) for x in batches]),
        "read and packed, before": (packed, before),
        "read and packed, ours, for the kernel": (packed, now),
    }
    assert rows == [row for part in sliced(asked, SLICE) for row in each_text(encoder, part)]
    print(
        json.dumps(
            {
                "environment": measure.environment(),
                "pairs": len(rows),
                "useful_tokens": packed,
                "thousand_tokens_a_cpu_second": rates(sides, rounds),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    typer.run(main)
