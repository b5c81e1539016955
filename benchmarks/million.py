"""A million pairs from files to scores, with an actor and the driver killed on the way.

Usage: python benchmarks/million.py [--pairs 1000000] [--help]

Synthetic text in Parquet, a tiny random reward model that is real (Llama of 2 layers and width 64,
SmolLM2's tokenizer), and the command that a user would give: `cwpo annotate`. When a quarter of the
shards is committed an actor is killed (SIGKILL), at a half the driver with all it started; then the
same command is given again. At the end each answer must have exactly one score.

The last line is one JSON object with all figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import measure
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
import yaml
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

ROWS_PER_FILE = 50_000
WORDS = "the of and to in is you that it he was for on are as with his they at be this have from"


def synthetic_files(folder: Path, pairs: int) -> None:
    """Parquet files of prompts and two answers, of some words each; two in a thousand are bad."""
    generator, words = np.random.default_rng(0), np.array(WORDS.split())
    folder.mkdir()
    for number, start in enumerate(range(0, pairs, ROWS_PER_FILE)):
        count = min(ROWS_PER_FILE, pairs - start)
        drawn = generator.choice(words, (count, 28))
        columns = {
            "prompt": [f"{start + i} {' '.join(row[:12])}" for i, row in enumerate(drawn)],
            "response_a": [" ".join(row[12:20]) for row in drawn],
            "response_b": [" ".join(row[20:]) for row in drawn],
        }
        for i in range(0, count, 500):
            columns["response_b"][i] = ""
        pq.write_table(pa.table(columns), folder / f"pairs-{number:03d}.parquet")


def tiny_reward_model(folder: Path, tokenizer_of: Path) -> None:
    """Saves a random one-label Llama with a real tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Driver:
    """One `cwpo annotate` and everything that it starts."""

    def __init__(self, config: Path, log: Path) -> None:
        """Starts it in a session of its own."""
        self.log = log
        command = [str(Path(sys.executable).with_name("cwpo")), "annotate", str(config)]
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def kill_an_actor(self) -> None:
        """SIGKILL to a process that is scoring."""
        actors = [p for p in self._below() if "MapWorker" in p.name() or _is_actor(p)]
        actors[0].kill()

    def kill(self) -> None:
        """SIGKILL to the driver, and to what it leaves behind."""
        below = self._below()
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for process in below:
            _kill(process)

    def _below(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def _is_actor(process: psutil.Process) -> bool:
    try:
        return any("MapWorker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # it died with the driver
        process.kill()


def wait_for(what: Callable[[], bool], driver: Driver) -> None:
    """Looks every second.

    Raises:
        SystemExit: when the driver ends before.
    """
    while not what():
        if driver.process.poll() is not None:
            raise SystemExit(f"the driver ended too early:\n{driver.log.read_text()[-3000:]}")
        time.sleep(1)


def committed(run: Path) -> int:
    """Committed files of scores."""
    return len(list(run.glob("annotate/*/scores/part-*.parquet")))


def check(run: Path) -> dict[str, int]:
    """Counts answers, scores, pairs and rejects by reading them all.

    Raises:
        AssertionError: when an answer has no score or two, or rows are lost.
    """

    def ids(folder: str, column: str) -> list[str]:
        paths = sorted(run.glob(f"{folder}/part-*.parquet"))
        tables = (pq.read_table(path, columns=[column]) for path in paths)
        return [each for table in tables for each in table[column].to_pylist()]

    pairs, answers = ids("prepare/*/pairs", "pair_id"), ids("prepare/*/answers", "answer_id")
    manifest = json.loads(next(run.glob("prepare/*/manifest.json")).read_text())["counts"]
    rejected = sum(manifest["rejects"].values())
    assert len(set(pairs)) == len(pairs)
    assert len(set(answers)) == len(answers)
    assert sorted(answers) == sorted(ids("annotate/*/scores", "answer_id"))
    assert manifest["rows_in"] == len(pairs) + manifest["merged_duplicates"] + rejected
    rows = manifest["rows_in"]
    return {"pairs": len(pairs), "answers": len(answers), "rejects": rejected, "rows_in": rows}


def main(
    model: Annotated[Path, typer.Option(help="a folder with a tokenizer")] = Path(
        "runs/models/SmolLM2-135M-Instruct"
    ),
    pairs: int = 1_000_000,
    actors: int = 2,
) -> None:
    """Makes the data, runs, kills, runs again, checks and prints."""
    figures: dict[str, Any] = {"benchmark": "million", "rows": pairs, "actors": actors}
    figures["environment"] = measure.environment()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        synthetic_files(folder / "data", pairs)
        tiny_reward_model(folder / "reward", model)
        run, config, log = folder / "run", folder / "run.yaml", folder / "log"
        reward = {"model_name_or_path": str(folder / "reward"), "chat_template": "plain"}
        config.write_text(
            yaml.safe_dump(
                {
                    "output_dir": str(run),
                    "prepare": {"sources": [{"path": str(folder / "data")}], "test_fraction": 0.0},
                    "annotate": {
                        "num_actors": actors,
                        "max_tokens_per_batch": 8192,
                        "model": reward,
                    },
                }
            )
        )
        started = time.perf_counter()
        driver = Driver(config, log)
        wait_for(lambda: any(run.glob("prepare/*/manifest.json")), driver)
        figures["prepare_s"] = time.perf_counter() - started
        manifest = json.loads(next(run.glob("prepare/*/manifest.json")).read_text())
        shards = figures["shards"] = manifest["counts"]["shards"]
        wait_for(lambda: committed(run) >= shards // 4, driver)
        driver.kill_an_actor()
        wait_for(lambda: committed(run) >= shards // 2, driver)
        driver.kill()
        figures["committed_when_the_driver_died"] = committed(run)
        print(f"killed at {committed(run)} of {shards} shards", flush=True)
        again = time.perf_counter()
        driver = Driver(config, log)
        driver.process.wait()
        figures["second_driver_s"] = time.perf_counter() - again
        figures["seconds"] = time.perf_counter() - started
        print(re.sub(r"\x1b\[[0-9;]*m", "", log.read_text())[-2500:], flush=True)
        if driver.process.returncode:
            raise SystemExit("the second driver failed")
        figures |= check(run)
        scored = json.loads(next(run.glob("annotate/*/manifest.json")).read_text())["counts"]
        figures["throughput_of_second_driver"] = scored["throughput"]
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
