"""Held-out human labels, log-probs and sampled answers → how good annotator and policy are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from cwpo_dist.config import ConfigError, ModelConfig, PoolConfig
from cwpo_dist.evaluation.accuracy import gra, policy_accuracy
from cwpo_dist.evaluation.annotators import annotator_figures
from cwpo_dist.evaluation.answers import answer_figures
from cwpo_dist.evaluation.gold_function import load_function
from cwpo_dist.pairs.messages import plain_text
from cwpo_dist.pairs.records import SCORE_SCHEMA, Prompt, content_hash, read_pairs, read_records
from cwpo_dist.pairs.stored import pair_rows
from cwpo_dist.runs.annotations import held_out, names, raw
from cwpo_dist.runs.context import Context, read_answers, read_log_probs
from cwpo_dist.runs.divergence import Answered, kl_divergence, write_pairs
from cwpo_dist.runs.graph import Node
from cwpo_dist.scoring.driver import run_shards
from cwpo_dist.scoring.pipeline import ShardJob, part
from cwpo_dist.scoring.scorers import PairsIn, RewardWorker
from cwpo_dist.storage import Store

Pair = dict[str, Any]
ITEMS, ANSWERS = "items.parquet", "answers.parquet"  # what intervals over several runs need
ITEM_SCHEMA = pa.schema(
    [
        *(("pair_id", pa.string()), ("prompt", pa.string()), ("margin", pa.float64())),
        ("longer_by", pa.int64()),  # characters of the human's choice less those of the other
    ]
)
JUDGED_SCHEMA = pa.schema(
    [
        *(("pair_id", pa.string()), ("prompt", pa.string()), ("against", pa.string())),
        *(("length", pa.int64()), ("baseline_length", pa.int64())),
        *(("gold", pa.float64()), ("baseline_gold", pa.float64())),
    ]
)
BASELINES = {"own_sft": "answers_sft", "common": "answers_base"}


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `metrics.json`; what was not asked for, or cannot be had, is null there."""
    pairs = [list(_held_out(context, node, index)) for index in range(context.shards(node))]
    metrics = {
        "annotator": _annotator(context, node),
        "policy": _policy(context, node, pairs),
        **_answered(context, node),
    }
    context.place(node).create_json("metrics.json", metrics)
    return {"held_out_pairs": sum(map(len, pairs))}


def _held_out(context: Context, node: Node, index: int) -> Iterator[Pair]:
    """The pairs of one shard on the evaluated side that carry a human label."""
    columns = ["pair_id", "prompt", "response_a", "response_b", "label", "split"]
    table = read_pairs(context.place(node.inputs["prepare"]), part("pairs", index), columns)
    for pair in pair_rows(table):
        if pair["split"] == node.settings["split"] and pair["label"] is not None:
            yield pair


def _annotator(context: Context, node: Node) -> dict[str, Any] | None:
    given = raw(context, node, judged=True)
    if not given.scores:
        return None
    split, fitted_on = node.settings["split"], node.settings["calibration_split"]
    figures = annotator_figures(
        held_out(given, split),
        None if fitted_on == split else held_out(given, fitted_on),
        names(context, node, given),
        by_member=node.inputs["weigh"].settings["temperature"] == "fitted",
    )
    return figures | {"temperature_split": fitted_on}


def _policy(context: Context, node: Node, shards: list[list[Pair]]) -> dict[str, Any]:
    """Accuracy of the implicit reward that was trained; `items.parquet` has it pair by pair.

    Without a reference the reward is of a token's mean.
    """
    aligned = context.place(node.inputs["aligned"])
    compares = "reference" in node.inputs
    rows = []
    for index, pairs in enumerate(shards):
        after = read_log_probs(aligned, index, per_token=not compares)
        before = dict.fromkeys(after, (0.0, 0.0))
        if compares:
            before = read_log_probs(context.place(node.inputs["reference"]), index)
        both = after.keys() & before.keys()
        rows += [
            (pair, after[pair["pair_id"]], before[pair["pair_id"]])
            for pair in pairs
            if pair["pair_id"] in both
        ]
    beta = context.config.align.beta
    margins = [beta * ((new[0] - old[0]) - (new[1] - old[1])) for _, new, old in rows]
    signs = [1 if pair["label"] == "a" else -1 for pair, _, _ in rows]
    longer_by = [_longer_by(pair) for pair, _, _ in rows]
    columns = {
        "pair_id": [pair["pair_id"] for pair, _, _ in rows],
        "prompt": [content_hash(pair["prompt"]) for pair, _, _ in rows],
        "margin": [sign * margin for sign, margin in zip(signs, margins, strict=True)],
        "longer_by": [sign * more for sign, more in zip(signs, longer_by, strict=True)],
    }
    context.place(node).create_table(ITEMS, pa.table(columns, schema=ITEM_SCHEMA))
    return policy_accuracy(
        [after[0] for _, after, _ in rows],
        [after[1] for _, after, _ in rows],
        [before[0] for _, _, before in rows],
        [before[1] for _, _, before in rows],
        [pair["label"] for pair, _, _ in rows],
        beta,
        [plain_text(pair["prompt"]) for pair, _, _ in rows],
    ).as_dict()


