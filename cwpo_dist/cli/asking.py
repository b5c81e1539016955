"""`cwpo ask` and `cwpo judge`: what people are asked: labels of pairs, verdicts on answers."""

from __future__ import annotations

from typing import Annotated

import typer

from cwpo_dist.cli.options import ConfigPath, Overrides, guard_own_ray, say
from cwpo_dist.cli.terminal_log import log_to_terminal
from cwpo_dist.config import Strategies
from cwpo_dist.config.load import load_config


def ask(
    config: ConfigPath,
    overrides: Overrides = None,
    budget: Annotated[int, typer.Option(min=1, help="How many pairs at most.")] = 100,
    strategy: Annotated[
        Strategies,
        typer.Option(help="What makes a pair worth a label, see docs/ask.md."),
    ] = "uncertain",
    arm: Annotated[
        str | None, typer.Option(help="Whose annotators score; by default the first arm's.")
    ] = None,
) -> None:
    """Choose the unlabelled pairs that people should label next, and write a page to label them on.

    What it needs and is not done yet is done first, and said. A second pair of a prompt comes after
    the first pairs of all others. What people save is a source of its own: the next `cwpo run` does
    again what their labels change.

    Example: cwpo ask run.yaml --budget 200 --strategy uncertain
    """
    guard_own_ray()
    from cwpo_dist.acquisition import STRATEGIES
    from cwpo_dist.execution.ask import ask as ask_people
    from cwpo_dist.runs.checks import check

    log_to_terminal()
    loaded = load_config(config, overrides)
    scored = STRATEGIES[strategy].annotators > 0
    check(loaded, "annotate" if scored else "prepare")  # before any worker starts
    for line in ask_people(loaded, budget, strategy, arm).lines():
        say(line)


def judge(
    config: ConfigPath,
    overrides: Overrides = None,
    arm: Annotated[
        str | None,
        typer.Option(help="Whose answers: an arm or trial; by default the run's first arm."),
    ] = None,
    against: Annotated[
        str, typer.Option(help="Another, or own_sft or common: the models that GRA compares with.")
    ] = "own_sft",
    budget: Annotated[int, typer.Option(min=1, help="How many prompts at most.")] = 100,
    answers: Annotated[
        list[str] | None,
        typer.Option(metavar="FILES", help="What people said, a glob; give it again for more."),
    ] = None,
) -> None:
    """Write a page on which people judge two models' answers; with --answers, their win rates.

    The run or comparison is finished, and has gold rewards of its answers. People judge prompts
    drawn by lot, and the gold reward all: together they say more than people alone (PPI++), and are
    as right as people, however wrong the gold reward is.

    Example: cwpo judge run.yaml --arm cw --against human --answers 'answers-*.jsonl'
    """
    from cwpo_dist.execution.judge import ask_judges, show_judged

    log_to_terminal()
    loaded = load_config(config, overrides)
    ours = arm or loaded.arms[0]
    if answers:
        say(f"report: {show_judged(loaded, ours, against, answers)}")
        return
    for line in ask_judges(loaded, ours, against, budget):
        say(line)
