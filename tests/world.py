"""A run directory in which each answer's text says who prefers it; stages read it as any other.

Three pairs a split: people chose a, b, b and the annotator scores b, a, b higher. An answer's text
says so itself (`won`/`lost`, `high`/`low`), so that whatever a stage hands on, decoded back to
text, shows whether it is the winner's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
from tiny import save_tiny

from cwpo_dist.config import Config
from cwpo_dist.graph import graph
from cwpo_dist.lm.encoder import Encoder, load_tokenizer
from cwpo_dist.pairs.records import LOG_PROB_SCHEMA, SCORE_SCHEMA, answer_id, prompt_id
from cwpo_dist.pairs.stored import pairs_of, whole_schema, write_pairs
from cwpo_dist.runs.context import Context
from cwpo_dist.runs.output_key import Node
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.stages import tokens
from cwpo_dist.storage import MANIFEST, Store
from cwpo_dist.training.tasks import Task

SPLITS = ("labelled", "unlabelled", "validation", "test")
LABELS, HIGHER = "abb", "bab"  # whom people chose, and whom the annotator scores higher
OTHER = {"a": "b", "b": "a"}
SHARDS = (("labelled", "unlabelled"), ("validation", "test"))  # two files, as there are always some


def answer(split: str, k: int, side: str) -> str:
    """The text of one answer; winners are longer in the first pair alone."""
    words = ["won" if side == LABELS[k] else "lost", "high" if side == HIGHER[k] else "low"]
    more = " and more words" if (side == LABELS[k]) == (k == 0) else ""
    return f"{' '.join(words)} {split} {k}{more}"


def pairs(split: str) -> list[dict[str, Any]]:
    """The three pairs of a split as `prepare` writes them."""
    return [
        {
            "pair_id": f"{split}-{k}",
            "prompt": f"prompt {split} {k}: ",
            "response_a": answer(split, k, "a"),
            "response_b": answer(split, k, "b"),
            "label": LABELS[k],
            f"votes_{LABELS[k]}": 3,
            f"votes_{OTHER[LABELS[k]]}": k,
            "split": split,
            "source": "world",
        }
        for k in range(3)
    ]


def named(split: str, k: int, side: str) -> str:
    """The id of one answer."""
    return answer_id(prompt_id(f"prompt {split} {k}: "), answer(split, k, side))


def margin(k: int) -> float:
    """By how much the annotator scores the better answer of pair k above the other."""
    return 1.0 + 0.5 * k


def reference(text: str) -> float:
    """A log-prob by which each answer is known again."""
    return -3.0 - len(text) - 20.0 * ("won" in text) - 40.0 * ("high" in text)


class World:
    """The folder, its configuration, and the outputs that tests lay into it."""

    def __init__(self, folder: Path, arms: list[str], **sections: Any) -> None:
        if not (folder / "model").exists():
            save_tiny(folder / "model", "llama", 0)
        source = folder / "source.jsonl"
        source.write_text(json.dumps({"prompt": "p", "chosen": "yes", "rejected": "no"}) + "\n")
        model = {"model_name_or_path": str(folder / "model"), "chat_template": "plain"}
        given: dict[str, Any] = {
            "output_dir": str(folder / "run"),
            "arms": arms,
            "prepare": {"sources": [{"path": str(source)}], "validation_fraction": 0.1},
            "weak": model | {"num_hidden_layers": 1},
            "policy": model,
            "evaluate": {"num_prompts": 0},
        }
        for name, section in sections.items():
            given[name] = given.get(name, {}) | section if isinstance(section, dict) else section
        self.config = Config.model_validate(given)
        self.context = Context(Store(self.config.output_dir))
        self.graphs = {arm: graph(self.config, arm) for arm in arms}
        self.encoder = Encoder(load_tokenizer(self.config.policy), "plain")
        self._prepared(self.graphs[arms[0]]["prepare"])

    def node(self, role: str, arm: str | None = None) -> Node:
        """A node of an arm, of the first one unless it is named."""
        return self.graphs[arm or self.config.arms[0]][role]

    def place(self, role: str, arm: str | None = None) -> Store:
        """Its folder."""
        return self.context.place(self.node(role, arm))

    def _prepared(self, node: Node) -> None:
        store = self.context.place(node)
        for index, splits in enumerate(SHARDS):
            rows = [row for split in splits for row in pairs(split)]
            table = pa.Table.from_pylist(rows, schema=whole_schema("text"))
            write_pairs(store, index, pairs_of(table))
        counts: dict[str, Any] = {"shards": 2, "pairs": 12, "kind": "text", "message_keys": []}
        for name, of_each in (("splits", 3), ("prompts", 3), ("answers", 6)):
            counts[name] = dict.fromkeys(SPLITS, of_each)
        store.create_json(MANIFEST, {"counts": counts})

    def score(self, role: str = "annotate", arm: str | None = None, factor: float = 1.0) -> None:
        """Scores of all answers that no annotator was trained on, the higher one positive."""
        for index, splits in enumerate(SHARDS):
            rows = []
            for split in set(splits) - {"labelled"}:
                for k in range(3):
                    lower = 0.25 - factor * margin(k)
                    for side, score in ((HIGHER[k], 0.25), (OTHER[HIGHER[k]], lower)):
                        told = {"answer_id": named(split, k, side), "annotator": "world"}
                        rows.append(told | {"score": score})
            rows.sort(key=itemgetter("answer_id"))
            table = pa.Table.from_pylist(rows, schema=SCORE_SCHEMA)
            self.place(role, arm).create_table(part("scores", index), table)

    def tokenise(self, arm: str | None = None, role: str = "tokens") -> None:
        """The real stage."""
        node = self.node(role, arm)
        tokens.make(self.context, node)

    def log_probs(self, role: str, arm: str | None, of: Callable[[str], float]) -> None:
        """An output of `reference`: the log-prob of each answer by its text; a letter a token."""
        for index, splits in enumerate(SHARDS):
            texts = {
                named(split, k, side): answer(split, k, side)
                for split in splits
                for k in range(3)
                for side in "ab"
            }
            rows = [
                {"answer_id": name, "logp": of(text), "tokens": len(text)}
                for name, text in sorted(texts.items())
            ]
            table = pa.Table.from_pylist(rows, schema=LOG_PROB_SCHEMA)
            self.place(role, arm).create_table(part("reference", index), table)

    def handed_on(self, task: Task) -> dict[str, tuple[str, ...]]:
        """The answers of each of a task's rows as text, without their prompt."""
        decode = self.encoder.tokenizer.decode
        found = {}
        for row, pair_id in zip(task.rows, task.pair_ids, strict=True):
            texts = [decode([*row.prompt, *ids], skip_special_tokens=True) for ids in row.answers]
            found[pair_id] = tuple(text.partition(": ")[2] for text in texts)
        return found
