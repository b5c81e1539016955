"""Scores of unlabelled pairs in; those that people should label next out, in files to label.

What comes back is a source like any other: a row with its votes is a copy of the pair that was
asked for, and `prepare` puts both together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cwpo_dist.acquisition import STRATEGIES, Candidates, most_worth
from cwpo_dist.canonical import digest
from cwpo_dist.config import ARMS, Config, ConfigError
from cwpo_dist.execution.ask_states import DECIDES, make_states, states_node, worth_together
from cwpo_dist.execution.run import execute
from cwpo_dist.graph import nodes_until
from cwpo_dist.pairs.packing import as_json
from cwpo_dist.pairs.records import prompts_of, read_records, table_of
from cwpo_dist.pairs.stored import Pair, pair_schema, pairs_of, read_whole, shard_file
from cwpo_dist.report.questions import LABEL_STUDIO, Question, label_studio_tasks, page
from cwpo_dist.results.sample import transcript
from cwpo_dist.runs.annotations import Annotated, gather, scores_in
from cwpo_dist.runs.cluster import connect
from cwpo_dist.runs.context import Context, prepared
from cwpo_dist.runs.output_key import Node, Nodes, Settings, scored
from cwpo_dist.storage import Store
from cwpo_dist.weighting import Scale

CANDIDATES = pa.schema([("pair_id", pa.string()), ("worth", pa.float64()), ("shard", pa.int32())])
PAGE, QUESTIONS = "page.html", "questions.jsonl"
TASKS, LAYOUT = "label_studio.json", "label_studio.xml"


@dataclass(frozen=True)
class AskSettings(Settings):
    """What decides which pairs are asked for.

    Attributes:
        strategy: a key of `STRATEGIES`.
        budget: how many at most.
        seed: of what is drawn.
        hidden: whether those are asked for whose label is known and not used, which then says what
            people would; None: those that have none.
    """

    stage = "ask"
    format = 1

    strategy: str
    budget: int
    seed: int
    hidden: bool | None = None


@dataclass(frozen=True)
class Asked:
    """What was written.

    Attributes:
        place: the folder.
        counts: of its manifest.
    """

    place: Store
    counts: Mapping[str, Any]

    def lines(self) -> list[str]:
        """What to do with it, for the terminal."""
        told, page_at = self.counts, self.place.child(PAGE).uri
        unscored = f"; {told['not_scored']:,} have no score" if told["not_scored"] else ""
        return [
            f"{told['asked']:,} of {told['candidates']:,} pairs without a label, to "
            f"{told['prompts_asked']:,} of {told['prompts']:,} prompts, by strategy "
            f"{told['strategy']}{unscored}",
            f"page: {page_at} (or {TASKS} and {LAYOUT} beside it, for Label Studio)",
            "then add to prepare.sources: "
            f"{{path: answers-*.jsonl, format: {told['format']}, into: labelled}}",
        ]


def ask(config: Config, budget: int, strategy: str, arm: str | None = None) -> Asked:
    """Chooses unlabelled pairs and writes them for people; what that needs is done first.

    Args:
        config: the run.
        budget: how many pairs at most.
        strategy: a key of `STRATEGIES`.
        arm: whose annotators; None: those of the first one that has some.

    Raises:
        ConfigError: where the strategy needs more annotators.
    """
    first = next(filter(_scores_unlabelled, config.arms), "weak")
    node, needed = _planned(config, budget, strategy, arm or first)
    context = Context(Store(config.output_dir))
    context.root.sweep()
    if not context.done(node):
        connect()
        for each in needed:
            _refuse_untrainable(context, each, strategy)
            execute(context, each)
    return asked(context, node)


def asked(context: Context, node: Node[AskSettings]) -> Asked:
    """What was written, now where it is not there yet; what it reads is there."""
    if not context.done(node):
        connect()
        if "states" in node.inputs:
            execute(context, node.inputs["states"], by=partial(make_states, context))
        execute(context, node, by=partial(_make, context))
    return Asked(context.place(node), context.counts(node))


def _planned(
    config: Config, budget: int, strategy: str, arm: str
) -> tuple[Node[AskSettings], list[Node]]:
    """The output, and what is done before it."""
    if arm not in ARMS:
        raise ConfigError(f"--arm: unknown arm {arm!r}; choose from {', '.join(ARMS)}")
    if not _scores_unlabelled(arm):
        raise ConfigError(f"--arm: {arm!r} has no scores of unlabelled pairs; choose another")
    wanted = STRATEGIES[strategy].annotators
    nodes = nodes_until(config, arm, "annotate" if wanted else "prepare")
    node = ask_node(AskSettings(strategy, budget, config.seed), nodes)
    if (there := sum(each.settings.heads for each in scored(nodes).values())) < wanted:
        raise ConfigError(
            f"--strategy: {strategy!r} needs {wanted} annotators, and arm {arm!r} has {there}; "
            "give fit.heads or several fit.seeds, or --strategy uncertain"
        )
    by_states = "states" in node.inputs  # which have the scores, too
    return node, [each for each in nodes.values() if not (by_states and each.settings.scores)]


def ask_node(told: AskSettings, nodes: Nodes) -> Node[AskSettings]:
    """The output, and what it reads of a run's."""
    strategy, read = STRATEGIES[told.strategy], {"prepare": nodes["prepare"]}
    if strategy.worth is None:
        return Node(told, read | {"states": states_node(nodes)})
    return Node(told, read | (scored(nodes) if strategy.annotators else {}))


def _scores_unlabelled(arm: str) -> bool:
    """Whether an arm's annotators score what has no label, and not people's labels alone."""
    return ARMS[arm].annotator == "fitted" and ARMS[arm].judged is None


