"""The blocks of shell and Python in README.md and docs/ are run, or say beside them why not.

A page's blocks are run in their order, in an empty folder with what the page supposes. What stands
in the place of its names, above all of large models, is in `PLACES` below and nowhere else.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from small_run import DEMO_PAIRS, small_config, write_config
from test_docs import PAGES, named
from tiny import save_tiny
from world import World, margin

from cwpo_dist import objectives
from cwpo_dist.cli import app as cli

_BLOCK = re.compile(r"^(?:<!-- ([^\n]+) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w-]+\.yaml)\n")
LONG = "run in a long test"


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        page: where it stands.
        note: what an invisible comment says above it.
        language: as the fence names it.
        text: the block.
    """

    page: str
    note: str
    language: str
    text: str


BLOCKS = [
    Block(named(page), *found) for page in PAGES for found in _BLOCK.findall(page.read_text())
]
RUN = [block for block in BLOCKS if block.language in {"sh", "python"}]
STATE = Path(tempfile.gettempdir()) / f"cwpo-page-{os.getpid()}"  # of a cluster of ours alone
CLUSTER = ROOT / "cluster" / "local" / "cluster.py"
# What is given in the place of a page's names: its text → ours. {here}: the test's folder.
PLACES = {
    "README.md": {
        "source .venv/bin/activate\n": "",
        "cwpo init run.yaml": "cwpo init new.yaml --data x.jsonl --labels some --annotator model "
        "--policy model --gpus 0",
        "runs/mine": "{here}/run",
    },
    "docs/own-run.md": {"s3://bucket/harmless": "{here}/run", "models/": "models/again-"},
    "docs/annotate.md": {
        "Skywork/Skywork-Reward-V2-Llama-3.1-8B": "reward",
        "max_length=4096": "max_length=400",
        "s3://bucket/sample": "{here}/run",
        "--pairs-per-second L4=40 --price L4=0.80 ": "",
    },
    "docs/compare.md": {"gold.yaml": "run.yaml output_dir={here}/gold"},
    "docs/ask.md": {
        "run.yaml": "ask.yaml",
        "--budget 200": "--budget 10",
        "--budget 50": "--budget 5",
    },
    "docs/tutorials/your-own-pairs.md": {
        "runs/own": "{here}/runs/own",
        "path: pairs.csv": "path: {here}/pairs.csv",
    },
    "docs/tutorials/label-a-million-answers.md": {
        "answers/*.jsonl": "{here}/answers/*.jsonl",
        "reward,": "{here}/reward,",
        "runs/scores": "{here}/runs/scores",
        "250_000": "2_500",
    },
    "docs/tutorials/ask-people.md": {
        "path: ": "path: {here}/",  # the model's, too
        "runs/asked": "{here}/runs/asked",
    },
    "docs/tutorials/first-cluster-job.md": {
        "source .venv/bin/activate\n": "",
        "cwpo_dist/demo/pairs.jsonl": str(DEMO_PAIRS),
        **{
            f"cluster/local/cluster.py {does}": f"{CLUSTER} {does} --state {STATE}"
            for does in ("up", "env", "down")
        },
    },
}


def test_each_block_is_run_or_says_why_not() -> None:
    for block in RUN:
        assert block.note == LONG or re.fullmatch(r"(not run: .{10,})?", block.note), block
    assert sum(not block.note for block in RUN) >= 10
    assert sum(block.note == LONG for block in RUN) >= 6


class Reader:
    """Somebody who does what a page says, in a folder of his own."""

    def __init__(self, page: str, here: Path, *, in_bash: bool = False) -> None:
        """`in_bash`: commands are given to bash, as they are not of `cwpo` alone."""
        self.page, self.here, self.names = page, here, dict[str, Any]()
        self.shell = self.bash if in_bash else self.commands

    def read(self, *notes: str, files: bool = False) -> None:
        """Runs the page's blocks with these notes, in their order; `files`: writes the others."""
        said = ""
        for block in (each for each in BLOCKS if each.page == self.page):
            text = self.placed(block.text)
            if block in RUN and block.note in notes:
                said = self.shell(text) if block.language == "sh" else self.python(text)
            elif files and block.language == "csv":
                (self.here / "pairs.csv").write_text(text)
            elif files and (found := _FILE.match(text)):
                (self.here / found[1]).write_text(text)
            elif files and not block.language:
                assert block.text.strip() in said, said

    def placed(self, text: str) -> str:
        for theirs, ours in PLACES.get(self.page, {}).items():
            text = text.replace(theirs, ours.format(here=self.here))
        return text

    def bash(self, text: str) -> str:
        """Runs a block in bash, with the variables of those before; what it printed."""
        known = self.here / "variables"
        known.touch()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", f"set -eua; . {known}\n{text}\nexport -p > {known}"],
            env=os.environ | {"PATH": path},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{self.page}: {text}\n{done.stdout}"
        return done.stdout

    def commands(self, text: str) -> str:
        """Runs commands of `cwpo` in this process; what they said."""
        said = io.StringIO()
        for line in text.replace("\\\n", " ").splitlines():
            program, *words = shlex.split(line, comments=True)
            assert program == "cwpo", f"{self.page}: {line}: nobody knows how to run it"
            spread = [name for word in words for name in glob(word) or [word]]
            with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
                cli.main(spread)
            assert ended.value.code == 0, f"{self.page}: {line}\n{said.getvalue()}"
        return said.getvalue()

    def python(self, text: str) -> str:
        """Runs Python, with the names of the blocks before; what it printed."""
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(text, self.names)  # noqa: S102 (the page's own)
        return said.getvalue()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which commands are given, on a terminal that breaks no line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_your_own_pairs(here: Path, ray_local: Any) -> None:
    """The page's own file, configuration and outputs."""
    Reader("docs/tutorials/your-own-pairs.md", here).read("", files=True)


