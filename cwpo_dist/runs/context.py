"""What every stage is handed beside its settings: the run directory, and where its inputs lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cwpo_dist.config import ModelConfig, Split
from cwpo_dist.manifest import Manifest
from cwpo_dist.pairs.records import (
    ANSWER_SCHEMA,
    SampledAnswer,
    read_rows,
)
from cwpo_dist.runs.output_key import Node
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.storage import MANIFEST, FileMissing, Store


@dataclass(frozen=True)
class Context:
    """One run directory.

    Attributes:
        root: it (`output_dir`).
        foreseen: for a plan of several outputs: some of the answers that those planned so far will
            have said something of, by the model that does.
    """

    root: Store
    foreseen: dict[str, set[str]] = field(default_factory=dict)

    def place(self, node: Node) -> Store:
        """The folder of a stage output."""
        return self.root.child(node.stage, node.key)

    def done(self, node: Node) -> bool:
        """True when the output is committed: its manifest is there.

        Raises:
            StorageError: for one that is empty or torn: nobody can say what it stood for.
        """
        try:
            self.place(node).read_json(MANIFEST)
        except FileMissing:
            return False
        return True

    def others(self, node: Node) -> list[str]:
        """The committed outputs of a node's stage that another version of cwpo_dist made."""
        stage = self.root.child(node.stage)
        made = [name for name in stage.names() if name.endswith(f"/{MANIFEST}")]
        return [
            f"{node.stage}/{name.removesuffix(f'/{MANIFEST}')}"
            for name in made
            if not Manifest.read(stage, name).has_format(node.settings.format)
        ]

    def counts(self, node: Node) -> Mapping[str, Any]:
        """The counts in a committed output's manifest."""
        return Manifest.read(self.place(node)).counts

    def answers(self, node: Node, splits: Sequence[Split] | None = None) -> AnswersIn:
        """The answers that this node descends from; of pairs of these splits, or None: all."""
        return AnswersIn(self.prepared(node), None if splits is None else tuple(splits))

    def prepared(self, node: Node) -> Store:
        """The folder of pairs that this node descends from."""
        return self.place(prepared(node))

    def shards(self, node: Node) -> int:
        """How many pair files `prepare` made for this node."""
        return int(self.counts(prepared(node))["shards"])


def prepared(node: Node) -> Node:
    """The one output, of `prepare`, that everything in an arm descends from: it reads no other."""
    while node.inputs:
        node = node.inputs.get("prepare") or next(iter(node.inputs.values()))
    return node


def trained(model: ModelConfig, stage: Store) -> ModelConfig:
    """The model that a training stage wrote, read like `model` was: same lengths, same template."""
    template = model.chat_template if model.chat_template == "plain" else "tokenizer"
    changes = {
        "model_name_or_path": stage.child("model").uri,
        "revision": None,
        "num_hidden_layers": None,
        "chat_template": template,
    }
    return model.model_copy(update=changes)


def policy_of(context: Context, node: Node, policy: ModelConfig) -> ModelConfig:
    """The policy as a node sees it: as given, or as its `model` input trained it."""
    if "model" not in node.inputs:
        return policy
    return trained(policy, context.place(node.inputs["model"]))


def annotator_name(context: Context, node: Node) -> str:
    """An annotator in words: its seed, or its model."""
    if "fit" in node.inputs:
        return f"seed {node.inputs['fit'].settings.identity()['seed']}"
    return str(context.counts(node)["annotator"])


def read_sampled(context: Context, node: Node) -> dict[str, str]:
    """A model's answers by the id of the pair whose prompt it was given."""
    store = context.place(node)
    names = store.names("answers")
    found = [row for name in names for row in read_rows(store, name, SampledAnswer, ANSWER_SCHEMA)]
    return {row.pair_id: row.answer for row in found}
