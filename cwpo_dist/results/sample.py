"""Finished stage outputs of a run in; a sample of its pairs with their scores and answers out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain, islice
from operator import attrgetter

import numpy as np

from cwpo_dist.config import Split
from cwpo_dist.pairs.chosen import Label
from cwpo_dist.pairs.messages import message_text
from cwpo_dist.pairs.records import Text, one_a_prompt
from cwpo_dist.pairs.stored import Pair, read_pairs
from cwpo_dist.report.cells import together
from cwpo_dist.report.explorer import MOST_PAIRS, Sample, shortened
from cwpo_dist.runs.context import Context, annotator_name, read_sampled
from cwpo_dist.runs.joined import ScoresIn
from cwpo_dist.runs.output_key import Node, Nodes, members
from cwpo_dist.stages.weigh import chooser_of
from cwpo_dist.weighting import Scale, join

_LOOKED_AT = 20_000  # pairs, of however few prompts
Graphs = Mapping[str, Nodes]
# Of a model's answers: before preference optimisation, and after.
ANSWERS = {"before": "answers_sft", "after": "answers_aligned"}


def sample(context: Context, graphs: Graphs) -> Sample:
    """Pairs of as many prompts (ids are hashes, so the first are a sample), those answered first.

    The labels of unlabelled pairs are shown only where an arm may have read them.
    """
    reader = _Reader.of(context, graphs)
    prepare = next(iter(graphs.values()))["prepare"]
    store = context.place(prepare)
    shards = range(int(context.counts(prepare)["shards"]))
    pairs = chain.from_iterable(reader.pairs(i, read_pairs(store, i)) for i in shards)
    few = one_a_prompt(islice(pairs, _LOOKED_AT), attrgetter("id"), MOST_PAIRS)
    return {
        "total": int(context.counts(prepare)["pairs"]),
        "annotators": reader.names,
        "arms": list(graphs),
        "pairs": [asdict(pair) for pair in sorted(few, key=lambda pair: not pair.answers)],
    }


@dataclass(frozen=True)
class _Shown:
    """A pair as the explorer shows it: what is known of it, and what models answered."""

    id: str
    split: Split | None
    prompt: str
    a: str
    b: str
    label: Label | None
    margins: list[float | None]
    margin: float | None
    answers: dict[str, dict[str, str]]


@dataclass(frozen=True)
class _Reader:
    """What is known of pairs beside themselves.

    Attributes:
        names: of the annotators.
        scores: what each gave.
        joint: those of them whose mean is the margin, the annotators of the first arm with any.
        answers: arm → before or after → pair id → the model's answer.
        uncovered: whether labels of unlabelled pairs were read by any arm.
    """

    names: list[str]
    scores: list[ScoresIn]
    joint: list[int]
    answers: dict[str, dict[str, dict[str, str]]]
    uncovered: bool

    @classmethod
    def of(cls, context: Context, graphs: Graphs) -> _Reader:
        by_arm = [members(nodes["evaluate"]) for nodes in graphs.values()]
        annotators = {node.path: node for nodes in by_arm for node in nodes}
        joint = {node.path for node in next(filter(None, by_arm), [])}
        return cls(
            joint=[k for k, path in enumerate(annotators) if path in joint],
            names=_names(context, graphs, annotators),
            scores=[
                ScoresIn(context.place(n), n.retries, context.prepared(n))
                for n in annotators.values()
            ],
            answers={arm: _answers(context, nodes) for arm, nodes in graphs.items()},
            uncovered=any(_reads_hidden(nodes["weigh"]) for nodes in graphs.values()),
        )

    def pairs(self, index: int, pairs: list[Pair]) -> Iterator[_Shown]:
        """The pairs of a shard about which there is something to show."""
        found = [each.read(index) for each in self.scores]
        for pair in pairs:
            margins = [each.get(pair.pair_id) for each in found]
            label = pair.label if self.uncovered or pair.split != "unlabelled" else None
            if label is None and not any(m is not None for m in margins):
                continue
            yield _Shown(
                id=pair.pair_id,
                split=pair.split,
                prompt=shortened(transcript(pair.prompt)),
                a=shortened(transcript(pair.response_a)),
                b=shortened(transcript(pair.response_b)),
                label=label,
                margins=margins,
                margin=_joint([margins[k] for k in self.joint]),
                answers=self._answers_to(pair.pair_id),
            )

    def _answers_to(self, pair_id: str) -> dict[str, dict[str, str]]:
        """By arm, of those whose models all answered the pair's prompt."""
        return {
            arm: {when: shortened(texts[pair_id]) for when, texts in told.items()}
            for arm, told in self.answers.items()
            if told and all(pair_id in texts for texts in told.values())
        }


def _reads_hidden(weigh: Node) -> bool:
    """Whether an arm reads labels of the unlabelled part: people's, or with its own numbers."""
    chooser = chooser_of(weigh)
    return chooser.labels != "annotator" and "unlabelled" in chooser.splits


def _names(context: Context, graphs: Graphs, annotators: Mapping[str, Node]) -> list[str]:
    """Of each annotator: the arms that learn from it, or for those of one ensemble their own."""
    arms = {
        path: tuple(
            arm
            for arm, nodes in graphs.items()
            if chooser_of(nodes["weigh"]).labels == "annotator"
            and path in [node.path for node in members(nodes["weigh"])]
        )
        for path in annotators
    }
    sharing = Counter(arms.values())
    return [
        annotator_name(context, node)
        if sharing[arms[path]] > 1
        else f"annotator of {together(arms[path])}"
        for path, node in annotators.items()
    ]


def _joint(margins: list[float | None]) -> float | None:
    """The annotators' mean margin a − b, or None where too few scored."""
    if not margins:
        return None
    row_NK = np.array([[np.nan if m is None else m for m in margins]], dtype=np.float64)
    value = float(join(row_NK, Scale.raw(len(margins))).margin[0])
    return None if np.isnan(value) else value


def _answers(context: Context, nodes: Mapping[str, Node]) -> dict[str, dict[str, str]]:
    if "answers_aligned" not in nodes:
        return {}
    return {when: read_sampled(context, nodes[role]) for when, role in ANSWERS.items()}


def transcript(text: Text) -> str:
    """A prompt or answer as people read it; messages with their roles, if there are several."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return message_text(text[0])
    return "\n\n".join(f"[{message['role']}]\n{message_text(message)}" for message in text)
