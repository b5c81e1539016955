"""Synthetic pairs in; what two ranks of one node hold of them, and how soon they begin, out.

    python benchmarks/token_file.py [--pairs 1000000] [--tokens 600] [--lists 20000]

Each pair has its own prompt and answers, cut from a block of random ids, so that nothing repeats
within a shard. The file is staged as `align` stages it, but for the reading of Parquet. Two
processes then open it as ranks do, draw batches in the order of a run, lay out their micro-batches,
and read the whole file. Then the way before (lists of Python ints on each rank), at fewer pairs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
import psutil

from cwpo_dist.lm.batches import global_batch
from cwpo_dist.lm.rows import Row
from cwpo_dist.training.micro_batches import Limits, MicroBatch, micro_batches, parts_of
from cwpo_dist.training.tasks import Preference
from cwpo_dist.training.token_file import Example, TokenFile, token_file

BATCH, STEPS, COMPARED, PER_SHARD = 512, 20, 5, 2048
FIELDS = [("weight", "f8"), ("reference", "f4", (2,))]


def examples(pairs: int, tokens: int) -> Iterator[list[Example]]:
    """Shards of pairs: half of the tokens are the prompt's, a quarter each answer's."""
    block = np.random.default_rng(0).integers(0, 49152, 1_000_003, dtype=np.int32).data
    half, quarter = tokens // 2, tokens // 4
    for first in range(0, pairs, PER_SHARD):
        shard = []
        for i in range(first, min(pairs, first + PER_SHARD)):
            at = i * 7919 % (len(block) - tokens)
            prompt: Any = block[at : at + half]  # Any: a view reads like a list of ints
            middle = at + half + quarter
            answers: Any = (block[at + half : middle], block[middle : at + tokens])
            numbers = (0.1 + i % 9 / 10, (-float(i % 100), -50.0))
            shard.append(Example(f"{i:018x}{0:014x}", Row(prompt, answers), numbers))
        yield shard


def opened(pairs: int, tokens: int) -> TokenFile:
    """Staged by the first who asks."""

    def shards(_: Counter[str]) -> Iterator[list[Example]]:
        return examples(pairs, tokens)

    return token_file(["benchmark", pairs, tokens], 2, FIELDS, shards)


def preferences(found: TokenFile) -> Preference:
    """The task of an align stage, which draws pairs in proportion: that holds most."""
    weights, references = found.numbers("weight"), found.numbers("reference")
    return Preference(
        found.rows, found.pair_ids, weights, references, "sigmoid", 0.1, sampling="proportional"
    )


def anonymous() -> int:
    """Bytes of this process's own memory: no pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def rank(number: int, args: argparse.Namespace, barrier: Any, told: Any) -> None:
    """One rank: the seconds to its first batch, its own memory, and the pages of the file."""
    before, started = anonymous(), time.perf_counter()
    task = preferences(opened(args.pairs, args.tokens))
    seconds = 0.0
    for step in range(STEPS):
        for _ in batches(task, step, number, 2):
            seconds = seconds or time.perf_counter() - started
    own = anonymous() - before
    view: Any = task.rows[0].prompt
    view.obj.max()  # reads all token ids, as an epoch does
    barrier.wait()  # until the other one has, too
    maps = [m for m in psutil.Process().memory_maps() if m.path.endswith(("/tokens", "/pairs"))]
    alone = sum(each.private_clean + each.private_dirty for each in maps)
    told.put(
        {
            "rank": number,
            "first_batch_s": round(seconds, 2),
            "own_mib": round(own / 2**20, 1),
            "own_bytes_a_pair": round(own / args.pairs, 1),
            "file_mapped_mib": round(sum(each.rss for each in maps) / 2**20),
            "of_the_file_not_shared_mib": round(alone / 2**20, 1),
        }
    )
    barrier.wait()


def batches(task: Preference, step: int, number: int, world_size: int) -> Iterator[MicroBatch]:
    """A rank's micro-batches of one step."""
    limits = Limits("packed", 16384)
    indices = global_batch(task.order, BATCH, 0, step)[1].tolist()
    parts = parts_of(task, indices, limits, world_size)
    return micro_batches(parts, limits, number, world_size, 0)


def orders(task: Preference) -> list[str]:
    """Of 1, 2 and 3 ranks: a digest of the tokens of some steps, in the order of the run."""
    digests = []
    for world_size in (1, 2, 3):
        seen = hashlib.sha256()
        for step in range(COMPARED):
            of_step: dict[int, bytes] = {}
            for number in range(world_size):
                for micro in batches(task, step, number, world_size):
                    if micro.weight:
                        of_step |= tokens_of(micro)
            seen.update(b"".join(of_step[place] for place in sorted(of_step)))
        digests.append(seen.hexdigest()[:16])
    return digests


def tokens_of(micro: MicroBatch) -> dict[int, bytes]:
    """The ids of each row of a packed micro-batch, by its place in the global batch."""
    lengths = micro.batch.attention_mask[0, 0].sum(dim=1).tolist()
    rows = micro.batch.input_ids[0].split(lengths)
    return {p: row.numpy().tobytes() for p, row in zip(micro.positions, rows, strict=True)}


def as_lists(pairs: int, tokens: int, told: Any) -> None:
    """The way before: every id a Python number, on each rank."""
    before, started = anonymous(), time.perf_counter()
    every = [each for shard in examples(pairs, tokens) for each in shard]
    task = Preference(
        [Row(list(e.row.prompt), tuple(map(list, e.row.answers))) for e in every],
        [e.pair_id for e in every],
        [float(str(e.numbers[0])) for e in every],
        [(-1.0, -2.0 - i) for i in range(pairs)],
        "sigmoid",
        0.1,
    )
    del every
    next(batches(task, 0, 0, 2))
    seconds, own = time.perf_counter() - started, anonymous() - before
    told.put({"pairs": pairs, "first_batch_s": seconds, "own_bytes_a_pair": own / pairs})


def in_process(work: Any, *given: Any) -> tuple[Any, Any]:
    """A new process that does some work, and where it tells what it found."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    process = context.Process(target=work, args=(*given, told))
    process.start()
    return process, told


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--lists", type=int, default=20_000, help="pairs of the way before")
    args = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="cwpo-token-file-")
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    try:
        started = time.perf_counter()
        task = preferences(opened(args.pairs, args.tokens))
        staging = time.perf_counter() - started
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        barrier = multiprocessing.get_context("spawn").Barrier(2)
        ranks = [in_process(rank, number, args, barrier) for number in range(2)]
        found = [told.get(timeout=1800) for _, told in ranks]
        lists = in_process(as_lists, args.lists, args.tokens)[1].get(timeout=1800)
        print(
            json.dumps(
                {
                    "environment": measure.environment(),
                    "pairs": args.pairs,
                    "tokens_a_pair": args.tokens,
                    "staging_s": round(staging, 1),
                    "disk_mib": round(size / 2**20),
                    "ranks": found,
                    "order_at_1_2_3_ranks": orders(task),
                    "lists": lists,
                    "lists_at_as_many_pairs_gib": lists["own_bytes_a_pair"] * args.pairs / 2**30,
                },
                indent=1,
            )
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
