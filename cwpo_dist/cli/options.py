"""What commands share: stages' names, arguments and options, how a line is printed, Ray's token."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cwpo_dist.redaction import redacted
from cwpo_dist.stage_order import LISTED
from cwpo_dist.terminal_text import harmless

# What each stage does, in its order; `cwpo <stage>` exists for each.
STAGES = {name: stage.does for name, stage in LISTED.items() if stage.does}

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file; see jobs/recipes for examples.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[OVERRIDES]",
        help="key.sub=value or further YAML files, applied over CONFIG from left to right.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Refuse to start again a stage whose inputs changed."),
]
RetryRejects = Annotated[
    bool,
    typer.Option(
        "--retry-rejects", help="`annotate`: score again what was set aside for a failure."
    ),
]
_PLAN = "What a plan counts"
Show = Annotated[
    int,
    typer.Option(help="Print this many rows as the models see them.", rich_help_panel=_PLAN),
]
Price = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[KIND=]NUMBER",
        help="Of an hour of a device: a GPU, or a CPU where a pool has none. H100=4.50: of that "
        "accelerator_type alone; give it again for others.",
        rich_help_panel=_PLAN,
    ),
]
PairsPerSecond = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[KIND=]NUMBER",
        help="Pairs of two answers that one device annotates; by kind like --price.",
        rich_help_panel=_PLAN,
    ),
]
Trial = Annotated[
    str | None,
    typer.Option(help="A finished run of a sample, whose rate to take.", rich_help_panel=_PLAN),
]


def say(text: str) -> None:
    """Prints text as it is, however wide the terminal."""
    Console(soft_wrap=True).print(escape(harmless(redacted(text))), highlight=False)


def guard_own_ray() -> None:
    """A token for the Ray that this process starts; must be set before ray is imported.

    Ray would otherwise write one into HOME, and every later `ray start` of this user would ask
    for it.
    """
    names = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if not any(os.environ.get(name) for name in names):
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
