"""`cwpo init`: every set of answers gives a configuration, and nothing is overwritten."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import get_args

import pytest
import yaml
from typer.testing import CliRunner

from cwpo_dist.cli.app import app, main
from cwpo_dist.cli.starting_file import Answers, Labels, starting_file
from cwpo_dist.config import Config, ConfigError
from cwpo_dist.config.load import parse_config


def made(**changes: object) -> Config:
    given = {"data": "p.jsonl", "labels": "some", "annotator": "weak", "policy": "big"}
    answers = Answers(**({"gpus": 0, "output_dir": "runs/x"} | given | changes))
    return parse_config(yaml.safe_load(starting_file(answers, "run.yaml")))


@pytest.mark.parametrize(
    ("labels", "policy", "gpus"), list(product(get_args(Labels), ("", "big"), (0, 8)))
)
def test_every_set_of_answers_gives_a_configuration(labels: str, policy: str, gpus: int) -> None:
    config = made(labels=labels, policy=policy, gpus=gpus)
    assert (config.policy is not None) == bool(policy)
    assert (config.weak is None) == (labels == "none") == bool(config.annotate.ready())
    assert config.annotate.gpus_per_actor == (1 if gpus else 0)
    assert config.annotate.num_actors == max(1, gpus)
    if policy:
        assert config.align.num_workers == config.sft.num_workers == max(1, gpus)  # type: ignore[union-attr]  # it has them
        assert ("human" in config.arms) == (labels == "all")


@pytest.mark.parametrize("text", ["a b: c #d", "'quoted'", "yes", "123", "pfad/ü*.jsonl", "- x"])
def test_what_is_typed_is_what_is_read(text: str) -> None:
    config = made(data=text, annotator=text, output_dir=text)
    assert config.prepare.sources[0].path == config.output_dir == text
    assert config.weak is not None
    assert config.weak.model_name_or_path == text


def test_what_no_option_says_is_asked(tmp_path: Path) -> None:
    to = tmp_path / "new.yaml"
    words = ["init", str(to), "--labels", "all", "--gpus", "0"]
    found = CliRunner().invoke(app, words, input="my pairs.jsonl\nsome/weak\n\n")
    assert found.exit_code == 0, found.output
    config = parse_config(yaml.safe_load(to.read_text()))
    assert (config.prepare.sources[0].path, config.policy) == ("my pairs.jsonl", None)
    assert f"cwpo plan {to}" in to.read_text()


def test_a_file_that_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (to := tmp_path / "run.yaml").write_text("mine")
    asked = ("--data", "x", "--labels", "some", "--annotator", "w", "--policy", "", "--gpus", "0")
    with pytest.raises(SystemExit) as ended:
        main(["init", str(to), *asked])
    assert ended.value.code == 2
    assert "is there already" in capsys.readouterr().err
    assert to.read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["missing/run.yaml"], "there is no folder"),
        (["a\nb.yaml"], "cannot be shown"),
        (["run.yaml", "--data", " "], "names nothing"),
        (["run.yaml", "--data", "x", "--labels", "some", "--annotator", ""], "names nothing"),
    ],
)
def test_what_cannot_be_is_refused_before_more_is_asked(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["init", *words])
    assert isinstance(found.exception, ConfigError), found.output
    assert says in str(found.exception)
    assert not list(tmp_path.iterdir())