def _refuse_untrainable(context: Context, node: Node, strategy: str) -> None:
    """Says what to do where an annotator is to be trained, and there is no label yet."""
    if node.stage == "fit" and not context.counts(prepared(node))["splits"]["labelled"]:
        raise ConfigError(
            f"--strategy: {strategy!r} needs an annotator, and no pair has a label to train it on; "
            "begin with --strategy random, or give annotate.model.model_name_or_path"
        )


def _make(context: Context, node: Node[AskSettings]) -> Mapping[str, object]:
    """Writes the questions in each form and returns the counts."""
    told, pairs = node.settings, context.place(node.inputs["prepare"])
    found = _found(context, node)
    unknown = pc.is_nan(found["worth"])
    known = found.filter(pc.invert(unknown))
    chosen = known.take(most_worth(known["worth"].to_numpy(), known["pair_id"], told.budget))
    if not len(chosen):
        raise ConfigError(_nothing(len(found), told))
    questions = _questions(pairs, chosen)
    write_questions(context.place(node), questions)
    return {
        "asked": len(questions),
        "candidates": len(known),
        "prompts": pc.count_distinct(prompts_of(known["pair_id"])).as_py(),
        "prompts_asked": pc.count_distinct(prompts_of(chosen["pair_id"])).as_py(),
        "not_scored": pc.sum(unknown).as_py() or 0,
        "strategy": told.strategy,
        "format": "text" if isinstance(questions[0].row["prompt"], str) else "conversational",
    }


def _found(context: Context, node: Node[AskSettings]) -> pa.Table:
    """All candidates, with what a label of each is worth."""
    told = node.settings
    if "states" in node.inputs:
        return worth_together(context, node, partial(_free, told.hidden), told.budget)
    scores, pairs = tuple(scores_in(context, node)), context.place(node.inputs["prepare"])
    given = Annotated(pairs, context.shards(node), scores, Scale.raw(len(scores)))
    return gather(partial(_candidates, given, told), given.shards, CANDIDATES)


def _free(hidden: bool | None, table: pa.Table) -> pa.Array:
    """Which pairs can be asked for."""
    judged = pc.or_(pc.is_valid(table["label"]), pc.fill_null(table["tie"], fill_value=False))
    return pc.and_(pc.equal(table["split"], "unlabelled"), judged if hidden else pc.invert(judged))


def _nothing(unscored: int, told: AskSettings) -> str:
    if told.hidden and not unscored:
        return "compare.ask: the sources have no label beside those of the labelled part"
    if unscored:
        return (
            f"cwpo ask: none of the {unscored:,} unlabelled pairs has a score of every annotator; "
            "see rejects/ of `annotate`, or take --strategy random"
        )
    return (
        "cwpo ask: every training pair has a label; give pairs without one, or responses and "
        "prepare.pairing: all"
    )


def _candidates(given: Annotated, told: AskSettings, index: int) -> pa.Table:
    """The pairs of a shard that can be asked for, with what a label of each is worth.

    NaN where an annotator did not score both answers.
    """
    table = read_records(given.pairs, shard_file("pairs", index), pair_schema(), DECIDES)
    names = table["pair_id"].filter(_free(told.hidden, table)).to_pylist()
    ids, margins_NK = given.margins(index)
    places = {name: i for i, name in enumerate(ids)}
    none = np.full((1, len(given.scores)), np.nan)
    margins_NK = np.concatenate([margins_NK, none])[[places.get(name, -1) for name in names]]
    known = np.isfinite(margins_NK).all(axis=1)
    worth = np.full(len(names), np.nan)
    candidates = Candidates(list(np.array(names)[known]), margins_NK[known], told.seed)
    rule = STRATEGIES[told.strategy].worth
    assert rule is not None, "it hangs on nothing else"
    worth[known] = rule(candidates)
    return table_of([(n, w, index) for n, w in zip(names, worth, strict=True)], CANDIDATES)


def write_questions(place: Store, questions: list[Question]) -> None:
    """The same questions for a browser, for Label Studio, and as rows for any other tool."""
    place.write(QUESTIONS, "".join(f"{each.line}\n" for each in questions).encode())
    place.write(PAGE, page(digest([each.pair_id for each in questions]), questions))
    place.write(TASKS, label_studio_tasks(questions))
    place.write(LAYOUT, LABEL_STUDIO.encode())


def _questions(pairs: Store, chosen: pa.Table) -> list[Question]:
    """The chosen pairs with their texts, in the order in which they were chosen."""
    names = chosen["pair_id"].combine_chunks()
    found: dict[str, Pair] = {}
    for index in sorted(set(chosen["shard"].to_pylist())):
        whole = read_whole(pairs, index)
        some = pairs_of(whole.filter(pc.is_in(whole["pair_id"], value_set=names)))
        found |= {pair.pair_id: pair for pair in some}
    # In all rows or in none: what few rows have may stand too far down to be seen as a column.
    with_tools = any(pair.tools is not None for pair in found.values())
    return [question_of(found[name], with_tools) for name in names.to_pylist()]


def question_of(pair: Pair, with_tools: bool) -> Question:
    """A pair as it is asked for: its row, and its texts as people read them."""
    row: dict[str, Any] = {"pair_id": pair.pair_id, "prompt": pair.prompt}
    row |= {"response_a": pair.response_a, "response_b": pair.response_b}
    row |= {"tools": pair.tools} if with_tools else {}
    asked = transcript(pair.prompt)
    if pair.tools is not None:
        asked = f"[tools]\n{as_json(pair.tools)}\n\n{asked}"
    answers = transcript(pair.response_a), transcript(pair.response_b)
    return Question(pair.pair_id, row, (asked, *answers))
