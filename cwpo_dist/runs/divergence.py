"""Sampled answers of an aligned policy in; how far it went from its SFT model, in nats, out."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from cwpo_dist.lm.encoder import Asked
from cwpo_dist.lm.fitting import encode_pairs
from cwpo_dist.lm.reading import encoder_for
from cwpo_dist.lm.rows import Row
from cwpo_dist.pairs.records import TOKEN_SCHEMA, Prompt, pair_schema
from cwpo_dist.pairs.stored import pair_table
from cwpo_dist.runs.context import Context, policy_of, read_answers, read_log_probs
from cwpo_dist.runs.graph import Node
from cwpo_dist.scoring.driver import run_shards
from cwpo_dist.scoring.pipeline import ShardJob, part
from cwpo_dist.scoring.scorers import PairsIn, ReferenceWorker
from cwpo_dist.storage import Store

# Pair id, prompt, answer of the baseline, answer of the aligned model.
Answered = list[tuple[str, Prompt, str, str]]


def kl_divergence(context: Context, node: Node, prompts: dict[str, Prompt]) -> dict[str, Any]:
    """KL(π‖π_SFT) = E_{y∼π} log π(y|x)/π_SFT(y|x), by the answers that π was heard to give.

    They were sampled at `evaluate.temperature`, and one cut at `max_new_tokens` is taken to end
    there: an estimate, the same for all arms.

    Returns:
        n, mean and standard error, in nats an answer.
    """
    store = context.place(node).child("kl")
    models = {role: node.inputs[f"answers_{role}"] for role in ("sft", "aligned")}
    told = {role: read_answers(context, given) for role, given in models.items()}
    rows = [(i, prompts[i], told["sft"][i], y) for i, y in told["aligned"].items() if y]
    shards = write_pairs(context, store, rows)
    _write_tokens(context, store, models["aligned"], rows)
    values: dict[str, dict[str, float]] = {}
    for role, given in models.items():
        output = store.child(role)
        job = ShardJob(
            name="reference",
            output=output,
            shards=shards,
            make_worker=partial(
                ReferenceWorker,
                PairsIn(store),
                store,
                policy_of(context, given),
                context.config.reference.max_tokens_per_batch,
            ),
        )
        run_shards(job, context.config.reference)
        found = [read_log_probs(output, index) for index in range(shards)]
        values[role] = {i: logps[1] for each in found for i, logps in each.items()}
    both = sorted(values["sft"].keys() & values["aligned"].keys())
    ratios = np.array([values["aligned"][i] - values["sft"][i] for i in both])
    if not len(ratios):
        return {"n": 0, "mean": None, "error": None}
    error = float(ratios.std(ddof=1) / np.sqrt(len(ratios))) if len(ratios) > 1 else None
    return {"n": len(ratios), "mean": float(ratios.mean()), "error": error}


def write_pairs(context: Context, store: Store, rows: Answered) -> int:
    """Answers as pairs, the baseline's first, in shards; how many shards."""
    text = not rows or isinstance(rows[0][1].text, str)
    table = pair_table(
        [
            {
                "pair_id": pair_id,
                "prompt": prompt.text,
                "response_a": _wrapped(before, text),
                "response_b": _wrapped(after, text),
                "tools": prompt.tools,
            }
            for pair_id, prompt, before, after in rows
        ],
        pair_schema("text" if text else "conversational"),
    )
    size = context.config.prepare.rows_per_shard
    starts = range(0, len(rows), size)
    for index, start in enumerate(starts):
        store.create_table(part("pairs", index), table.slice(start, size))
    return len(starts)


def _wrapped(answer: str, text: bool) -> Any:
    """An answer of the kind of its prompt: text, or a message."""
    return answer if text else [{"role": "assistant", "content": answer}]


def _write_tokens(context: Context, store: Store, node: Node, rows: Answered) -> None:
    """Tokens of prompt and answers, in the same shards; what does not fit is left out."""
    model, size = policy_of(context, node), context.config.prepare.rows_per_shard
    encoder = encoder_for(model, "policy")
    whole = model.model_copy(update={"over_length": "drop"})
    for index, start in enumerate(range(0, len(rows), size)):
        pairs, names = [], []
        for pair_id, prompt, *answers in rows[start : start + size]:
            text = isinstance(prompt.text, str)
            told = [_wrapped(answer, text) for answer in answers]
            pairs.append(Asked(prompt.text, told, prompt.tools))
            names.append(pair_id)
        read = zip(names, encode_pairs(encoder, whole, pairs, ties=True), strict=True)
        found = {name: row for name, row in read if isinstance(row, Row)}
        columns = {
            "pair_id": list(found),
            "prompt": [row.prompt for row in found.values()],
            "answer_a": [row.answers[0] for row in found.values()],
            "answer_b": [row.answers[1] for row in found.values()],
        }
        store.create_table(part("tokens", index), pa.table(columns, schema=TOKEN_SCHEMA))
