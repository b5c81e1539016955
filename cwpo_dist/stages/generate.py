"""held-out prompts, a policy → its sampled answers, for gold reward accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from cwpo_dist.config import Engine, EvaluateConfig, Split
from cwpo_dist.pairs.answers import read_compared
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.records import PROMPT_SCHEMA, PromptTokens, prompt_of, table_of
from cwpo_dist.runs.arms import ArmRun
from cwpo_dist.runs.context import Context, policy_of
from cwpo_dist.runs.given_model import GivenModel
from cwpo_dist.runs.joined import pair_prompts
from cwpo_dist.runs.output_key import BESIDE_KEY, Node, Nodes, Settings
from cwpo_dist.runs.stage import Generating, Stage
from cwpo_dist.scoring.driver import run_shards
from cwpo_dist.scoring.pipeline import ShardJob, part
from cwpo_dist.scoring.scorers import AnswerWorker

CUT = "cut.json"  # how many prompts a file has: written before the first file


@dataclass(frozen=True)
class GenerateSettings(Settings):
    """What `generate` is told.

    Attributes:
        model: the policy as it was given; an input may have trained it.
        split: whose prompts are answered.
        num_prompts: how many of them.
        max_new_tokens: of an answer.
        temperature: 0 is greedy.
        seed: of the noise.
        config: the section of `evaluate`: its actors, and how many prompts they answer at once.
        engine: what else than transformers writes, with answers of its own.
    """

    stage = "generate"

    model: GivenModel
    split: Split
    num_prompts: int
    max_new_tokens: int
    temperature: float
    seed: int
    config: EvaluateConfig = field(metadata=BESIDE_KEY)
    engine: Engine | None = None

    @property
    def place(self) -> EvaluateConfig:
        """Where answers are judged, they are made."""
        return self.config


def nodes(run: ArmRun, given: Nodes) -> Nodes:
    """Answers of the policy as it was given, after SFT, and aligned."""
    config = run.config
    measured = config.evaluate
    if run.policy is None or "align" not in given or not measured.num_prompts:
        return {}
    sft = {"model": given["sft"]} if "sft" in given else {}
    models = {"base": {}, "sft": sft, "aligned": {"model": given["align"]}}
    made = {}
    for place, (role, model) in enumerate(models.items()):
        told = GenerateSettings(
            run.policy,
            measured.split,
            measured.num_prompts,
            measured.max_new_tokens,
            measured.temperature,
            # Samples of different models are independent, as in the paper: each has its own seed.
            config.seed * len(models) + (place if model else 0),
            measured,
            None if measured.engine == "transformers" else measured.engine,
        )
        made[f"answers_{role}"] = Node(told, {"tokens": given["tokens"]} | model)
    return made


def work(context: Context, node: Node[GenerateSettings], counted: Census) -> Generating:
    """An answer to each prompt."""
    told = node.settings
    prompts = min(told.num_prompts, counted.prompts_of(told.split))
    return Generating(
        f"{prompts:,} prompts, at most {told.max_new_tokens} new tokens each",
        model=told.model.field,
        pool=told.config,
        prompts=prompts,
        together=told.config.generation_batch_size,
        new_tokens=told.max_new_tokens,
        longest=told.model.config.max_length + told.max_new_tokens,
    )


def make(context: Context, node: Node[GenerateSettings]) -> Mapping[str, object]:
    """Writes `prompts/`, a file a batch, and `answers/part-*.parquet`; returns the counts."""
    told = node.settings
    output, together = context.place(node), told.config.generation_batch_size
    prompts = _prompts(context, node)
    output.create_json(CUT, together)
    size = output.read_json(CUT)  # a resumed run may be told another batch size
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    for index, batch in enumerate(batches):
        output.create_table(part("prompts", index), table_of(batch, PROMPT_SCHEMA))
    names = ("max_new_tokens", "temperature", "seed")
    sampling = {name: getattr(told, name) for name in names}
    policy = policy_of(context, node, told.model.config)
    worker = partial(AnswerWorker, engine=told.engine or "transformers")
    job = ShardJob(
        name="answers",
        output=output,
        shards=len(batches),
        make_worker=partial(worker, output, policy, sampling, together),
        reads="prompts",
    )
    return run_shards(job, told.config)


def _prompts(context: Context, node: Node[GenerateSettings]) -> list[PromptTokens]:
    """The first `num_prompts` distinct prompts of the split; ids are hashes, so any sample."""
    told, tokens = node.settings, context.place(node.inputs["tokens"])
    pairs = context.prepared(node)
    seen: dict[str, PromptTokens] = {}
    for index in range(context.shards(node)):
        found = pair_prompts(tokens, pairs, index)
        for pair in read_compared(pairs, index, [told.split]):
            if pair.pair_id in found:
                asked = PromptTokens(pair.pair_id, found[pair.pair_id])
                seen.setdefault(prompt_of(pair.pair_id), asked)
        if len(seen) >= told.num_prompts:
            break
    return list(seen.values())[: told.num_prompts]


STAGE = Stage(GenerateSettings, nodes, make, work)
