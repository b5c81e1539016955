"""A stage is one file: named in the list of stages it runs in its order, resumes, is planned."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from small_run import small_config

from cwpo_dist import graph, stage_order, stages
from cwpo_dist.config import ConfigError
from cwpo_dist.config.load import parse_config
from cwpo_dist.execution.run import run
from cwpo_dist.planning.plan import plan
from cwpo_dist.storage import Store

FILE = """
from dataclasses import dataclass

from cwpo_dist.runs.output_key import Node, Settings
from cwpo_dist.runs.stage import Stage, Work

fails = []


@dataclass(frozen=True)
class LengthSettings(Settings):
    stage = "lengths"

    seed: int


def nodes(run, given):
    return {"lengths": Node(LengthSettings(run.config.seed), {"prepare": given["prepare"]})}


def make(context, node):
    place = context.place(node)
    place.create_json("half.json", len(place.names()))
    if fails:
        raise RuntimeError(fails.pop())
    return {"pairs": context.counts(node.inputs["prepare"])["pairs"]}


def work(context, node, counted):
    return Work(f"{sum(counted.splits.values())} pairs measured")


STAGE = Stage(LengthSettings, nodes, make, work)
"""


@pytest.fixture
def lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The file in the folder of stages, and its line in their list, after that of `prepare`."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "lengths.py").write_text(FILE)
    monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(tmp_path / "stages")])
    before = dict(graph.STAGES)
    first, *others = before.items()
    graph.STAGES.clear()
    graph.STAGES.update([first, ("lengths", graph._record("lengths")), *others])
    yield "lengths"
    graph.STAGES.clear()
    graph.STAGES.update(before)
    sys.modules.pop("cwpo_dist.stages.lengths")


@pytest.mark.usefixtures("in_process")
def test_it_runs_after_what_it_reads_and_resumes(
    lengths: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cwpo_dist.execution.run.connect", lambda: None)
    monkeypatch.setattr("cwpo_dist.execution.run.device", lambda: "cpu")
    caplog.set_level(logging.INFO, "cwpo_dist")
    config = parse_config(small_config(tmp_path, arms=["human"]))
    nodes = graph.nodes_until(config, "human", lengths)
    assert list(nodes) == ["prepare", lengths]
    sys.modules["cwpo_dist.stages.lengths"].fails.append("cut off")
    with pytest.raises(RuntimeError, match="cut off"):
        run(config, until=lengths)
    run(config, until=lengths)
    assert f"{nodes[lengths].path}: resuming" in caplog.text
    place = Store(config.output_dir).child(lengths, nodes[lengths].key)
    made = place.read_json("manifest.json")
    assert (made["stage"], made["settings"]) == (lengths, {"seed": 0})
    assert made["counts"]["pairs"] > 0
    caplog.clear()
    run(config, until=lengths)
    assert f"{nodes[lengths].path}: done before" in caplog.text
    with pytest.raises(ConfigError, match="lengthy: arm 'human' has no such stage"):
        graph.nodes_until(config, "human", "lengthy")


def test_it_is_a_line_of_the_plan(lengths: str, tmp_path: Path) -> None:
    made = plan(parse_config(small_config(tmp_path, arms=["human"])))
    (line,) = [each for each in made.stages if each.stage == lengths]
    assert line.work.endswith("pairs measured")
    assert line.arms == ("human",)
    names = [each.stage for each in made.stages]
    assert names[:2] == ["prepare", lengths]


def test_it_is_a_command() -> None:
    does = "Measures answers."
    code = (
        "from cwpo_dist.stage_order import LISTED, Listed\n"
        f"LISTED['lengths'] = Listed({json.dumps(does)})\n"
        "from cwpo_dist.cli.app import main\n"
        "main(['--help'])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "lengths" in told.stdout
    assert does in told.stdout


def test_every_file_of_a_stage_stands_in_the_list() -> None:
    files = {path.stem for path in Path(stages.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(stage_order.LISTED)
    assert all(graph.STAGES[name].name == name for name in stage_order.LISTED)
