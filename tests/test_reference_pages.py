"""docs/files.md and docs/commands.md are as the code is, and leave out nothing that it writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import ROOT
from reference_pages import PAGES, TABLES
from typer.main import get_command

from cwpo_dist.cli.app import app
from cwpo_dist.docstrings import described


@pytest.mark.parametrize("name", PAGES)
def test_what_is_committed_is_current(name: str) -> None:
    made: Callable[[], str] = PAGES[name]
    assert (ROOT / "docs" / name).read_text() == made(), f"docs/{name}: make reference"


def test_every_command_and_option_stands_there() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    for name, command in get_command(app).commands.items():
        _, _, section = page.partition(f"\n## `cwpo {name}`\n")
        section = section.partition("\n## ")[0]
        for option in (o for p in command.params for o in p.opts if o.startswith("--")):
            assert f"`{option}" in section, (name, option)


def test_each_column_has_its_own_meaning() -> None:
    for name, (schema, told) in TABLES.items():
        known = {column for each in told for column in described(each)}
        assert set(schema.names) <= known, name


def test_a_docstring_tells_names_and_meanings() -> None:
    def documented() -> None:
        """It does.

        Metrics:
            a/b, c: the one,
                and more.
            d_*: another: with a colon.

        Raises:
            ValueError: never.
        """

    told = {"a/b": "the one, and more", "c": "the one, and more", "d_*": "another: with a colon"}
    assert described(documented) == told
