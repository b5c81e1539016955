"""Human pairs in; `proportional` beside `cw_mean` at as many processed tokens, over seeds, out.

    python benchmarks/proportional.py --model FOLDER --output-dir runs/proportional

One annotator and one split; a seed is that of `align` alone: the order of its pairs, and in
`proportional` the draws. `cw_mean` goes once through all pairs; `proportional` takes as many steps
as come closest to its tokens. CWPO_DATA names a folder with hh_harmless.jsonl.gz. A rerun resumes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import accumulate, count
from typing import Any

from measure import environment, source

from cwpo_dist.config import Config
from cwpo_dist.config.load import parse_config
from cwpo_dist.execution.run import execute
from cwpo_dist.graph import graph
from cwpo_dist.lm.batches import global_batch
from cwpo_dist.lm.encoder import Encoder, load_tokenizer
from cwpo_dist.runs.cluster import connect
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node
from cwpo_dist.stages.align import AlignSettings, weighted_pairs
from cwpo_dist.storage import Store
from cwpo_dist.training.tasks import Preference

ARMS = ("cw_mean", "proportional")


def settings(model: str, output_dir: str) -> Config:
    """Sized for one core and half an hour: short pairs, 4 layers, every parameter trained."""
    training = {"global_batch_size": 8, "max_tokens_per_micro_batch": 2048, "zero_stage": 0}
    return parse_config(
        {
            "output_dir": output_dir,
            "arms": list(ARMS),
            "prepare": {
                "sources": [source("hh").model_dump()],
                "labelled_fraction": 0.6,
                "test_fraction": 0.2,
                "rows_per_shard": 512,
            },
            "weak": {"model_name_or_path": model, "max_length": 256},
            "policy": {"model_name_or_path": model, "max_length": 192},
            "fit": training | {"learning_rate": 1e-4, "num_train_epochs": 1, "warmup_steps": 5},
            "sft": None,
            "align": training
            | {"learning_rate": 5e-5, "num_train_epochs": 1, "warmup_steps": 5}
            | {"beta": 0.1, "lora": None, "save_steps": 1000},
            "evaluate": {"num_prompts": 0},
        }
    )


def main() -> None:
    """Runs what is not done and prints one line an arm and seed, at the end all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    config = settings(given.model, given.output_dir)
    graphs = {arm: graph(config, arm) for arm in ARMS}
    context = Context(Store(config.output_dir))
    connect()
    for nodes in graphs.values():
        for role, node in nodes.items():
            if role not in {"align", "aligned", "evaluate"}:
                execute(context, node)
    rows = []
    for seed in range(given.seeds):
        tokens = 0
        for arm, nodes in graphs.items():
            row = one(config, nodes, seed, tokens)
            tokens = tokens or row["tokens"]
            rows.append({"arm": arm, "seed": seed} | row)
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"runs": rows, "environment": environment()}))


def one(config: Config, nodes: dict[str, Node], seed: int, tokens: int) -> dict[str, Any]:
    """Trains and judges one arm with one seed; `tokens` to come closest to, 0: one epoch."""
    task = loaded(config, nodes["align"])
    steps, seen = length(task, config.align.global_batch_size, seed, tokens)
    section = config.align.model_copy(update={"max_steps": steps})
    context = Context(Store(config.output_dir))
    told = nodes["align"].settings
    assert isinstance(told, AlignSettings)
    align = replace(nodes["align"], settings=replace(told, config=section, seed=seed))
    aligned = replace(nodes["aligned"], inputs={**nodes["aligned"].inputs, "model": align})
    judged = {**nodes["evaluate"].inputs, "align": align, "aligned": aligned}
    evaluate = replace(nodes["evaluate"], inputs=judged)
    for node in (align, aligned, evaluate):
        execute(context, node)
    policy = context.place(evaluate).read_json("metrics.json")["policy"]
    last = context.counts(align)["last"]
    return {
        "pairs": len(task.rows),
        "drawn_an_epoch": task.order.drawn,
        "mean_confidence": sum(task.weights) / len(task.weights),
        "steps": steps,
        "tokens": seen,
        "accuracy": policy["agreement"],
        "mean_margin": policy["mean_margin"],
        "last_loss": last["loss"],
    }


def loaded(config: Config, align: Node[Any]) -> Preference:
    """The task as a worker builds it."""
    policy = config.policy
    assert policy is not None
    pairs = weighted_pairs(Context(Store(config.output_dir)), align)
    return pairs(Encoder(load_tokenizer(policy), policy.chat_template))


def length(task: Preference, batch: int, seed: int, tokens: int) -> tuple[int, int]:
    """Steps, and the tokens of their rows: of one epoch, or closest to so many tokens."""
    steps_an_epoch = -(-task.order.drawn // batch)
    each = (
        sum(task.rows[i].n_tokens for i in global_batch(task.order, batch, seed, step)[1].tolist())
        for step in count()
    )
    seen: list[int] = []
    for total in accumulate(each):
        seen.append(total)
        if len(seen) >= steps_an_epoch if not tokens else total >= tokens:
            break
    if tokens and len(seen) > 1 and tokens - seen[-2] < seen[-1] - tokens:
        seen.pop()
    return len(seen), seen[-1]


if __name__ == "__main__":
    main()
