"""A run directory and an arm in; a copy of the arm's aligned Hugging Face folder out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cwpo_dist.storage import MANIFEST, Store


class ExportError(ValueError):
    """There is nothing to export, or no room for it; the message says what to do."""


def export(run: str, arm: str | None, to: str, adapter: bool = False) -> str:
    """Copies the aligned model of an arm.

    Args:
        run: the run directory, a path or a URI.
        arm: which arm; None when the run has one.
        to: where the copy goes, a path or a URI; must be new or empty.
        adapter: the LoRA adapter alone, instead of the model it is merged into.

    Returns:
        `to`.

    Raises:
        ExportError: when the run has no such arm, the arm is not aligned yet, or `to` holds files.
    """
    target = Store(to)
    if target.filesystem.exists(target.root) and target.names():
        raise ExportError(f"--to: {to!r} is not empty; name a new folder")
    root = Store(run)
    aligned = root.child(_aligned(root, arm))
    if not aligned.exists(MANIFEST):
        raise ExportError(f"{aligned.uri} is not finished; give `cwpo run` its config again")
    part = aligned.child("adapter" if adapter else "model")
    if adapter and not part.filesystem.exists(part.root):
        raise ExportError(f"--adapter: {aligned.uri} was trained in full and has no adapter")
    with _on_this_disk(part) as folder:
        target.upload(folder)
    return to


def _aligned(root: Store, arm: str | None) -> str:
    """The folder of the arm's `align` output, relative to the run directory."""
    names = root.names("arms") if root.filesystem.exists(root.path("arms")) else []
    arms = sorted(name.split("/")[1] for name in names if name.endswith("/stages.json"))
    if not arms:
        raise ExportError(f"{root.uri!r} has no finished arm; is it a run directory (output_dir)?")
    if arm is None and len(arms) > 1:
        raise ExportError(f"--arm: {root.uri!r} has several; choose from {', '.join(arms)}")
    chosen = arm or arms[0]
    if chosen not in arms:
        raise ExportError(f"--arm: no {chosen!r} in {root.uri!r}; choose from {', '.join(arms)}")
    stages = root.read_json(f"arms/{chosen}/stages.json")
    return f"align/{stages['align']['key']}"


@contextmanager
def _on_this_disk(model: Store) -> Iterator[Path]:
    """The model's folder as a local one, for as long as the copy takes."""
    if model.is_local:
        yield Path(model.root)
        return
    with tempfile.TemporaryDirectory(prefix="cwpo-export-") as folder:
        for name in model.names():
            local = Path(folder) / name
            local.parent.mkdir(parents=True, exist_ok=True)
            model.filesystem.get_file(model.path(name), str(local))
        yield Path(folder)
