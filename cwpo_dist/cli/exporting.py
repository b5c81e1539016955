"""What leaves a run: `export` copies models and data sets, and `verify` checks the copies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cwpo_dist.cli.options import say
from cwpo_dist.cli.terminal_log import log_to_terminal


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory or URI.")],
    to: Annotated[str, typer.Option(help="An empty or new folder, or a URI.")],
    arm: Annotated[str | None, typer.Option(help="Needed when the run has several arms.")] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The LoRA adapter alone, not merged.")
    ] = False,
    annotator: Annotated[
        str | None,
        typer.Option(help="`fit`: the annotator instead; of an ensemble `fit_0`, `fit_1`, …"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Hub id of the adapter's base, where the policy was given as a folder."),
    ] = None,
    data: Annotated[
        Literal["preferences", "scores"] | None,
        typer.Option(help="A data set instead of a model; RUN may then be RUN/weigh/<key>."),
    ] = None,
    sign: Annotated[
        Path | None,
        typer.Option(metavar="KEY", help="An EC private key (PEM); needs the extra [sign]."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Send the folder to this repository of the hub."),
    ] = None,
) -> None:
    """Copy an arm's aligned model: a Hugging Face folder that loads anywhere, with its card.

    An adapter after SFT with LoRA does what both adapters did, on the policy as it was given;
    after SFT of all weights its base comes with it. `--data` exports preferences, or scores with
    their texts, for `datasets.load_dataset`. `--push` makes a private repository of it, with the
    token of HF_TOKEN or of `hf auth login`.

    Example: cwpo export runs/demo --arm cw --to models/aligned
    """
    from cwpo_dist.results import export as models
    from cwpo_dist.results import export_data
    from cwpo_dist.results import push as hub

    log_to_terminal()
    if push is not None:
        hub.check_name(push, to)
    if data is None:
        say(f"model: {models.export(run, arm, to, adapter, annotator, base, sign)}")
    elif adapter or annotator or base:
        raise typer.BadParameter("goes without --adapter, --annotator, --base", param_hint="--data")
    else:
        say(f"data set: {export_data.export_data(run, arm, to, data, sign)}")
    if push is not None:
        say(f"pushed: {hub.push(to, push, 'model' if data is None else 'dataset')}")


def verify(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Exported; a path or a URI.")],
    key: Annotated[
        Path | None,
        typer.Option(help="The public key (PEM) of who signed it; needs the extra [sign]."),
    ] = None,
) -> None:
    """Check an exported folder: is every file as it was written, and none more?

    Each changed, missing or added file is named, and the exit code is 1. Without --key that finds
    damage, not malice: who changes files can change digests.json too.

    Example: cwpo verify models/aligned --key release.pub
    """
    from cwpo_dist.signing import compare, verify_signature
    from cwpo_dist.storage import Store

    place = Store(folder)
    found = compare(place).lines()
    if not found and key is not None and (why := verify_signature(place, key)) is not None:
        found.append(f"signature: not that of {key}: {why}")
    for line in found:
        say(line)
    if found:
        raise typer.Exit(1)
    say(f"{folder}: all files as they were {'written' if key is None else 'signed'}")
