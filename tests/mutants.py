"""A list of one-line edits in; each made in a copy of the tree, and the test that must notice it.

`make mutants`. An edit is found by its text, not by its place, so that it survives moves; one whose
text is gone, or appears twice, fails the check, as does one that no test notices or that keeps the
program from being imported. Those that change nothing that anyone could see say why (`harmless`),
and must survive.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("mutants.yaml")
COPIED = ("cwpo_dist", "tests", "jobs", "cluster", "pyproject.toml", "README.md")
KINDS = ("direction", "split", "weight", "key", "seed", "loss")
TIMEOUT_S = 900
PASSED, FAILED = 0, 1  # pytest's own exit codes; others mean that it could not run the test


class Mutant(BaseModel):
    """One edit.

    Attributes:
        kind: what it would spoil.
        file: below `cwpo_dist/`.
        find: text that stands there exactly once.
        replace: what is put in its place.
        test: file and function, below `tests/`, that must fail with it.
        harmless: why no test can notice it; `test` must then pass.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["direction", "split", "weight", "key", "seed", "loss"]
    file: str
    find: str
    replace: str
    test: str
    harmless: str | None = None

    @model_validator(mode="after")
    def _differs(self) -> Mutant:
        if self.find == self.replace:
            raise ValueError(f"{self.file}: {self.find!r} is replaced by itself")
        return self

    @property
    def name(self) -> str:
        """How it is called in the table."""
        return f"{self.kind:9} {self.file}: {' '.join(self.find.split())[:60]}"


def listed() -> list[Mutant]:
    """All of them, in the order of the file."""
    return [Mutant.model_validate(entry) for entry in yaml.safe_load(LIST.read_text())]


def stray(mutants: list[Mutant], root: Path = ROOT) -> Iterator[str]:
    """One line for each whose text does not stand exactly once, or whose test is gone."""
    for mutant in mutants:
        times = (root / "cwpo_dist" / mutant.file).read_text().count(mutant.find)
        if times != 1:
            yield f"{mutant.name}: its text stands {times} times in the file; write it anew"
        file, _, function = mutant.test.partition("::")
        if f"def {function}(" not in (root / "tests" / file).read_text():
            yield f"{mutant.name}: there is no test {mutant.test}"


def verdict(mutant: Mutant, tree: Path) -> str:
    """`killed`, `harmless`, or what is wrong."""
    with edited(tree / "cwpo_dist" / mutant.file, mutant):
        code = outcome(mutant.test, tree)
    if code not in (PASSED, FAILED):
        return f"BROKEN: pytest ended with {code}, so the test did not run"
    if mutant.harmless is None:
        return "killed" if code == FAILED else "SURVIVED"
    return "harmless" if code == PASSED else "KILLED, though it is listed as harmless"


@contextmanager
def edited(file: Path, mutant: Mutant) -> Iterator[None]:
    """The edit, while it lasts."""
    before = file.read_text()
    file.write_text(before.replace(mutant.find, mutant.replace))
    try:
        yield
    finally:
        file.write_text(before)


def outcome(test: str, tree: Path) -> int:
    """Pytest's exit code; a test that hangs counts as failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/{test}"]
    # No compiled files: two edits within a second leave files of one age and size.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return FAILED
    return done.returncode


def copied(place: Path) -> Path:
    """A tree in which edits harm nobody."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, place / name)
    return place


def main() -> int:
    """Runs all, or those that `--only` names, and prints the table; 1 where one is not as said."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", default="", help="those whose file, test or kind contains this")
    options.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = options.parse_args()
    mutants = listed()
    wrong = list(stray(mutants))
    chosen = [m for m in mutants if given.only in f"{m.kind} {m.file} {m.test}"]
    with tempfile.TemporaryDirectory(prefix="cwpo-mutants-") as folder:
        trees: Queue[Path] = Queue()
        for number in range(given.jobs):
            (place := Path(folder, str(number))).mkdir()
            trees.put(copied(place))

        def judged(mutant: Mutant) -> str:
            tree = trees.get()
            try:
                return verdict(mutant, tree)
            finally:
                trees.put(tree)

        def clean(test: str) -> tuple[str, int]:
            tree = trees.get()
            try:
                return test, outcome(test, tree)
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(given.jobs) as pool:
            tests = dict.fromkeys(mutant.test for mutant in chosen)
            failing = [test for test, code in pool.map(clean, tests) if code != PASSED]
            wrong += [f"{test} does not pass without any edit" for test in failing]
            for mutant, found in zip(chosen, pool.map(judged, chosen), strict=True):
                print(f"{found:9} {mutant.name}  [{mutant.test}]", flush=True)
                if mutant.harmless is not None:
                    print(f"          because {mutant.harmless}")
                if found not in ("killed", "harmless"):
                    wrong.append(f"{mutant.name}: {found}")
    print("\n".join(["", *wrong, f"{len(chosen)} edits, {len(wrong)} not as they should be"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
