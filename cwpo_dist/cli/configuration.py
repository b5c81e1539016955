"""The command `config`: a whole configuration, or what may stand in one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cwpo_dist.cli.options import Overrides
from cwpo_dist.config import ConfigError
from cwpo_dist.config.load import load_config, to_yaml
from cwpo_dist.config.reference import explained
from cwpo_dist.config.schema import schema as json_schema


def config(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="YAML file; see jobs/recipes for examples."),
    ] = None,
    overrides: Overrides = None,
    explain: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="What a field, or a section, is; no CONFIG is read."),
    ] = None,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="The JSON Schema, for editors; no CONFIG is read."),
    ] = False,
) -> None:
    """Show the whole configuration as YAML: files and overrides merged, defaults filled in.

    --explain says of a field what it is, its type, bounds and default, and whether it changes what
    comes out. docs/configuration.md has all of them.

    Example: cwpo config run.yaml fit.num_train_epochs=2 > whole.yaml

    Example: cwpo config --explain align.beta
    """
    if sum((config is not None, explain is not None, schema)) != 1:
        raise ConfigError("config: give one of CONFIG, --explain FIELD and --schema")
    if config is not None:
        typer.echo(to_yaml(load_config(config, overrides)), nl=False)
    elif explain is not None:
        typer.echo(explained(explain))
    else:
        typer.echo(json_schema(), nl=False)
