"""Held-out human labels, log-probs and sampled answers → how good annotator and policy are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from cwpo_dist.config import ConfigError, ModelConfig, PoolConfig
from cwpo_dist.evaluation.accuracy import gra, policy_accuracy
from cwpo_dist.evaluation.annotators import annotator_figures
from cwpo_dist.evaluation.gold import load_function
from cwpo_dist.pairs.records import (
    ANSWER_SCHEMA,
    SCORE_SCHEMA,
    pair_schema,
    read_pairs,
    read_records,
)
from cwpo_dist.scoring.pipeline import ShardJob, part
from cwpo_dist.scoring.run import run_shards
from cwpo_dist.scoring.scorers import PairsIn, RewardWorker
from cwpo_dist.stages.annotations import held_out, plain_text, raw
from cwpo_dist.stages.context import Context, read_log_probs
from cwpo_dist.stages.graph import Node, members
from cwpo_dist.storage import Store

Pair = dict[str, Any]
BASELINES = {"own_sft": "answers_sft", "common": "answers_base"}


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `metrics.json`; what was not asked for, or cannot be had, is null there."""
    pairs = [list(_held_out(context, node, index)) for index in range(context.shards(node))]
    metrics = {
        "annotator": _annotator(context, node),
        "policy": _policy(context, node, pairs),
        "gra": _gold(context, node),
    }
    context.place(node).create_json("metrics.json", metrics)
    return {"held_out_pairs": sum(map(len, pairs))}


def _held_out(context: Context, node: Node, index: int) -> Iterator[Pair]:
    """The pairs of one shard on the evaluated side that carry a human label."""
    columns = ["pair_id", "prompt", "response_a", "response_b", "label", "split"]
    table = read_pairs(context.place(node.inputs["prepare"]), part("pairs", index), columns)
    for pair in table.to_pylist():
        if pair["split"] == node.settings["split"] and pair["label"] is not None:
            yield pair


def _annotator(context: Context, node: Node) -> dict[str, Any] | None:
    if not members(node):
        return None
    given = raw(context, node)
    split, fitted_on = node.settings["split"], node.settings["calibration_split"]
    figures = annotator_figures(
        held_out(given, split),
        None if fitted_on == split else held_out(given, fitted_on),
        [_name(context, member) for member in members(node)],
        by_member=node.inputs["weigh"].settings["temperature"] == "fitted",
    )
    return figures | {"temperature_split": fitted_on}


def _name(context: Context, member: Node) -> str:
    """An annotator in words: its seed, or its model."""
    if "fit" in member.inputs:
        return f"seed {member.inputs['fit'].settings['seed']}"
    return str(context.counts(member)["annotator"])


def _policy(context: Context, node: Node, shards: list[list[Pair]]) -> dict[str, Any]:
    aligned = context.place(node.inputs["aligned"])
    reference = context.place(node.inputs["reference"])
    rows = []
    for index, pairs in enumerate(shards):
        after, before = read_log_probs(aligned, index), read_log_probs(reference, index)
        both = after.keys() & before.keys()
        rows += [
            (pair, after[pair["pair_id"]], before[pair["pair_id"]])
            for pair in pairs
            if pair["pair_id"] in both
        ]
    return policy_accuracy(
        [after[0] for _, after, _ in rows],
        [after[1] for _, after, _ in rows],
        [before[0] for _, _, before in rows],
        [before[1] for _, _, before in rows],
        [pair["label"] for pair, _, _ in rows],
        context.config.align.beta,
        [plain_text(pair["prompt"]) for pair, _, _ in rows],
    ).as_dict()


def _gold(context: Context, node: Node) -> dict[str, Any] | None:
    """GRA against the arm's own SFT model and against the policy as it was given."""
    config = context.config.evaluate
    if "answers_aligned" not in node.inputs:
        return None
    if config.gold_function is None and config.gold_model is None:
        return None
    prompts = _prompts(context, node)
    aligned = _answers(context, node.inputs["answers_aligned"])
    figures = {}
    for name, role in BASELINES.items():
        baseline = _answers(context, node.inputs[role])
        rows = [(i, prompts[i], baseline[i], aligned[i]) for i in aligned if i in baseline]
        if config.gold_model is not None:
            gold = _score_by_model(context, context.place(node).child(name), rows)
        else:
            gold = _score_by_function(config.gold_function or "", rows)
        figures[name] = gra(*gold).as_dict()
    return figures


Answered = list[tuple[str, Any, str, str]]  # pair id, prompt, baseline's answer, aligned's answer


def _score_by_function(name: str, rows: Answered) -> tuple[list[float], list[float]]:
    """Gold scores (aligned, baseline) by a rule."""
    score = load_function(name)
    texts = [(plain_text(prompt), before, after) for _, prompt, before, after in rows]
    aligned = [score(prompt, after) for prompt, _, after in texts]
    return aligned, [score(prompt, before) for prompt, before, _ in texts]


def _score_by_model(
    context: Context, store: Store, rows: Answered
) -> tuple[list[float], list[float]]:
    """Gold scores (aligned, baseline) by a reward model, on the pipeline that annotates.

    An answer without a finite score, or one that is too long, takes its pair out.
    """
    config = context.config.evaluate
    model: ModelConfig | None = config.gold_model
    if model is None:
        raise ConfigError("evaluate.gold_model: missing")
    text = not rows or isinstance(rows[0][1], str)
    wrap = str if text else lambda answer: [{"role": "assistant", "content": answer}]
    table = pa.Table.from_pylist(
        [
            {"pair_id": i, "prompt": p, "response_a": wrap(before), "response_b": wrap(after)}
            for i, p, before, after in rows
        ],
        schema=pair_schema("text" if text else "conversational"),
    )
    size = context.config.prepare.rows_per_shard
    shards = range(0, len(rows), size)
    for index, start in enumerate(shards):
        store.create_table(part("pairs", index), table.slice(start, size))
    job = ShardJob(
        name="scores",
        output=store,
        shards=len(shards),
        make_worker=partial(
            RewardWorker, PairsIn(store), model, "gold", config.max_tokens_per_batch
        ),
    )
    run_shards(
        job, PoolConfig.model_validate(config.model_dump(include=set(PoolConfig.model_fields)))
    )
    scores = [
        row
        for index in range(len(shards))
        for row in read_records(store, part("scores", index), SCORE_SCHEMA).to_pylist()
    ]
    return [row["score_b"] for row in scores], [row["score_a"] for row in scores]


def _answers(context: Context, node: Node) -> dict[str, str]:
    store = context.place(node)
    names = store.names("answers")
    tables = [read_records(store, name, ANSWER_SCHEMA) for name in names]
    rows = [row for table in tables for row in table.to_pylist()]
    return {row["pair_id"]: row["answer"] for row in rows}


def _prompts(context: Context, node: Node) -> dict[str, Any]:
    store = context.place(node.inputs["prepare"])
    return {
        row["pair_id"]: row["prompt"]
        for index in range(context.shards(node))
        for row in read_pairs(store, part("pairs", index), ["pair_id", "prompt"]).to_pylist()
    }
