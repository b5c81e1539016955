"""A million pairs with a weight of their own, from files to preferences, by six lines of YAML.

Usage: python benchmarks/own_weights.py [--pairs 1000000] [--help]

Synthetic text in Parquet, as in `million.py`, and a column of doubles of many magnitudes; the
command that a user would give, `cwpo plan` and `cwpo weigh`, which loads no model. At the end each
pair must be there once, with the winner's text as chosen and the very bits of its weight.

The last line is one JSON object with all figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer

ROWS_PER_FILE = 50_000
ANSWERS = ("chosen", "rejected")
WORDS = "the of and to in is you that it he was for on are as with his they at be this have from"
YAML = """\
output_dir: {folder}/run
arms: [own]
prepare:
  test_fraction: 0
  sources:
    - path: {folder}/data
"""


def weighted_files(folder: Path, pairs: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Parquet files of prompts, two answers and a weight; the weights by the prompt's number."""
    generator, words = np.random.default_rng(0), np.array(WORDS.split())
    weights = generator.lognormal(0.0, 3.0, pairs)
    folder.mkdir()
    for number, start in enumerate(range(0, pairs, ROWS_PER_FILE)):
        count = min(ROWS_PER_FILE, pairs - start)
        drawn = generator.choice(words, (count, 28))
        columns = {
            "prompt": [f"{start + i} {' '.join(row[:12])}" for i, row in enumerate(drawn)],
            "chosen": [f"good {' '.join(row[12:20])}" for row in drawn],
            "rejected": [f"bad {' '.join(row[20:])}" for row in drawn],
            "weight": weights[start : start + count],
        }
        pq.write_table(pa.table(columns), folder / f"pairs-{number:03d}.parquet")
    return weights


def followed(command: list[str], log: Path) -> dict[str, float]:
    """Runs a command; seconds, and the most memory of its driver and of any process below it.

    Raises:
        SystemExit: when it fails, with the end of its log.
    """
    started, most = time.perf_counter(), {"driver": 0, "worker": 0}
    with log.open("w") as file:
        process = psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            for name, each in _tree(process):
                most[name] = max(most[name], _resident(each))
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(log.read_text()[-3000:])
    return {
        "seconds": round(time.perf_counter() - started, 1),
        **{f"{name}_mib": round(held / 2**20) for name, held in most.items()},
    }


def _tree(process: psutil.Popen) -> list[tuple[str, psutil.Process]]:
    try:
        below = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [("driver", process), *(("worker", child) for child in below)]


def _resident(process: psutil.Process) -> int:
    """Its own memory, without what it shares with others."""
    try:
        held = process.memory_info()
    except psutil.NoSuchProcess:
        return 0
    return int(held.rss - held.shared)


def texts(column: pa.ChunkedArray) -> list[str]:
    """What the last message of each cell says: without a plain template they hold messages."""
    return [cell[-1]["content"] for cell in column.to_pylist()]


def check(run: Path, weights: np.ndarray[Any, np.dtype[np.float64]]) -> int:
    """Reads all preferences.

    Raises:
        AssertionError: when a pair is missing, turned round, or its weight has other bits.
    """
    seen = np.zeros(len(weights), dtype=bool)
    for path in sorted(run.glob("weigh/*/preferences/part-*.parquet")):
        table = pq.read_table(path, columns=["prompt", "chosen", "rejected", "weight"])
        prompts, chosen, rejected = (texts(table[name]) for name in ("prompt", *ANSWERS))
        numbers = np.array([int(prompt.split()[0]) for prompt in prompts])
        found = table["weight"].to_numpy()
        assert np.array_equal(found.view(np.int64), weights[numbers].view(np.int64))
        assert all(text.startswith("good") for text in chosen)
        assert all(text.startswith("bad") for text in rejected)
        assert not seen[numbers].any()
        seen[numbers] = True
    assert seen.all()
    return int(seen.sum())


def main(pairs: int = 1_000_000) -> None:
    """Makes the data, plans, weighs, checks and prints."""
    figures: dict[str, Any] = {"benchmark": "own_weights", "rows": pairs}
    figures["environment"] = measure.environment()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = weighted_files(folder / "data", pairs)
        config = folder / "run.yaml"
        config.write_text(YAML.format(folder=folder))
        for command in ("plan", "weigh"):
            given = [sys.executable, "-m", "cwpo_dist.cli", command, str(config)]
            figures[command] = followed(given, folder / f"{command}.log")
            print((folder / f"{command}.log").read_text(), flush=True)
        for stage in ("prepare", "weigh"):
            manifest = next((folder / "run").glob(f"{stage}/*/manifest.json"))
            figures[f"{stage}_s"] = json.loads(manifest.read_text())["seconds"]
        figures["pairs"] = check(folder / "run", weights)
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
