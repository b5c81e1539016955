"""docs/configuration.md and docs/schema.json are as the models are, and say what the code does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from conftest import ROOT
from jsonschema import Draft202012Validator
from pydantic import Field

from cwpo_dist.cli import app as cli
from cwpo_dist.config import AlignConfig, Config, ConfigError, Section
from cwpo_dist.config.load import parse_config
from cwpo_dist.config.reference import Described, described, everything, explained, page
from cwpo_dist.config.schema import schema
from cwpo_dist.config.type_words import in_words

RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))
SOURCES = {"output_dir": "run", "prepare": {"sources": [{"path": "x.jsonl"}]}}


def by_path() -> dict[str, Described]:
    return {each.path: each for each in everything()}


def test_every_field_is_described_in_one_line() -> None:
    found = by_path()
    assert len(found) > 200
    for path, each in found.items():
        told = each.field.description
        assert told, f"{path}: give its Field a description"
        assert "\n" not in told, path
        assert not told.endswith("."), path


@pytest.mark.parametrize(("name", "made"), [("configuration.md", page), ("schema.json", schema)])
def test_what_is_committed_is_current(name: str, made: Callable[[], str]) -> None:
    committed = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert committed == made(), f"docs/{name} is not as the models are: make reference"


def test_the_page_has_each_section_once_and_its_links_lead_somewhere() -> None:
    titles = re.findall(r"^## (.+)$", page(), re.MULTILINE)
    anchors = [re.sub(r"[^\w-]", "", title.lower()) for title in titles]
    assert len(set(anchors)) == len(anchors)
    linked = set(re.findall(r"\]\(#([^)]+)\)", page()))
    assert linked == set(anchors)
    sections = [name for name, field in Config.model_fields.items() if name in titles]
    assert [title for title in titles if title in Config.model_fields] == sections
    rows = re.findall(r"^\| `\w+` \|.*\|$", page(), re.MULTILINE)
    assert all(len(re.split(r"(?<!\\)\|", row)) == 7 for row in rows), "a cell has a bar in it"


class Worded(Section):
    """Types as sections have them."""

    plain: int
    truth: bool | Literal["auto"]
    share: Annotated[float, Field(ge=0, le=1)]
    half: Annotated[float, Field(ge=0, lt=0.5)] | None
    names: list[str] | None = Field(min_length=1)
    few: Annotated[int, Field(gt=0, lt=2**63)] | tuple[Annotated[int, Field(ge=0)], int]
    parts: list[AlignConfig]
    values: dict[str, float]


def test_types_in_words() -> None:
    told = {
        name: in_words(field, lambda section: section.__name__)
        for name, field in Worded.model_fields.items()
    }
    assert told == {
        "plain": "a whole number",
        "truth": "`true`, `false` or `auto`",
        "share": "a number from 0 up to 1",
        "half": "a number from 0, below 0.5, or `null`",
        "names": "`null` or a list that is not empty: text",
        "few": "a whole number above 0, or a list of two: a whole number from 0; a whole number",
        "parts": "a list: AlignConfig",
        "values": "`name: value` lines, each value: a number",
    }


def test_a_field_changes_the_result_where_a_key_knows_it() -> None:
    effects = {path: each.effect for path, each in by_path().items()}
    expected = {
        "align.beta": "yes",
        "align.lora.r": "yes",
        "align.zero_stage": "no",
        "align.deepspeed": "in part",
        "align.per_device_train_batch_size": "yes",
        "annotate.num_actors": "no",
        "annotate.pools.num_actors": "no",
        "annotate.model.max_length": "yes",
        "fit.seeds": "yes",
        "prepare.rows_per_shard": "yes",
        "prepare.sources.columns.from": "yes",
        "weigh.from": "yes",
        "reference": "no",
        "align": "field by field",
        "output_dir": "no",
        "seed": "yes",
        "compare.grids.losses": "what is made",
    }
    assert {path: effects[path] for path in expected} == expected


def test_a_section_by_another_name_says_the_same_of_its_fields() -> None:
    """The page has such a section once."""
    said: dict[str, set[tuple[str, ...]]] = {}
    for each in everything():
        if each.section is not None:
            inner = described(each.section, each.path, each.effect)
            told = tuple(f"{field.name} {field.effect}" for field in inner)
            said.setdefault(each.section.__name__, set()).add(told)
    assert {name for name, told in said.items() if len(told) > 1} == set()


def test_a_field_is_explained() -> None:
    told = explained("align.label_smoothing").splitlines()
    assert told[:3] == [
        "align.label_smoothing",
        "  type: a number from 0, below 0.5, or null",
        "  default: null",
    ]
    assert told[3].startswith("  what it is: ε: of robust its share of flipped labels")
    assert told[4:] == ["  changes the result: yes"]
    assert explained("prepare.sources.0.path") == explained("prepare.sources.path")


def test_a_section_is_explained_with_its_fields() -> None:
    told = explained("evaluate")
    assert "\nHeld-out accuracy and gold reward accuracy.\n" in told
    assert "\n  evaluate.temperature (0.95): of sampled answers; 0: greedy\n" in told


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("align.bta", "did you mean align.beta"),
        (
            "max_grad_norm",
            "did you mean fit.max_grad_norm, sft.max_grad_norm, align.max_grad_norm?",
        ),
        ("weigh.from_", "did you mean weigh.from"),
        ("zzzzzz", "docs/configuration.md has all"),
    ],
)
def test_an_unknown_name_is_refused_with_those_like_it(name: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(name)}: no such field; ") as refused:
        explained(name)
    assert remedy in str(refused.value)


def ended(*arguments: str) -> int | str | None:
    """The exit code of the command line, in this process."""
    try:
        cli.main(["config", *arguments])
    except SystemExit as done:
        return done.code
    return 0


def test_the_command_needs_no_configuration_to_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("--explain", "align.beta") == 0
    assert capsys.readouterr().out == explained("align.beta") + "\n"
    assert ended("--schema") == 0
    assert capsys.readouterr().out == schema()
    assert ended("--explain", "align.bta") == cli.USER_ERROR
    assert "did you mean align.beta" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [(), ("run.yaml", "--schema"), ("--schema", "--explain", "align")]
)
def test_the_command_does_one_thing(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(*arguments) == cli.USER_ERROR
    assert "give one of CONFIG, --explain FIELD and --schema" in capsys.readouterr().err


def test_the_page_is_written_by_a_command(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    command = [sys.executable, "-m", "cwpo_dist.config.reference", str(file)]
    subprocess.run(command, check=True, cwd=ROOT)
    assert file.read_text(encoding="utf-8") == page()


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    made = json.loads(schema())
    assert made["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    Draft202012Validator.check_schema(made)
    return Draft202012Validator(made)


class _Yaml12(yaml.SafeLoader):
    """Numbers as editors read them: `1e-4` is one in YAML 1.2."""


_Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_the_schema_and_keeps_it(
    recipe: Path, validator: Draft202012Validator
) -> None:
    text = recipe.read_text(encoding="utf-8")
    place = text.partition("\n")[0].removeprefix("# yaml-language-server: $schema=")
    assert (recipe.parent / place).resolve() == ROOT / "docs" / "schema.json"
    read = yaml.load(text, _Yaml12)  # noqa: S506, a SafeLoader
    assert [error.message for error in validator.iter_errors(read)] == []


@pytest.mark.parametrize(
    "part",
    [
        {"sft": "none"},
        {"sft": None},
        {"align": {"report_to": "none", "num_workers": [1, 4]}},
        {"fit": {"report_to": ["wandb"]}},
        {"weigh": {"from": "both"}},
    ],
)
def test_the_schema_takes_what_a_run_takes(
    part: dict[str, Any], validator: Draft202012Validator
) -> None:
    parse_config(SOURCES | part)
    assert [error.message for error in validator.iter_errors(SOURCES | part)] == []


@pytest.mark.parametrize(
    "part",
    [
        {"algin": {}},
        {"align": {"bta": 0.1}},
        {"align": {"beta": 0}},
        {"align": {"lora": {"r": 0}}},
        {"weigh": {"from_": "both"}},
        {"prepare": {"sources": []}},
    ],
)
def test_the_schema_refuses_what_a_run_refuses(
    part: dict[str, Any], validator: Draft202012Validator
) -> None:
    with pytest.raises(ConfigError):
        parse_config(SOURCES | part)
    assert not validator.is_valid(SOURCES | part)
