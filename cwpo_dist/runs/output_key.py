"""A stage output before it is made: what it reads, what its stage is told, and its content key.

A stage is handed its own settings and no other configuration, and the key hashes these settings:
what is not in the key cannot act.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import ClassVar, Generic, Protocol, runtime_checkable

from typing_extensions import TypeVar

from cwpo_dist.config import PoolConfig, TrainingConfig
from cwpo_dist.manifest import key_of
from cwpo_dist.pairs.splits import Fold
from cwpo_dist.storage import Store

_IN_KEY = "in the key"


@runtime_checkable
class Identified(Protocol):
    """Has content of its own to be hashed: a section of the configuration, a model."""

    def identity(self) -> dict[str, object]:
        """What of it decides an output."""


# Of a field that no key needs to know: it says where or how fast work runs, or when it is given up,
# or an input's key has it already.
BESIDE_KEY = {_IN_KEY: False}


@dataclass(frozen=True)
class Settings:
    """What a stage is told, all of it; the base of a record for each stage.

    Attributes:
        stage: its name, and the folder of its outputs.
        format: raised when the same settings would give other files.
        trains: whether it is a training, with checkpoints, a lease and a curve.
        scores: whether it gives a pair's two answers a score each.
    """

    stage: ClassVar[str]
    format: ClassVar[int] = 3
    trains: ClassVar[bool] = False
    scores: ClassVar[bool] = False

    @property
    def place(self) -> PoolConfig | TrainingConfig | None:
        """The section that says where it runs; None: in the driver, or in few small tasks."""
        return None

    @property
    def fold(self) -> Fold | None:
        """The labelled pairs that a `fit` does not see, which its `annotate` alone reads."""
        return None

    @property
    def heads(self) -> int:
        """How many annotators its scores are of: the heads that `fit` put on one model."""
        return 1

    def identity(self) -> dict[str, object]:
        """The content that the key hashes: of sections and models their own, side by side."""
        content: dict[str, object] = {}
        for each in fields(self):
            if not each.metadata.get(_IN_KEY, True):
                continue
            value = getattr(self, each.name)
            if value is None and each.default is None:  # which older keys do not know
                continue
            if isinstance(value, Identified):
                content |= value.identity()
            else:  # a list, as JSON gives it back
                content[each.name] = list(value) if isinstance(value, tuple) else value
        return content


S_co = TypeVar("S_co", bound=Settings, covariant=True, default=Settings)


@dataclass(frozen=True)
class Node(Generic[S_co]):
    """One stage output.

    Attributes:
        settings: what its stage is told.
        inputs: the outputs that it reads.
        retries: how many retries of its rejects are committed. They add rows to an output whose
            settings and inputs stay the same, so they are no part of its own key, but of the keys
            of all that reads it.
    """

    settings: S_co
    inputs: Mapping[str, Node] = field(default_factory=dict)
    retries: int = 0

    @property
    def stage(self) -> str:
        """The stage that makes it."""
        return self.settings.stage

    @cached_property
    def key(self) -> str:
        """16 hex digits: the same settings and inputs give the same key on any machine."""
        inputs = {name: node.content for name, node in self.inputs.items()}
        told = self.settings
        return key_of(told.format, told.stage, told.identity(), inputs)

    @property
    def content(self) -> str:
        """The key, and which retry: what the keys of its readers hash."""
        return f"{self.key}+retry-{self.retries}" if self.retries else self.key

    @property
    def path(self) -> str:
        """The output's folder below the run directory."""
        return f"{self.stage}/{self.key}"


Nodes = Mapping[str, Node]  # by their roles in an arm


def ancestors(nodes: Iterable[Node]) -> set[str]:
    """The paths of outputs and of all that they descend from."""
    found: set[str] = set()
    left = list(nodes)
    while left:  # each once, by however many ways it is reached
        node = left.pop()
        if node.path not in found:
            found.add(node.path)
            left += node.inputs.values()
    return found


def members(node: Node) -> list[Node]:
    """The outputs with scores that a node reads."""
    return [given for given in node.inputs.values() if given.settings.scores]


def annotators(node: Node) -> list[list[Node]]:
    """These outputs by their annotators, of whom each has one, or one a fold."""
    found: dict[object, list[Node]] = {}
    for each in members(node):
        of_folds = each.settings.fold is not None
        name = each.inputs["fit"].settings.identity()["seed"] if of_folds else each.path
        found.setdefault(name, []).append(each)
    return list(found.values())


def committed_retries(output: Store) -> int:
    """How many retries of its rejects an output has."""
    return next(n for n in itertools.count() if not output.exists(retry_manifest(n + 1)))


def heads_of(node: Node) -> Sequence[int | None]:
    """The heads of the annotator in an output with scores; None stands for an only one."""
    return range(node.settings.heads) if node.settings.heads > 1 else [None]


def scored(nodes: Nodes) -> dict[str, Node]:
    """Outputs with scores as inputs; several by their keys, since their order changes nothing."""
    found = [node for node in nodes.values() if node.settings.scores]
    if len(found) > 1:
        return {f"annotate_{node.key}": node for node in sorted(found, key=lambda node: node.key)}
    return {"annotate": found[0]} if found else {}


def retry_manifest(number: int) -> str:
    """The file that commits a retry of an output's rejects, numbered from 1."""
    return f"manifest.retry-{number}.json"
