"""held-out prompts, a policy → its sampled answers, for gold reward accuracy."""

from __future__ import annotations

from functools import partial
from typing import Any

from cwpo_dist.config import PoolConfig
from cwpo_dist.pairs.records import PROMPT_SCHEMA, PromptTokens, table_of
from cwpo_dist.pairs.stored import read_judgements
from cwpo_dist.runs.context import Context, policy_of
from cwpo_dist.runs.graph import Node
from cwpo_dist.scoring.driver import run_shards
from cwpo_dist.scoring.pipeline import ShardJob, part
from cwpo_dist.scoring.scorers import AnswerWorker, read_tokens


def run(context: Context, node: Node) -> dict[str, Any]:
    """Writes `prompts/` (one file a batch) and `answers/part-*.parquet`; returns the counts."""
    settings = node.settings
    output = context.place(node)
    prompts = _prompts(context, node)
    size = settings["generation_batch_size"]
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    for index, batch in enumerate(batches):
        output.create_table(part("prompts", index), table_of(batch, PROMPT_SCHEMA))
    sampling = {name: settings[name] for name in ("max_new_tokens", "temperature", "seed")}
    job = ShardJob(
        name="answers",
        output=output,
        shards=len(batches),
        make_worker=partial(AnswerWorker, output, policy_of(context, node), sampling),
        reads="prompts",
    )
    pool = PoolConfig.model_validate(
        context.config.evaluate.model_dump(include=set(PoolConfig.model_fields))
    )
    return run_shards(job, pool)


def _prompts(context: Context, node: Node) -> list[PromptTokens]:
    """The first `num_prompts` distinct prompts of the split; ids are hashes, so any sample."""
    tokens = context.place(node.inputs["tokens"])
    pairs, split = context.prepared(node), node.settings["split"]
    seen: dict[tuple[int, ...], str] = {}
    for index in range(context.shards(node)):
        rows = read_tokens(tokens, index)
        for pair in read_judgements(pairs, part("pairs", index)):
            if pair.split == split and pair.pair_id in rows:
                seen.setdefault(tuple(rows[pair.pair_id].prompt), pair.pair_id)
        if len(seen) >= node.settings["num_prompts"]:
            break
    chosen = list(seen.items())[: node.settings["num_prompts"]]
    return [PromptTokens(pair_id, list(prompt)) for prompt, pair_id in chosen]
