"""`cwpo ask`: which pairs people should label next."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from cwpo_dist.cli.options import ConfigPath, Overrides, guard_own_ray, say
from cwpo_dist.cli.terminal_log import log_to_terminal
from cwpo_dist.config.load import load_config

# As in `acquisition`, which is heavy to import.
Strategies = Literal["uncertain", "random", "disagree", "delta_ucb"]


def ask(
    config: ConfigPath,
    overrides: Overrides = None,
    budget: Annotated[int, typer.Option(min=1, help="How many pairs at most.")] = 100,
    strategy: Annotated[
        Strategies,
        typer.Option(help="What makes a pair worth a label; the last two compare annotators."),
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
