"""A run directory and an arm in; a copy of its policy or annotator, with its card, out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cwpo_dist.config import Config
from cwpo_dist.report.card import annotator_card, model_card
from cwpo_dist.storage import MANIFEST, Store


class ExportError(ValueError):
    """There is nothing to export, or no room for it; the message says what to do."""


def export(
    run: str, arm: str | None, to: str, adapter: bool = False, annotator: str | None = None
) -> str:
    """Copies the aligned model of an arm, and writes its model card (README.md) beside it.

    Args:
        run: the run directory, a path or a URI.
        arm: which arm; None when the run has one.
        to: where the copy goes, a path or a URI; must be new or empty.
        adapter: the LoRA adapter alone, instead of the model it is merged into.
        annotator: the role of an annotator that `fit` made, to be copied instead of the policy.

    Returns:
        `to`.

    Raises:
        ExportError: when the run has no such arm or annotator, the stage is not finished, or `to`
            holds files.
    """
    target = Store(to)
    if target.filesystem.exists(target.root) and target.names():
        raise ExportError(f"--to: {to!r} is not empty; name a new folder")
    root = Store(run)
    chosen = _arm(root, arm)
    stages = root.read_json(f"arms/{chosen}/stages.json")
    trained = _trained(root, stages, annotator)
    part = trained.child("adapter" if adapter else "model")
    if adapter and not part.filesystem.exists(part.root):
        raise ExportError(f"--adapter: {trained.uri} was trained in full and has no adapter")
    with _on_this_disk(part) as folder:
        target.upload(folder)
    card = _card(root, chosen, stages, trained.read_json(MANIFEST), annotator, adapter=adapter)
    target.write("README.md", card.encode())
    return to


def _trained(root: Store, stages: dict[str, Any], annotator: str | None) -> Store:
    """The finished output of `align`, or of the `fit` of that role."""
    fits = [role for role, stage in stages.items() if stage["stage"] == "fit"]
    if annotator is not None and annotator not in fits:
        known = f"choose from {', '.join(fits)}" if fits else "it was given, or none was needed"
        raise ExportError(f"--annotator: the arm has no {annotator!r} made by `fit`; {known}")
    found = stages[annotator or "align"]
    trained = root.child(found["stage"], found["key"])
    if not trained.exists(MANIFEST):
        raise ExportError(f"{trained.uri} is not finished; give `cwpo run` its config again")
    return trained


def _card(
    root: Store,
    arm: str,
    stages: dict[str, Any],
    made: dict[str, Any],
    annotator: str | None,
    *,
    adapter: bool,
) -> str:
    """The card of what is exported; `made` is its manifest."""
    config = Config.model_validate(root.read_json(f"arms/{arm}/config.json"))
    metrics = root.read_json(f"arms/{arm}/metrics.json")
    keys = {role: stage["key"] for role, stage in stages.items()}
    if annotator is None:
        figures = metrics | {"versions": made.get("versions", {})}
        return model_card(config, arm, keys, figures, adapter=adapter)
    read = {role: keys[role] for role in ("prepare", annotator)}
    return annotator_card(config, read, _alone(metrics["annotator"], made), made)


def _alone(figures: dict[str, Any] | None, made: dict[str, Any]) -> dict[str, Any]:
    """Of an ensemble's figures those of the one annotator, which goes by its seed."""
    members = (figures or {}).get("members")
    if members is None:
        return figures or {}
    name = f"seed {made['settings']['seed']}"
    return next((member for member in members if member["name"] == name), {})


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
