"""A run directory and an arm in; a copy of the arm's Hugging Face folder, with its card, out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cwpo_dist.config import Config
from cwpo_dist.report.card import model_card
from cwpo_dist.storage import MANIFEST, Store


class ExportError(ValueError):
    """There is nothing to export, or no room for it; the message says what to do."""


def export(run: str, arm: str | None, to: str, adapter: bool = False) -> str:
    """Copies the aligned model of an arm, and writes its model card (README.md) beside it.

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
    chosen = _arm(root, arm)
    stages = root.read_json(f"arms/{chosen}/stages.json")
    aligned = root.child("align", stages["align"]["key"])
    if not aligned.exists(MANIFEST):
        raise ExportError(f"{aligned.uri} is not finished; give `cwpo run` its config again")
    part = aligned.child("adapter" if adapter else "model")
    if adapter and not part.filesystem.exists(part.root):
        raise ExportError(f"--adapter: {aligned.uri} was trained in full and has no adapter")
    with _on_this_disk(part) as folder:
        target.upload(folder)
    card = model_card(
        Config.model_validate(root.read_json(f"arms/{chosen}/config.json")),
        chosen,
        {role: stage["key"] for role, stage in stages.items()},
        root.read_json(f"arms/{chosen}/metrics.json") | _versions(aligned),
        adapter=adapter,
    )
    target.write("README.md", card.encode())
    return to


def _versions(aligned: Store) -> dict[str, Any]:
    """What the model was made with."""
    return {"versions": aligned.read_json(MANIFEST).get("versions", {})}


def _arm(root: Store, arm: str | None) -> str:
    """The arm that is asked for, or the only one."""
    names = root.names("arms") if root.filesystem.exists(root.path("arms")) else []
    arms = sorted(name.split("/")[1] for name in names if name.endswith("/stages.json"))
    if not arms:
        raise ExportError(f"{root.uri!r} has no finished arm; is it a run directory (output_dir)?")
    if arm is None and len(arms) > 1:
        raise ExportError(f"--arm: {root.uri!r} has several; choose from {', '.join(arms)}")
    chosen = arm or arms[0]
    if chosen not in arms:
        raise ExportError(f"--arm: no {chosen!r} in {root.uri!r}; choose from {', '.join(arms)}")
    return chosen


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
