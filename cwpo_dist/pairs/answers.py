"""Answers, each once, with their prompts; and which two of them each pair compares.

What a model makes of an answer depends on its prompt and itself alone, in however many pairs it
stands. Of pairs there is here what joins such numbers to them: ids.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from cwpo_dist.config import Split
from cwpo_dist.pairs.packing import tools_of, unpacked
from cwpo_dist.pairs.records import Text, Tools, read_rows
from cwpo_dist.pairs.stored import pair_schema, places_of, shard_file
from cwpo_dist.storage import Store


class Answer(NamedTuple):
    """An answer, and what it answers.

    Attributes:
        answer_id: the content's hash, which begins with the prompt's.
        prompt: text or messages, as the answer is.
        answer: it.
        tools: what the conversation could call.
        alone: the split of one that stands in no pair; None: it stands in some.
    """

    answer_id: str
    prompt: Text
    answer: Text
    tools: Tools | None = None
    alone: Split | None = None


class Compared(NamedTuple):
    """The two answers that a pair compares, by their ids."""

    pair_id: str
    answer_a: str
    answer_b: str
    split: Split | None = None


def read_answers(store: Store, index: int) -> list[Answer]:
    """The answers of a shard, in the order of their ids.

    Args:
        store: the output folder of `prepare`, or any with shards by `write_shard`.
        index: the shard's number.

    Raises:
        RecordError: for an answer to a prompt that is not there.
    """
    named = shard_file("prompts", index)
    asked, answers = store.read_table(named), store.read_table(shard_file("answers", index))
    places = places_of(answers["prompt_id"], asked["prompt_id"], store.path(named)).to_pylist()
    # One object a prompt, however many answers it has.
    prompts, tools = unpacked(asked["prompt"]), tools_of(asked["tools"])
    texts = zip(answers["answer_id"].to_pylist(), places, unpacked(answers["answer"]), strict=True)
    found = [Answer(name, prompts[place], text, tools[place]) for name, place, text in texts]
    if "split" not in answers.column_names:
        return found
    splits = answers["split"].to_pylist()
    return [each._replace(alone=split) for each, split in zip(found, splits, strict=True)]


def read_compared(
    store: Store, index: int, splits: Collection[str] | None = None
) -> list[Compared]:
    """The pairs of a shard by their ids, in its order; of these splits, or None: all.

    Raises:
        RecordError: for a file that does not follow its schema.
    """
    found = read_rows(store, shard_file("pairs", index), Compared, pair_schema())
    return [pair for pair in found if splits is None or pair.split in splits]
