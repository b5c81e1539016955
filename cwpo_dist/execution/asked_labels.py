"""`compare.ask` in; annotators that learned the labels that each strategy asked for, compared, out.

The sources know the label of each pair that is asked for, and `prepare.labelled_fraction` hid it:
they say what people would. What was asked for is a source of its own, as people's answers are, so
that a trial is a run like any other, and does again what its labels change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cwpo_dist.config import Config, Source
from cwpo_dist.evaluation.paired import Items, over_seeds, paired
from cwpo_dist.execution.ask import QUESTIONS, Asked, AskSettings, ask_node, asked
from cwpo_dist.execution.side_by_side import Job, make_all
from cwpo_dist.execution.trial_items import context_of
from cwpo_dist.graph import nodes_until
from cwpo_dist.pairs.chosen import signs
from cwpo_dist.pairs.records import prompt_of, table_of
from cwpo_dist.runs.annotations import Annotated, gather, scores_in
from cwpo_dist.runs.output_key import Node, Nodes, Settings, scored
from cwpo_dist.runs.trials import section, starting
from cwpo_dist.weighting import Scale

FIGURES = ("accuracy", "nll")
_RIGHT = pa.schema([("pair_id", pa.string()), ("right", pa.float64())])


class Asks(NamedTuple):
    """What is asked for beside the labelled part.

    Attributes:
        strategy: a key of `STRATEGIES`; None: of what is asked for nothing.
        budget: how many labels.
    """

    strategy: str | None
    budget: int


NOTHING = Asks(None, 0)


@dataclass(frozen=True)
class Learned:
    """An annotator of one seed.

    Attributes:
        labels: how many people gave; of those that were asked for, ties and what it cannot read
            included.
        items: by figure, what it is worth on held-out pairs.
    """

    labels: int
    items: Mapping[str, Items]


def learning_curves(config: Config) -> list[dict[str, object]]:
    """A row for each annotator: what it asked for, and means over seeds with their intervals.

    Differences are from `random` with as many labels, on the same pairs of the same seeds.
    """
    compare = section(config)
    starts = {seed: starting(config, seed) for seed in compare.seeds}
    _make(starts.values())
    every = dict.fromkeys(Asks(one.strategy, n) for one in compare.ask for n in one.budgets)
    told = {(asks, seed): _ask(run, asks) for asks in every for seed, run in starts.items()}
    runs = {of: _with_labels(starts[of[1]], given) for of, given in told.items()}
    _make(runs.values())
    found = {NOTHING: {seed: _learned(run, _labels(run)) for seed, run in starts.items()}}
    for (asks, seed), run in runs.items():
        labels = found[NOTHING][seed].labels + told[asks, seed].counts["asked"]
        found.setdefault(asks, {})[seed] = _learned(run, labels)
    return [_row(asks, found) for asks in found]


def _nodes(run: Config) -> Nodes:
    return nodes_until(run, run.arms[0], "annotate")


def _make(runs: Iterable[Config]) -> None:
    """Annotators and their scores, where they are not there yet."""
    make_all([Job(context_of(run), node) for run in runs for node in _nodes(run).values()])


def _ask(start: Config, asks: Asks) -> Asked:
    """The pairs whose hidden labels come next."""
    assert asks.strategy is not None, "nothing is asked for without"
    settings = AskSettings(asks.strategy, asks.budget, start.seed, hidden=True)
    return asked(context_of(start), ask_node(settings, _nodes(start)))


def _with_labels(start: Config, told: Asked) -> Config:
    """The run whose labelled part has what was asked for; only what is measured is scored."""
    path, form = told.place.child(QUESTIONS).uri, told.counts["format"]
    sources = [*start.prepare.sources, Source(path=path, format=form, into="labelled")]
    changes = {
        "prepare": start.prepare.model_copy(update={"sources": sources}),
        "annotate": start.annotate.model_copy(update={"splits": [start.evaluate.split]}),
    }
    return start.model_copy(update=changes)


def _labels(run: Config) -> int:
    counts = context_of(run).counts(_nodes(run)["prepare"])
    return int(counts["splits"]["labelled"])


def _learned(run: Config, labels: int) -> Learned:
    """What the annotators of a run are worth together."""
    context, nodes = context_of(run), _nodes(run)
    node = Node(Settings(), {"prepare": nodes["prepare"]} | scored(nodes))
    scores = tuple(scores_in(context, node))
    pairs, shards = context.place(nodes["prepare"]), context.shards(node)
    given = Annotated(pairs, shards, scores, Scale.raw(len(scores)))
    table = gather(partial(_right, given, run.evaluate.split), shards, _RIGHT).sort_by("pair_id")
    names, right = table["pair_id"].to_pylist(), table["right"].to_numpy()
    values = {"accuracy": (1 + np.sign(right)) / 2, "nll": np.logaddexp(0, -right)}
    prompts = list(map(prompt_of, names))
    items = {figure: Items(names, prompts, values[figure]) for figure in FIGURES}
    return Learned(labels, items)


def _right(given: Annotated, split: str, index: int) -> pa.Table:
    """The labelled pairs of a split in a shard, and how far their margin is on the label's side."""
    opinions, _ = given.opinions(index)
    assert opinions is not None, "there is an annotator"
    rows = [
        (each.pair_id, float(signs([each.label])[0]) * opinions[each.pair_id].margin)
        for each in given.judgements(index)
        if each.split == split and each.label is not None and each.pair_id in opinions
    ]
    return table_of(rows, _RIGHT)


def _row(asks: Asks, found: Mapping[Asks, Mapping[int, Learned]]) -> dict[str, object]:
    ours, theirs = found[asks], found.get(Asks("random", asks.budget))
    row: dict[str, object] = asks._asdict()
    row["labels"] = float(np.mean([each.labels for each in ours.values()]))
    for figure in FIGURES:
        by_seed = {seed: each.items[figure] for seed, each in ours.items()}
        row[figure] = over_seeds(list(by_seed.values())).as_dict()
        if theirs is not None and asks.strategy != "random":
            by_lot = {seed: each.items[figure] for seed, each in theirs.items()}
            row[f"{figure}_less_random"] = paired(by_seed, by_lot).as_dict()
    return row
