"""log-probs of a weak policy after and before DPO → scores: its implicit rewards β·log π/π_SFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cwpo_dist.config import Split
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.pairs.records import SCORE_SCHEMA, LogProb, Score, table_of
from cwpo_dist.runs.arms import ArmRun
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.joined import read_log_probs
from cwpo_dist.runs.output_key import BESIDE_KEY, Node, Nodes, Settings, ancestors
from cwpo_dist.runs.stage import Stage, Work
from cwpo_dist.scoring.pipeline import part


@dataclass(frozen=True)
class ImplicitSettings(Settings):
    """What `implicit` is told.

    Attributes:
        beta: β of the weak policy's DPO.
        splits: whose pairs have log-probs, for their number.
    """

    stage = "implicit"
    format = 5
    scores = True

    beta: float
    splits: tuple[Split, ...] = field(metadata=BESIDE_KEY)


def nodes(run: ArmRun, given: Nodes) -> Nodes:
    """The scores of an arm whose annotator is the weak model, trained as a policy; how it is."""
    teacher = run.teacher
    if teacher is None:
        return {}
    rewards = {name: run.taught[name] for name in ("before", "after")}
    needed = ancestors(rewards.values()) - {given["prepare"].path}
    made = {f"teacher_{k}": node for k, node in run.taught.items() if node.path in needed}
    told = ImplicitSettings(teacher.config.align.beta, teacher.rewarded)
    return made | {"annotate": Node(told, {"prepare": given["prepare"]} | rewards)}


def make(context: Context, node: Node[ImplicitSettings]) -> Mapping[str, object]:
    """Writes `scores/part-*.parquet` and returns the counts."""
    before, after = (context.place(node.inputs[name]) for name in ("before", "after"))
    annotator, rows = f"implicit/{node.key}", 0
    for index in range(context.shards(node)):
        log_probs = read_log_probs(before, index), read_log_probs(after, index)
        scores = rewards(*log_probs, node.settings.beta, annotator)
        table = table_of(scores, SCORE_SCHEMA)
        context.place(node).create_table(part("scores", index), table)
        rows += len(scores)
    return {"rows": rows, "annotator": annotator}


def rewards(
    before: Mapping[str, LogProb], after: Mapping[str, LogProb], beta: float, annotator: str
) -> list[Score]:
    """β·log π/π_SFT of each answer that has both log-probs, by their ids."""
    return [
        Score(name, annotator, beta * (new.logp - before[name].logp), new.tokens_hash)
        for name, new in after.items()
        if name in before
    ]


def work(context: Context, node: Node[ImplicitSettings], counted: Census) -> Work:
    """A difference of two numbers an answer."""
    return Work(f"{counted.answers_of(*node.settings.splits):,} answers")


STAGE = Stage(ImplicitSettings, nodes, make, work)
