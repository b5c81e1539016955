"""Pages for people: links lead somewhere, examples are read by the program, sentences are short."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from typer.main import get_command

from cwpo_dist.cli.app import app
from cwpo_dist.config.load import parse_config
from cwpo_dist.pairs.layout import Layout
from cwpo_dist.pairs.row_forms import pairs_of_row

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = [page for page in PAGES if page.name != "architectures.md"]  # which a program writes
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(language: str) -> list[Any]:
    """The code blocks of a language, each with its page's name."""
    found = [(named(page), *block) for page in PAGES for block in _BLOCK.findall(page.read_text())]
    return [pytest.param(text, id=name) for name, of, text in found if of == language]


def anchors(page: Path) -> set[str]:
    """The headings of a page, as a forge links them."""
    text = _BLOCK.sub("", page.read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in _LINK.findall(_BLOCK.sub("", page.read_text())):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{named(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{named(page)}: {link}"


def test_the_index_names_every_page() -> None:
    linked = set(_LINK.findall((ROOT / "docs" / "README.md").read_text()))
    docs = ROOT / "docs"
    pages = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}
    assert pages - {"README.md"} <= linked


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_configuration_in_a_page_is_one(text: str) -> None:
    given = yaml.safe_load(text)
    whole = {"output_dir": "runs/x", "prepare": {"sources": [{"path": "x.jsonl"}]}}
    merged = {**whole, **given, "prepare": {**whole["prepare"], **given.get("prepare", {})}}
    parse_config(merged)


def commands(text: str) -> Iterator[list[str]]:
    """The calls of `cwpo` in a block of shell, without their comments."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["cwpo"]:
            yield words[1:]


@pytest.mark.parametrize("text", blocks("sh"))
def test_a_command_in_a_page_is_one(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words are taken as the command line takes them; nothing is done."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    known = get_command(app).commands
    for name, *words in commands(text):
        asks = name == "init"  # it would ask for what no option says
        known[name].make_context(name, words, resilient_parsing=asks)  # raises for unknown words


@pytest.mark.parametrize("text", blocks("json"))
def test_a_row_in_a_page_is_read(text: str) -> None:
    """As JSON, what stands for more left out; rows of text as what they are said to be."""
    for line in text.splitlines():
        whole = re.sub(r"(?<=[\[{, ])…(?=[\]}])", "", line).replace("{}", '{"role": "user"}')
        row = json.loads(re.sub(r",\s*([\]}])", r"\1", whole))
        if "prompt" in row and isinstance(row.get("chosen"), str) and row["chosen"] != "…":
            names = {name: name for name in ("prompt", "chosen", "rejected")}
            (pair,) = pairs_of_row(row, Layout(names, "text", "text")).pairs
            assert pair.label == "first"


def sentences(page: Path) -> Iterator[int]:
    """How many words each sentence of running text has: no code, tables, headings."""
    text = _BLOCK.sub("\n\n", page.read_text())
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        if paragraph.lstrip().startswith(("#", "|", "![", "<")):
            continue
        plain = re.sub(r"`[^`]*`", "x", _LINK.sub("]", paragraph))
        for sentence in re.split(r"(?<=[.!?:])\s+", plain):
            if words := re.findall(r"\w[\w’'-]*", sentence):
                yield len(words)


def test_sentences_are_short() -> None:
    lengths = sorted(length for page in WRITTEN for length in sentences(page))
    assert statistics.median(lengths) <= 18
    assert lengths[int(0.9 * len(lengths))] <= 30


def test_the_editors_container_has_a_python_that_installs_the_project() -> None:
    given = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    image = re.fullmatch(r"python:3\.(\d+)-bookworm", given["image"])
    wanted = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert image is not None
    assert wanted is not None
    assert int(image[1]) >= int(wanted[1])
    assert given["postCreateCommand"].endswith("&& make install")