def test_add_a_loss(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "OBJECTIVES", dict(objectives.OBJECTIVES))
    Reader("docs/tutorials/add-a-loss.md", here).read("", files=True)
    assert "squared_hinge" in objectives.OBJECTIVES


def test_label_a_million_answers(here: Path, ray_local: Any) -> None:
    """The plan is of ten thousand: its output is not compared."""
    Reader("docs/tutorials/label-a-million-answers.md", here).read("", files=True)


def test_ask_people(here: Path, ray_local: Any) -> None:
    Reader("docs/tutorials/ask-people.md", here).read("", files=True)


def test_the_demo(here: Path, smollm2: Path) -> None:
    """What another setting of the demo makes anew."""
    (here / "cwpo_dist").symlink_to(ROOT / "cwpo_dist")
    (here / "runs" / "models").mkdir(parents=True)
    (here / "runs" / "models" / smollm2.name).symlink_to(smollm2)
    Reader("docs/tutorials/the-demo.md", here).read("", files=True)


@pytest.mark.long
def test_first_cluster_job(here: Path) -> None:
    """A cluster of this machine; what of it is left where a block fails is taken down."""
    try:
        Reader("docs/tutorials/first-cluster-job.md", here, in_bash=True).read("", LONG, files=True)
    finally:
        if STATE.exists():
            subprocess.run([sys.executable, CLUSTER, "down", "--state", STATE], check=True)


def test_texts_and_margins_are_joined_as_data_md_says(here: Path) -> None:
    world = World(here, ["cw"])
    world.score()
    reader = Reader("docs/data.md", here)
    places = {name: world.place(name).root for name in ("prepare", "annotate")}
    reader.names |= places
    reader.read("")
    pairs = reader.names["pairs"].set_index("pair_id").loc
    for k in range(3):
        pair = pairs[f"test-{k}"]
        assert abs(pair["margin"]) == pytest.approx(margin(k))
        assert ("high" in pair["response_a"]) == (pair["margin"] > 0)


def test_a_configuration_is_shown_and_planned(here: Path) -> None:
    write_config(here / "run.yaml", small_config(here))
    Reader("docs/own-run.md", here).read("")


def test_a_model_is_measured(here: Path) -> None:
    save_tiny(here / "reward", "bert")
    pairs = (here / "pairs.jsonl").open("w")
    with pairs:
        for line in DEMO_PAIRS.read_text().splitlines()[:40]:
            pairs.write(line.replace('"prompt"', '"domain": "x", "question"') + "\n")
    Reader("docs/annotate.md", here).read("")
    assert (here / "figures.json").exists()


def write_half_labelled(here: Path) -> None:
    """ask.yaml, in which every other pair lacks its label."""
    rows = [json.loads(line) for line in (here / "pairs.jsonl").read_text().splitlines()]
    rows = [row | {"label": row["label"] if k % 2 else None} for k, row in enumerate(rows)]
    (here / "half.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = small_config(here, str(here / "asked"), prepare__labelled_fraction=1.0)
    given["prepare"]["sources"] = [{"path": str(here / "half.jsonl")}]
    write_config(here / "ask.yaml", given)


@pytest.mark.long
def test_a_run_from_readme_to_what_it_leaves(here: Path, ray_local: Any) -> None:
    """One run directory, in which each page finds what those before it made."""
    source = small_config(here)["prepare"]["sources"][0]["path"]
    write_config(here / "run.yaml", small_config(here))
    pairs = small_config(here, str(here / "sample"))
    del pairs["weak"], pairs["policy"], pairs["sft"]
    save_tiny(here / "reward", "bert")
    pairs["annotate"]["model"] = {"model_name_or_path": str(here / "reward"), "max_length": 400}
    pairs["prepare"]["sources"] = [{"path": source}]
    write_config(here / "pairs.yaml", pairs)
    write_half_labelled(here)
    for page in ("README.md", "docs/own-run.md", "docs/annotate.md", "docs/ask.md"):
        Reader(page, here).read(LONG)
    Reader("docs/compare.md", here).read(LONG)
