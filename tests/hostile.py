"""A command run in this process on what a stranger hands in, and how it must end."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cwpo_dist.cli import app as cli

LIMIT_S = 120  # far beyond what any command here takes: what has not ended then hangs
PAIRS = [{"prompt": f"p{i}", "chosen": "aa", "rejected": "b"} for i in range(50)]
GOOD = "".join(json.dumps(pair) + "\n" for pair in PAIRS)
OK = "output_dir: o\nprepare: {sources: [{path: x}]}\n"
DEEP = "[" * 5000


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    code: Any
    said: str


Run = Callable[..., Ended]


def run_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ended:
    """Runs a command in this process; one that hangs fails the test."""

    def hangs(*_: object) -> None:
        pytest.fail(f"it did not end within {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(LIMIT_S)
    try:
        cli.main(list(map(str, arguments)))
    except SystemExit as ended:
        return Ended(ended.code, "".join(capsys.readouterr()))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    raise AssertionError("a command ends by an exit")


def refused(ended: Ended, *names: str) -> None:
    """Exit code 2, no traceback, and every culprit named."""
    assert ended.code == cli.USER_ERROR, ended.said
    assert "Traceback" not in ended.said
    said = " ".join(ended.said.split())
    assert [name for name in names if name not in said] == [], said


def planned(cwpo: Run, folder: Path, *paths: Path) -> Ended:
    """`cwpo plan` of a run that reads these and aligns the folder's model."""
    model = {"model_name_or_path": str(folder / "model"), "max_length": 100}
    config = {
        "output_dir": str(folder / "out"),
        "arms": ["human"],
        "prepare": {"sources": [{"path": str(path)} for path in paths], "max_reject_fraction": 1.0},
        "policy": model,
        "sft": None,
    }
    file = folder / "run.yaml"
    file.write_text(json.dumps(config))
    return cwpo("plan", file)
