"""A built wheel in; beside it, what it was built from and how, as an in-toto statement, out."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def statement(wheel: Path, command: str) -> dict[str, Any]:
    """SLSA's provenance, version 1, of one wheel.

    Args:
        wheel: the built file.
        command: what built it, to be given again in a checkout of the same commit.
    """
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": wheel.name, "digest": {"sha256": _sha256(wheel)}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "https://packaging.python.org/en/latest/specifications/",
                "externalParameters": {"command": command, "uncommittedChanges": bool(changed)},
                "internalParameters": {
                    "python": platform.python_version(),
                    **{name: metadata.version(name) for name in ("setuptools", "wheel")},
                },
                "resolvedDependencies": [
                    {"name": "source", "digest": {"gitCommit": commit}},
                    *(
                        {"name": path.as_posix(), "digest": {"sha256": _sha256(path)}}
                        for path in sorted(Path("release").glob("*.txt"))
                    ),
                ],
            },
            "runDetails": {"builder": {"id": "make release"}},
        },
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main(folder: str, command: str) -> None:
    """Writes `<wheel>.provenance.json` of the one wheel in a folder."""
    (wheel,) = Path(folder).glob("*.whl")
    out = wheel.with_name(f"{wheel.name}.provenance.json")
    out.write_text(f"{json.dumps(statement(wheel, command), indent=1)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
