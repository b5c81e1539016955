"""Names in, files of them; and what the finder of files says of a path, by their names, out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prepared import row, write

from cwpo_dist.config import Source
from cwpo_dist.pairs.locate import Found, find


def make(folder: Path, *names: str) -> Path:
    """A folder of files, a row each that says the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, [row(name)])
    return folder


def found(path: Any, **settings: Any) -> Found:
    return find("prepare.sources.0", Source(path=str(path), **settings))


def names(of: Found, folder: Path) -> list[str]:
    return [Path(part.uri).relative_to(folder).as_posix() for part in of.parts]


def why(of: Found) -> dict[str, str]:
    return {each.file: each.why for each in of.left_out}
