"""What a stage is: the record that each file of `stages/` exports, and what it says of its work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, TypeVar

from cwpo_dist.config import EvaluateConfig, PairsConfig, TrainingConfig
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.runs.arms import ArmRun
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node, Nodes, Settings
from cwpo_dist.runs.scored_by import Scorers
from cwpo_dist.storage import Store

S = TypeVar("S", bound=Settings)
Retry = Callable[[Context, Node[S]], Mapping[str, object] | None]
Leaves = Literal["pairs", "scores", "log_probs", "tokens"]


@dataclass(frozen=True)
class Work:
    """What making an output takes, before it is made; what it costs is for `planning` to say.

    Attributes:
        text: in words.
        rows: that it leaves behind, of pairs or of answers; those too that fit no model.
        leaves: what is in them; None: it leaves nothing of size.
        model: the field that names the model whose tokens it reads; None: it reads none.
        prompts: whose tokens it reads, each once, however many answers it has.
    """

    text: str
    rows: int = 0
    leaves: Leaves | None = None
    model: str | None = None
    prompts: int = 0


@dataclass(frozen=True)
class Scoring(Work):
    """A model's pass over answers and their prompts.

    Attributes:
        by: who shares it.
        answers: that go through the model.
        heads: numbers that each gets beside its score; 1: none.
    """

    by: Scorers = field(kw_only=True)
    answers: int = field(kw_only=True)
    heads: int = field(default=1, kw_only=True)


@dataclass(frozen=True)
class Training(Work):
    """A training, which leaves a model.

    Attributes:
        pairs: that there are to train on, those too that do not fit the model.
        training: its section.
        kept: the share of the pairs that is trained on.
        chosen_alone: whether it reads the better answer alone.
        sampled: whether pairs are drawn, so that these are the most.
        answers: to the prompts, where pairs of one are computed together; else both are 0.
    """

    pairs: int = field(kw_only=True)
    training: TrainingConfig = field(kw_only=True)
    kept: float = 1.0
    chosen_alone: bool = False
    sampled: bool = False
    answers: int = 0


def by_prompt(work: Training, counted: Census, *splits: str) -> Training:
    """The same work, with the prompts of these splits' pairs where they are computed together."""
    section = work.training
    if not isinstance(section, PairsConfig) or section.batch_by == "pair":
        return work
    prompts, answers = counted.prompts_of(*splits), counted.answers_of(*splits)
    return replace(work, prompts=prompts, answers=answers)


@dataclass(frozen=True)
class Generating(Work):
    """Answers to prompts.

    Attributes:
        pool: the actors that share it.
        together: how many prompts at once.
        new_tokens: of an answer, at most.
        longest: tokens of a prompt and its answer, at most.
    """

    pool: EvaluateConfig = field(kw_only=True)
    together: int = 1
    new_tokens: int = 0
    longest: int = 0


def _nothing(_output: Store) -> None:
    """Most stages leave nothing beside their output."""


@dataclass(frozen=True)
class Stage(Generic[S]):
    """One stage.

    Attributes:
        settings: the type of what it is told, which has its name.
        nodes: an arm and the nodes before it → its own, by role; those that it cannot make yet
            come when it is asked again.
        make: writes an output and returns the counts of its manifest.
        work: what there is to do for an output, by what the sources were found to hold.
        clear: removes from a committed output what nobody reads any more.
        retry: does again what a committed output set aside for a failure, and returns the counts of
            all; None where there was nothing to do, or nothing is set aside.
        who: which model an output is of, whose numbers others of that model copy; None: nothing is
            copied.
    """

    settings: type[S]
    nodes: Callable[[ArmRun, Nodes], Nodes]
    make: Callable[[Context, Node[S]], Mapping[str, object]]
    work: Callable[[Context, Node[S], Census], Work]
    clear: Callable[[Store], None] = _nothing
    retry: Retry[S] | None = None
    who: Callable[[Context, Node[S]], str] | None = None

    @property
    def name(self) -> str:
        """Its name, and the folder of its outputs."""
        return self.settings.stage
