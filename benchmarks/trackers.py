"""What a tracker costs a training whose server is away: paired runs with and without it.

Usage: python benchmarks/trackers.py compare [--repeats 5] [--help]

Each run is a process of its own: one rank of `align` without Ray (`TrainSpec.run`), from its first
line to the exported model, on the demo's pairs and the first layers of SmolLM2. With MLflow, its
server refuses connections, or takes them and never answers. The runs of a round follow each other,
the first one another in each; ratios are to the round's run without a tracker.

The last line is one JSON object with all figures.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process, decided before torch

import measure
import torch
import torch.distributed as dist
import typer

from cwpo_dist.config import AlignConfig, LoraConfig, ModelConfig
from cwpo_dist.lm.encoder import Encoder
from cwpo_dist.storage import Store
from cwpo_dist.training import rank_hooks
from cwpo_dist.training.lease import Lease
from cwpo_dist.training.rank import rank_process
from cwpo_dist.training.tasks import Preference
from cwpo_dist.training.train_rank import TrainSpec

CASES = ("none", "refuses", "hangs")
MODEL = "runs/models/SmolLM2-135M-Instruct"

app = typer.Typer(add_completion=False)


@contextmanager
def server(case: str) -> Iterator[str]:
    """The address of a server that is away in this way."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if case == "hangs":  # connections are taken by the system, and never answered
            yield address
    if case != "hangs":
        yield address


def pairs(encoder: Encoder) -> Preference:
    """The demo's first pairs, weighted, with references that are none."""
    lines = measure.DEMO.read_text().splitlines()[:160]
    given = [json.loads(line) for line in lines]
    rows = [encoder.encode(p["prompt"], (p["response_a"], p["response_b"])) for p in given]
    names = [str(number) for number in range(len(rows))]
    return Preference(rows, names, [1.0] * len(rows), [(-50.0, -50.0)] * len(rows), "sigmoid", 0.1)


@app.command()
def one(case: str, steps: int, layers: int, model: str, folder: str) -> None:
    """One run; prints its seconds."""
    rank_hooks.ASK_RAY_S = float("inf")  # there is none to ask
    device = torch.device("cpu")
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    meet = f"file://{folder}/group"
    dist.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    config = AlignConfig(
        max_steps=steps,
        warmup_steps=1,
        global_batch_size=8,
        save_steps=10,
        lora=LoraConfig(lora_dropout=0.0),
        report_to=[] if case == "none" else ["mlflow"],
    )
    policy = ModelConfig(model_name_or_path=model, num_hidden_layers=layers, max_length=512)
    store = Store(f"{folder}/out")
    spec = TrainSpec("align", store, "key", 0, config, policy, "logps", pairs)
    with Lease.acquire(store) as lease, server(case) as address:
        os.environ["MLFLOW_TRACKING_URI"] = address
        started = time.perf_counter()
        with rank_process(config, device) as watchdog:
            spec.run(lease.token, device, watchdog)
        seconds = time.perf_counter() - started
    typer.echo(json.dumps({"seconds": seconds}))
    sys.stdout.flush()
    os._exit(0)  # as Ray ends a worker: nobody waits for a tracker then either


@app.command()
def compare(
    repeats: Annotated[int, typer.Option(help="Rounds of all cases.")] = 5,
    steps: Annotated[int, typer.Option(help="Of each run.")] = 60,
    layers: Annotated[int, typer.Option(help="Of the model.")] = 4,
    model: Annotated[str, typer.Option(help="As `make demo` makes it.")] = MODEL,
) -> None:
    """All runs, and their ratios."""
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    for number in range(repeats):
        turn = number % len(CASES)
        for case in CASES[turn:] + CASES[:turn]:
            with tempfile.TemporaryDirectory(prefix="cwpo-trackers-") as folder:
                command = [sys.executable, __file__, "one", case, str(steps), str(layers), model]
                done = subprocess.run([*command, folder], capture_output=True, check=True)
            seconds[case].append(json.loads(done.stdout.splitlines()[-1])["seconds"])
            print(f"round {number + 1}, {case}: {seconds[case][-1]:.2f} s", flush=True)
    ratios = {
        case: [with_it / without for with_it, without in zip(taken, seconds["none"], strict=True)]
        for case, taken in seconds.items()
    }
    for case in CASES[1:]:
        spread = f"{min(ratios[case]):.3f} to {max(ratios[case]):.3f}"
        print(f"{case}: {statistics.median(ratios[case]):.3f} times as long ({spread})")
    print(json.dumps({"environment": measure.environment(), "seconds": seconds, "ratios": ratios}))


if __name__ == "__main__":
    app()
