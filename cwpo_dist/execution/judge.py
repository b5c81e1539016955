"""Answers of a finished run in; a blind page for people, and with what they said win rates, out.

People judge some prompts, drawn by lot, the gold reward all: `prediction_powered` uses both. What a
verdict is about is known by its texts, so that it stays true of the same answers in any run.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cwpo_dist.canonical import digest
from cwpo_dist.config import Config, ConfigError, PrepareConfig, Source
from cwpo_dist.evaluation.calibration import people_share
from cwpo_dist.evaluation.prediction_powered import Powered, powered
from cwpo_dist.evaluation.shares import group_numbers
from cwpo_dist.evaluation.win_rates import won
from cwpo_dist.execution.ask import PAGE, question_of, write_questions
from cwpo_dist.execution.trial_items import context_of, evaluated
from cwpo_dist.pairs.messages import has_words
from cwpo_dist.pairs.parsing import ParsedPair
from cwpo_dist.pairs.pieces import raw_rows
from cwpo_dist.pairs.records import Text, canonical, prompt_of, read_rows
from cwpo_dist.pairs.rejects import BadRow
from cwpo_dist.pairs.row_forms import parse_raw
from cwpo_dist.pairs.sources import plan
from cwpo_dist.pairs.splits import ordered
from cwpo_dist.pairs.stored import Pair, read_pairs
from cwpo_dist.report.cells import at
from cwpo_dist.report.comparison_page import FIGURES
from cwpo_dist.results.show import show, show_comparison
from cwpo_dist.runs.context import Context, read_sampled
from cwpo_dist.runs.judged_answers import JUDGED_SCHEMA, JudgedAnswer
from cwpo_dist.runs.output_key import Node
from cwpo_dist.runs.trials import names, trials
from cwpo_dist.stages.evaluate import ANSWERS, BASELINES
from cwpo_dist.storage import Store


@dataclass(frozen=True)
class Match:
    """Two models' answers to one prompt.

    Attributes:
        pair: in an order that says nothing.
        ours_is_a: whether its first answer is of the model that is judged.
        gold: 1, ½ or 0: whether the gold reward puts that one above, as high, or below.
    """

    pair: Pair
    ours_is_a: bool
    gold: float


NO_WORDS = "[an empty answer]"  # what is shown of one: a blank cell is no row that can be read


class _Answer(NamedTuple):
    pair_id: str
    text: str
    gold: float | None


def ask_judges(config: Config, ours: str, theirs: str, budget: int) -> list[str]:
    """Writes the page on which people say which of two answers is better.

    Args:
        config: of a finished run or comparison.
        ours: an arm, or a trial of the comparison.
        theirs: another, or `own_sft` or `common`: a key of `BASELINES`.
        budget: how many prompts at most; drawn by lot, and a larger one draws more.

    Returns:
        What to do with it, for the terminal.

    Raises:
        ConfigError: for a trial that is unknown or not finished, and where nothing is to be judged.
    """
    matches, unread = _matches(config, ours, theirs)
    drawn = sorted({each.pair.pair_id: each.pair for each in matches}.values(), key=_lot)[:budget]
    with_tools = any(pair.tools is not None for pair in drawn)
    place = Store(config.output_dir).child("judge", digest([pair.pair_id for pair in drawn]))
    write_questions(place, [question_of(pair, with_tools) for pair in drawn])
    return [
        f"{len(drawn):,} of {len(matches):,} prompts, drawn by lot, that {ours} and {theirs} "
        "answered differently",
        *(
            [f"{unread:,} more of them are in no win rate, as gold could not read both answers"]
            if unread
            else []
        ),
        f"page: {place.child(PAGE).uri}",
        "then give the same command with --answers 'answers-*.jsonl'",
    ]


def show_judged(config: Config, ours: str, theirs: str, files: Sequence[str]) -> str:
    """Adds win rates by people's verdicts to the figures of the run, and shows its report anew.

    Args:
        config: of a finished run or comparison.
        ours: as `ask_judges` was told.
        theirs: as `ask_judges` was told.
        files: of verdicts: rows of the page, or as `prepare` reads them.

    Returns:
        The report's place.

    Raises:
        ConfigError: where no verdict is about these answers.
    """
    matches, _ = _matches(config, ours, theirs)
    shares, left_out = _said(files, matches[0].pair)
    found = win_rate(matches, shares)
    known = {each.pair.pair_id for each in matches}
    if not found.judged:
        raise ConfigError(f"--answers: no verdict is about answers of {ours} and {theirs}")
    left_out["about other answers"] = sum(name not in known for name in shares)
    root = Store(config.output_dir)
    name = FIGURES if config.compare is not None else "metrics.json"
    figures = root.read_json(name)
    for of in {ours, theirs} - BASELINES.keys():
        _check_same(config, of, figures)
    told = {"ours": ours, "theirs": theirs, "left_out": dict(+left_out)} | found.as_dict()
    others = [
        each
        for each in figures.get("judged", [])
        if (each["ours"], each["theirs"]) != (ours, theirs)
    ]
    figures["judged"] = [*others, told]
    root.write(name, json.dumps(figures, indent=1).encode())
    return show([config.output_dir]) if config.compare is None else show_comparison(root)


def _check_same(config: Config, name: str, figures: Mapping[str, object]) -> None:
    """Refuses a report that was written with other settings: it is of other models."""
    one = at(figures, "arms", name, "keys", "evaluate")
    made = at(figures, "trials", name, "keys") if one is None else [one]
    if made is not None and made != _keys(config, name):
        command = "run" if config.compare is None else "compare"
        raise ConfigError(
            f"cwpo judge: the report of {config.output_dir} is of other settings than these; "
            f"give `cwpo {command}` these again, which writes it anew"
        )


def _keys(config: Config, name: str) -> list[str]:
    """Of an arm's or trial's figures, seed by seed."""
    return [evaluated(*run)[1]["evaluate"].key for run in _seeds(config, name).values()]


def win_rate(matches: Sequence[Match], shares: dict[str, float]) -> Powered:
    """How often one model's answers are the better ones.

    Args:
        matches: all prompts.
        shares: by pair id: the share of people that chose the pair's answer a.
    """
    said = [
        np.nan if share is None else share if each.ours_is_a else 1 - share
        for each in matches
        for share in [shares.get(each.pair.pair_id)]
    ]
    prompts = [prompt_of(each.pair.pair_id) for each in matches]
    gold = np.array([each.gold for each in matches])
    return powered(np.array(said), gold, group_numbers(prompts, len(matches)))


def _lot(pair: Pair) -> str:
    """An order that hangs on nothing: pair ids begin with their prompt, and would go by it."""
    return digest(pair.pair_id)


def _matches(config: Config, ours: str, theirs: str) -> tuple[list[Match], int]:
    """All that both answered, with gold rewards of both, and how many more have none.

    Equal answers are left out.
    """
    every = [match for run in _runs(config, ours, theirs) for match in _of_run(*run, theirs)]
    found = [match for match in every if match is not None]
    if not found:
        raise ConfigError(
            f"cwpo judge: {ours} and {theirs} have no two different answers with gold rewards; "
            "they need evaluate.num_prompts, and evaluate.gold_model or gold_function"
        )
    return found, len(every) - len(found)


Run = tuple[Config, str]  # with its arm


def _runs(config: Config, ours: str, theirs: str) -> Iterator[tuple[Run, Run]]:
    """Both sides, seed by seed; a baseline is of the arm that is held against it."""
    sides = [_seeds(config, name) for name in (ours, ours if theirs in BASELINES else theirs)]
    for seed in sides[0].keys() & sides[1].keys():
        yield sides[0][seed], sides[1][seed]


def _seeds(config: Config, name: str) -> dict[int, Run]:
    """The runs of an arm or trial, with the learning rate that the comparison took."""
    if config.compare is None:
        if name not in config.arms:
            raise ConfigError(f"cwpo judge: unknown arm {name!r}; choose from {config.arms}")
        return {config.seed: (config, name)}
    root = Store(config.output_dir)
    if not root.exists(FIGURES):
        raise ConfigError(
            f"cwpo judge: {config.output_dir} has no comparison; `cwpo compare` first"
        )
    told = {known: trial for trial, known in names(trials(config)).items()}
    if name not in told:
        raise ConfigError(f"cwpo judge: unknown trial {name!r}; choose from {'; '.join(told)}")
    made = root.read_json(FIGURES)["trials"].get(name)
    if made is None:
        raise ConfigError(f"cwpo judge: the comparison has no {name!r} yet; `cwpo compare` again")
    seeds = config.compare.seeds[: made.get("stopped_after")]
    trial = told[name]
    return {
        seed: (trial.configured(config, seed, made["learning_rate"]), trial.arm) for seed in seeds
    }


def _of_run(ours: Run, theirs: Run, against: str) -> Iterator[Match | None]:
    """A match for each prompt with two different answers; None where gold could not read both."""
    own = _answers(ours, None)
    others = _answers(theirs, against if against in BASELINES else None)
    context, node = context_of(ours[0]), evaluated(*ours)[1]["evaluate"]
    asked = _pairs(context, node, {each.pair_id for each in own.values()})
    for prompt in sorted(own.keys() & others.keys()):
        mine, other = own[prompt], others[prompt]
        if mine.text == other.text:
            continue
        if mine.gold is None or other.gold is None:
            yield None
            continue
        pair = asked[mine.pair_id]
        first, second = (_like(pair.prompt, each.text) for each in (mine, other))
        given = ParsedPair(pair.prompt, first, second, None, tools=pair.tools)
        turned = ordered(given, canonical(pair.prompt), 0, "")[0]
        gold = won(np.array([mine.gold]), np.array([other.gold]))
        yield Match(turned, turned.response_a == first, float(gold[0]))


def _answers(run: Run, baseline: str | None) -> dict[str, _Answer]:
    """By prompt: an arm's answers, or those of a baseline that they were held against."""
    place, nodes = evaluated(*run)
    if not context_of(run[0]).done(nodes["evaluate"]):
        raise ConfigError(f"cwpo judge: arm {run[1]} has no figures yet; finish the run first")
    if not place.exists(ANSWERS):
        return {}
    texts = read_sampled(
        context_of(run[0]), nodes[BASELINES[baseline] if baseline else "answers_aligned"]
    )
    rows = read_rows(place, ANSWERS, JudgedAnswer, JUDGED_SCHEMA)
    return {
        prompt_of(row.pair_id): _Answer(
            row.pair_id,
            text if has_words(text := texts[row.pair_id]) else NO_WORDS,
            row.baseline_gold if baseline else row.gold,
        )
        for row in rows
        if row.against == (baseline or "common")
    }


