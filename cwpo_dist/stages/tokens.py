"""answers → their tokens, once: what `sft`, `reference`, `align` and `generate` read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from cwpo_dist.config import PoolConfig, ReferenceConfig
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.runs.arms import ArmRun
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.given_model import GivenModel
from cwpo_dist.runs.output_key import BESIDE_KEY, Node, Nodes, Settings
from cwpo_dist.runs.stage import Stage, Work
from cwpo_dist.scoring.driver import run_here, run_shards
from cwpo_dist.scoring.pipeline import ShardJob
from cwpo_dist.scoring.scorers import TokenWorker
from cwpo_dist.scoring.set_aside import Limit, refuse_none

FEW_ANSWERS = 4000  # a second or two; an actor takes longer to start


@dataclass(frozen=True)
class TokensSettings(Settings):
    """What `tokens` is told.

    Attributes:
        policy: whose tokens they are.
        pool: the section of the reference pass, which has as many actors.
        most: the share of answers that the policy may be unable to read
            (`prepare.max_reject_fraction`).
    """

    stage = "tokens"
    format = 6

    policy: GivenModel
    pool: ReferenceConfig = field(metadata=BESIDE_KEY)
    most: float = field(metadata=BESIDE_KEY)

    @property
    def place(self) -> ReferenceConfig:
        """That of the reference pass."""
        return self.pool

    def identity(self) -> dict[str, object]:
        """Of the model its tokenizer alone."""
        return self.policy.token_identity()


def nodes(run: ArmRun, given: Nodes) -> Nodes:
    """The policy's tokens of all answers."""
    if run.policy is None:
        return {}
    config = run.config
    told = TokensSettings(run.policy, config.reference, config.prepare.max_reject_fraction)
    return {"tokens": Node(told, {"prepare": given["prepare"]})}


def work(context: Context, node: Node[TokensSettings], counted: Census) -> Work:
    """Each answer once."""
    answers, prompts = sum(counted.answers.values()), sum(counted.prompts.values())
    text, field = f"{answers:,} answers to {prompts:,} prompts", node.settings.policy.field
    return Work(f"{text}, tokenised once", answers, "tokens", field, prompts)


def make(context: Context, node: Node[TokensSettings]) -> Mapping[str, object]:
    """Writes `tokens/part-*.parquet` and returns the counts.

    Raises:
        RejectsError: when the policy cannot read more answers than `prepare.max_reject_fraction`.
    """
    told, policy = node.settings, node.settings.policy.config
    job = ShardJob(
        name="tokens",
        output=context.place(node),
        shards=context.shards(node),
        make_worker=partial(TokenWorker, context.answers(node), policy),
    )
    prepared = context.counts(node.inputs["prepare"])
    answers, field = sum(prepared["answers"].values()), "prepare.max_reject_fraction"
    limit = Limit("tokens", field, told.most, answers, prepared["pairs"], job.output)
    if answers <= FEW_ANSWERS:
        counts = run_here(job)
    else:
        # Tokenising needs no accelerator; as many actors as the reference pass has.
        pool = PoolConfig(num_actors=told.pool.most_actors)
        counts = run_shards(job, pool, limit.check)
    limit.check(counts, whole=True)
    refuse_none("tokens", policy, counts)
    return counts


STAGE = Stage(TokensSettings, nodes, make, work)
