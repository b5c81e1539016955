"""What a stage is: the record that each file of `stages/` exports, and what it says of its work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from cwpo_dist.config import PoolConfig, TrainingConfig
from cwpo_dist.pairs.estimate import Census
from cwpo_dist.runs.arms import ArmRun
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node, Nodes, Settings
from cwpo_dist.storage import Store

S = TypeVar("S", bound=Settings)
Retry = Callable[[Context, Node[S]], Mapping[str, object] | None]
Leaves = Literal["pairs", "scores", "log_probs", "tokens"]


@dataclass(frozen=True)
class Work:
    """What making an output takes, before it is made; what it costs is for `planning` to say.

    Attributes:
        text: in words.
        pairs: of which it leaves something behind, those too that fit no model.
        leaves: what that is; None: nothing of size.
        model: the field that names the model whose tokens it reads; None: it reads none.
    """

    text: str
    pairs: int = 0
    leaves: Leaves | None = None
    model: str | None = None


@dataclass(frozen=True)
class Scoring(Work):
    """A model's pass over pairs.

    Attributes:
        pool: the actors that share it.
        passed: pairs that go through the model.
    """

    pool: PoolConfig = field(kw_only=True)
    passed: int = 0


@dataclass(frozen=True)
class Training(Work):
    """A training, which leaves a model.

    Attributes:
        training: its section.
        kept: the share of the pairs that is trained on.
        chosen_alone: whether it reads the better answer alone.
        sampled: whether pairs are drawn, so that these are the most.
    """

    training: TrainingConfig = field(kw_only=True)
    kept: float = 1.0
    chosen_alone: bool = False
    sampled: bool = False


@dataclass(frozen=True)
class Generating(Work):
    """Answers to prompts.

    Attributes:
        pool: the actors that share it.
        prompts: how many.
        together: how many of them at once.
        new_tokens: of an answer, at most.
        longest: tokens of a prompt and its answer, at most.
    """

    pool: PoolConfig = field(kw_only=True)
    prompts: int = 0
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
    """

    settings: type[S]
    nodes: Callable[[ArmRun, Nodes], Nodes]
    make: Callable[[Context, Node[S]], Mapping[str, object]]
    work: Callable[[Context, Node[S], Census], Work]
    clear: Callable[[Store], None] = _nothing
    retry: Retry[S] | None = None

    @property
    def name(self) -> str:
        """Its name, and the folder of its outputs."""
        return self.settings.stage
