"""A model's name in; what it is known by on another machine, out: a hub id and commit, or digests.

Where somebody's files lie is nobody's business, and means nothing elsewhere: of a folder there
remain the last part of its path and the digests of its weights.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cwpo_dist.config import ModelConfig
from cwpo_dist.file_marks import Mark
from cwpo_dist.hub_names import is_hub_id

# A model in the hub's own cache on this machine: …/models--owner--name/snapshots/COMMIT
_CACHED = re.compile(r".*/models--(?:([^/]+)--)?([^/]+)/snapshots/([0-9a-f]{40})/?")


@dataclass(frozen=True)
class Identity:
    """What a model is known by.

    Attributes:
        name: a hub id, or the last part of a path or URI.
        on_hub: whether it is a hub id.
        revision: the commit of a hub model; None where it is not known.
        sha256: of each safetensors file of a folder, as the hub shows them; empty for hub models.
    """

    name: str
    on_hub: bool
    revision: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """What an adapter calls it: `./name` of a folder, so that no hub model is taken for it."""
        return self.name if self.on_hub else f"./{self.name}"


def identify(model: ModelConfig, fingerprint: list[Mark] | None = None) -> Identity:
    """What a model is known by, without the digests of its files.

    Args:
        model: as it was given.
        fingerprint: by `model_fingerprint`, where the model was loaded; None: the name alone says
            whether it is a hub id, which a relative path may look like.
    """
    name = model.model_name_or_path
    if cached := _CACHED.fullmatch(name):
        owner, short, commit = cached.groups()
        return Identity(f"{owner}/{short}" if owner else short, True, commit)
    if fingerprint is None:
        return Identity(public_name(name), hub_id(name) is not None, model.revision)
    if len(fingerprint) == 1 and len(fingerprint[0]) == 2:  # [[id, commit]]
        hub, commit = fingerprint[0]
        return Identity(str(hub), True, str(commit))
    return Identity(_last_part(name), False)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each safetensors file of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def hub_id(name: str) -> str | None:
    """The name, where it is a hub's `owner/name`.

    One without an owner is as likely the name of a folder that this machine cannot see.
    """
    return name if "/" in name and is_hub_id(name) else None


def public_name(name: str) -> str:
    """A hub id whole; of a path or URI its last part."""
    return hub_id(name) or _last_part(name)


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]