def _pairs(context: Context, node: Node, ids: set[str]) -> dict[str, Pair]:
    """Of the pairs whose prompts were answered."""
    store, shards = context.prepared(node), range(context.shards(node))
    found = (pair for index in shards for pair in read_pairs(store, index))
    return {pair.pair_id: pair for pair in found if pair.pair_id in ids}


def _like(prompt: Text, answer: str) -> Text:
    """An answer of the kind of its prompt: text, or messages."""
    return answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]


def _said(files: Sequence[str], like: Pair) -> tuple[dict[str, float], Counter[str]]:
    """By pair id the share of people that chose answer a, and how many rows say nothing."""
    form = "text" if isinstance(like.prompt, str) else "conversational"
    sources = [Source(path=path, format=form) for path in files]
    said, left_out = defaultdict[str, list[tuple[float, int]]](list), Counter[str]()
    for each in _rows(sources, left_out):
        pair = ordered(each, canonical(each.prompt), 0, "")[0]
        voters = sum(filter(None, (pair.votes_a, pair.votes_b, pair.votes_tie)))
        share = 0.5 if pair.tie and not voters else people_share(pair.told)
        if share is None:
            left_out["without a verdict"] += 1
        else:
            said[pair.pair_id].append((share, voters or 1))
    return {name: _mean(rows) for name, rows in said.items()}, left_out


def _rows(sources: list[Source], left_out: Counter[str]) -> Iterator[ParsedPair]:
    """The pairs of files; counts rows that cannot be read."""
    for piece in plan(PrepareConfig(sources=sources)).pieces:
        for _, raw in raw_rows(piece):
            try:
                yield from parse_raw(raw, piece.layout).pairs
            except BadRow:
                left_out["unreadable"] += 1


def _mean(rows: Sequence[tuple[float, int]]) -> float:
    """Of shares, each of so many voters: a row of one person counts once."""
    return sum(share * voters for share, voters in rows) / sum(voters for _, voters in rows)
