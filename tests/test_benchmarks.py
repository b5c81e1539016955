"""Each benchmark runs by its command line, at sizes of seconds, and its figures hold."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import pytest
from conftest import DATA_FILES, ROOT
from tiny import save_tiny

BENCHMARKS = ROOT / "benchmarks"
CLOSE = 1e-4  # float32 sums of two orders: our batches and the peer's
TINY = "--model {model} --layers 1 --data demo"
PARTS = ("judged", "accuracies")  # of intervals.py
IN_NAMESPACES = "wire.py --hidden 32 --layers 1"
# A command line, and what is true of its figures at any size: of the JSON object at the end, or of
# all text where there is none. {model} is a folder; it runs in an empty folder of its own.
RUNS: dict[str, Callable[[Any], bool]] = {
    "align.py --models 1:8 --trial 4 --micro-batches 1 --data demo --model {model}": lambda found: (
        found["max_grad_diff"] < CLOSE and found["models"]["1"]["ratio"] > 0
    ),
    f"annotate.py --part forward --pairs 8 --repeats 1 {TINY}": lambda found: (
        found["max_score_diff"] < CLOSE and found["ratio_sorted"] > 0
    ),
    f"annotate.py --part forward --scorer reference --pairs 8 --repeats 1 {TINY}": lambda found: (
        found["max_score_diff"] < 10 * CLOSE and found["ratio_sorted"] > 0
    ),
    f"annotate.py --part answers --prompts 2 --repeats 1 {TINY}": lambda found: (
        found["answers_part"]["max_score_diff"] < CLOSE
        and found["answers_part"]["tokens_ratio"] > 1
    ),
    f"annotate.py --part pipeline --pairs 16 --rounds 1 {TINY}": lambda found: (
        found["shards"] == 2 and found["ray_efficiency"] > 0
    ),
    f"annotate.py --part scale --rows 100000 {TINY}": lambda found: (
        found["us_per_row_ratio"] > 0 and found["peak_memory_ratio"] > 0
    ),
    "asking.py --model {model} --cache states.npz --seeds 2 --plot asking.svg": lambda found: (
        found["rows"] and 0.5 < found["longer_answer"]["mean"] < 1
    ),
    f"batch_invariant.py --pairs 8 --size 4 --repeats 1 {TINY}": lambda found: (
        found["other_bits"]["on"] == 0 and found["cpu_ratio"] > 0
    ),
    "collate.py --model {model} --data demo --pairs 40 --rounds 1": lambda found: (
        min(found["thousand_tokens_a_cpu_second"].values()) > 0
    ),
    "heads.py --part cost --model {model} --layers 1 --longest 2000 --rounds 1": lambda found: (
        found["cost"]["fit"]["heads"]["ratio"] > 0
    ),
    "heads.py --part worth --labels 16 --tests 40 --epochs 1 --seeds 1 --model {model} --layers 1 "
    "--longest 2000": lambda found: found["worth"]["heads less one"]["accuracy"][0] is not None,
    "intervals.py --draws 20 --plot intervals.svg": lambda found: all(
        sum(row["both"] for row in found[part]) > 0.9 * len(found[part]) for part in PARTS
    ),
    "loading.py {model} --ranks 2": lambda text: all(
        f"| {stage} | {rank} | " in text for stage in (2, 3) for rank in (0, 1)
    ),
    "memory.py --max-tokens 600": lambda found: (
        found["measured_mib"] > 0 and found["planned_mib"] > 0
    ),
    "noise.py --model {model} --caches states --data demo --seeds 1": lambda found: (
        found["rows"][0]["method"] == "human100" and found["rows"][0]["figure"]["mean"] > 0.5
    ),
    "own_weights.py --pairs 2000": lambda found: found["pairs"] == 2000 and found["weigh_s"] > 0,
    "pages.py --check": lambda text: text == "",
    "proportional.py --model {model} --output-dir run --seeds 1": lambda found: (
        [row["arm"] for row in found["runs"]] == ["cw_mean", "proportional"]
    ),
    "shape.py": lambda text: int(text.split("hops from source to loss")[1].split()[0]) > 0,
    "token_file.py --pairs 2000 --tokens 60 --lists 500": lambda found: (
        len(set(found["order_at_1_2_3_ranks"])) == 1 and len(found["ranks"]) == 2
    ),
    "trackers.py compare --repeats 1 --steps 2 --layers 1 --model {model}": lambda found: (
        min(each[0] for each in found["ratios"].values()) > 0
    ),
    "scale.py --part start": lambda found: found["start"][-1]["seconds"]["missing"] > 0,
    "wire.py --expect": lambda text: text.count("7B, ") == 8,
    IN_NAMESPACES: lambda found: all(0.8 < of["ratio_to_gloo"] < 1.3 for of in found["cases"]),
}
OF_PEOPLE = {"asking.py", "heads.py", "proportional.py"}  # they read human preferences
BUSY = "The current node timed out during startup"  # Ray gives its own node 30 s, and no more
NOT_RUN = {
    "million.py": "its kills need minutes of shards; test_scoring_kills.py has such kills",
}


def test_each_benchmark_is_run_or_says_why_not() -> None:
    scripts = {p.name for p in BENCHMARKS.glob("*.py") if '"__main__"' in p.read_text()}
    run = {command.split()[0] for command in RUNS}
    assert scripts == run | NOT_RUN.keys()
    assert not run & NOT_RUN.keys()


@pytest.fixture(scope="module")
def some_data(cwpo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some of the human preferences, of all debates."""
    folder = tmp_path_factory.mktemp("data")
    for name, every in zip(DATA_FILES, (2, 4), strict=True):
        with gzip.open(cwpo_data / name) as whole, gzip.open(folder / name, "w") as some:
            some.writelines(islice(whole, 0, None, every))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", "llama", num_hidden_layers=5)


@pytest.mark.long
@pytest.mark.parametrize("command", RUNS)
def test_a_benchmark_runs_and_its_figures_hold(
    command: str, model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if command == IN_NAMESPACES and not namespaces_allowed():
        pytest.skip("this user may make no network namespaces")
    script, *arguments = command.format(model=model).split()
    data = str(request.getfixturevalue("some_data")) if script in OF_PEOPLE else ""
    run = partial(
        subprocess.run,
        [sys.executable, BENCHMARKS / script, *arguments],
        env={**os.environ, "CWPO_DATA": data},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    done = run()
    if done.returncode and BUSY in done.stderr:
        done = run()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = figures(done.stdout)
    assert RUNS[command](found), found


def namespaces_allowed() -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "cluster" / "local")
        return bool(importlib.import_module("network").allowed())


def figures(said: str) -> Any:
    """The JSON object at the end; the text itself where there is none."""
    at = f"\n{said}".rfind("\n{")
    return json.loads(said[at:], parse_constant=refused) if at >= 0 else said


def refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is no figure")
