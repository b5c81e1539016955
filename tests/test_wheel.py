"""The wheel that pip makes of a checkout has all that the program reads, and runs elsewhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

from conftest import ROOT

from cwpo_dist import __version__

FOR_THE_FORGE = {"cwpo_dist/demo/README.md", "cwpo_dist/demo/report.png"}


def run(*command: str | Path, cwd: Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "cwpo_dist", tmp_path / "cwpo_dist", ignore=without)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", tmp_path / "dist", ".", cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    ZipFile(wheel).extractall(tmp_path / "installed")
    listed = run("git", "ls-files", "cwpo_dist", cwd=ROOT).split()
    assert {f for f in listed if not (tmp_path / "installed" / f).exists()} == FOR_THE_FORGE
    cwpo, there = (sys.executable, "-m", "cwpo_dist.cli"), tmp_path / "installed"
    assert run(*cwpo, "--version", cwd=there) == f"cwpo_dist {__version__}\n"
    assert run(*cwpo, "config", "--schema", cwd=there) == (ROOT / "docs/schema.json").read_text()