def _longer_by(pair: Pair) -> int:
    """Characters of the first answer less those of the second."""
    return len(plain_text(pair["response_a"])) - len(plain_text(pair["response_b"]))


def _answered(context: Context, node: Node) -> dict[str, Any]:
    """GRA and answer figures against the arm's own SFT model and the policy as it was given.

    `answers.parquet` has them prompt by prompt; the KL divergence is from the SFT model.
    """
    config = context.config.evaluate
    if "answers_aligned" not in node.inputs:
        return {"gra": None, "answers": None, "kl": None}
    prompts = _prompts(context, node)
    aligned = read_answers(context, node.inputs["answers_aligned"])
    judged, figures, tables = {}, {}, []
    for name, role in BASELINES.items():
        baseline = read_answers(context, node.inputs[role])
        rows = [(i, prompts[i], baseline[i], aligned[i]) for i in aligned if i in baseline]
        gold = _gold(context, context.place(node).child(name), rows)
        kept = [row for row in rows if row[0] in gold] if gold else rows
        scores = [gold[row[0]] for row in kept] if gold else None
        ours, theirs = zip(*scores, strict=True) if scores else (None, None)
        judged[name] = gra(ours or [], theirs or []).as_dict() if gold is not None else None
        lengths = [(len(after), len(before)) for _, _, before, after in kept]
        figures[name] = answer_figures(
            [length[0] for length in lengths], [length[1] for length in lengths], ours, theirs
        ).as_dict()
        tables.append(_answer_table(name, kept, scores))
    context.place(node).create_table(ANSWERS, pa.concat_tables(tables))
    kl = kl_divergence(context, node, prompts) if config.kl else None
    return {"gra": None if gold is None else judged, "answers": figures, "kl": kl}


def _answer_table(name: str, rows: Answered, scores: list[tuple[float, float]] | None) -> pa.Table:
    columns = {
        "pair_id": [row[0] for row in rows],
        "prompt": [content_hash(row[1].text) for row in rows],
        "against": [name] * len(rows),
        "length": [len(row[3]) for row in rows],
        "baseline_length": [len(row[2]) for row in rows],
        "gold": [score[0] for score in scores] if scores else [None] * len(rows),
        "baseline_gold": [score[1] for score in scores] if scores else [None] * len(rows),
    }
    return pa.table(columns, schema=JUDGED_SCHEMA)


def _gold(context: Context, store: Store, rows: Answered) -> dict[str, tuple[float, float]] | None:
    """Gold scores (aligned, baseline) by pair id; None without a gold model or function."""
    config = context.config.evaluate
    if config.gold_model is not None:
        return _score_by_model(context, store, rows)
    if config.gold_function is not None:
        return _score_by_function(config.gold_function, rows)
    return None


def _score_by_function(name: str, rows: Answered) -> dict[str, tuple[float, float]]:
    """Gold scores (aligned, baseline) by a rule."""
    score = load_function(name)
    return {
        pair_id: (score(plain_text(prompt.text), after), score(plain_text(prompt.text), before))
        for pair_id, prompt, before, after in rows
    }


def _score_by_model(
    context: Context, store: Store, rows: Answered
) -> dict[str, tuple[float, float]]:
    """Gold scores (aligned, baseline) by a reward model, on the pipeline that annotates.

    An answer without a finite score, or one that is too long, takes its pair out.
    """
    config = context.config.evaluate
    model: ModelConfig | None = config.gold_model
    if model is None:
        raise ConfigError("evaluate.gold_model: missing")
    shards = write_pairs(context, store, rows)
    job = ShardJob(
        name="scores",
        output=store,
        shards=shards,
        make_worker=partial(
            RewardWorker, PairsIn(store), model, "gold", config.max_tokens_per_batch, ties=True
        ),
    )
    run_shards(
        job, PoolConfig.model_validate(config.model_dump(include=set(PoolConfig.model_fields)))
    )
    scores = [
        row
        for index in range(shards)
        for row in read_records(store, part("scores", index), SCORE_SCHEMA).to_pylist()
    ]
    return {row["pair_id"]: (row["score_b"], row["score_a"]) for row in scores}


def _prompts(context: Context, node: Node) -> dict[str, Prompt]:
    store, columns = context.place(node.inputs["prepare"]), ["pair_id", "prompt", "tools"]
    return {
        row["pair_id"]: Prompt(row["prompt"], row["tools"])
        for index in range(context.shards(node))
        for row in pair_rows(read_pairs(store, part("pairs", index), columns))
    }
