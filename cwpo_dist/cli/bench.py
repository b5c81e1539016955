"""The command `bench`: a model and labelled data in, what it is worth there out."""

from __future__ import annotations

from typing import Annotated

import typer

from cwpo_dist.cli.options import say
from cwpo_dist.cli.terminal_log import log_to_terminal
from cwpo_dist.config.load import overlaid

bench = typer.Typer(no_args_is_help=True, help="Measure a model on labelled data, without a run.")


@bench.callback()
def _group() -> None: ...


@bench.command()
def annotator(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A one-label reward model: folder, URI, hub id.")
    ],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Pairs with labels, or RewardBench 2's rows.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OVERRIDES]", help="key.sub=value of `prepare` and `annotate`."),
    ] = None,
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Also give the figures of each value.")
    ] = None,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write all figures.")] = None,
) -> None:
    """Say how good a reward model or annotator is on any labelled set; nothing is trained.

    DATA is whatever `prepare` reads, or rows with lists of chosen and of rejected answers
    (RewardBench 2). Overrides are such as annotate.model.max_length=4096 and
    prepare.sources.0.columns.prompt=question.

    Example: cwpo bench annotator models/annotator heldout.jsonl --by domain --json figures.json
    """
    from cwpo_dist.execution.model_bench import bench_annotator

    log_to_terminal()
    given: dict[str, object] = {
        "output_dir": "none",  # nothing is written
        "prepare": {"sources": [{"path": data}]},
        "annotate": {"model": {"model_name_or_path": model}},
    }
    bench_annotator(overlaid(given, overrides), by, json)
    if json is not None:
        say(f"figures: {json}")
