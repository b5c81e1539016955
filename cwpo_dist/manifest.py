"""What a finished stage says of itself: its last file, whose being there is the commit.

Whoever reads one reads it here, so that a run directory of another version is understood, or
refused, in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from cwpo_dist.canonical import digest
from cwpo_dist.storage import MANIFEST, StorageError, Store


def key_of(form: int, stage: str, settings: Mapping[str, object], inputs: Mapping[str, str]) -> str:
    """The key of an output: 16 hex digits.

    Args:
        form: the number of its stage's format.
        stage: its name.
        settings: what decides it beside its inputs.
        inputs: name → key and retry of the output that is read.
    """
    return digest([form, stage, settings, inputs])


class Manifest(BaseModel):
    """The record of one stage output; what a version before did not write is empty.

    Attributes:
        stage: its name.
        key: the hash of settings and inputs under which the output lies.
        settings: what its key was made of.
        inputs: name → the output that was read, `stage/content`.
        counts: what was read, made and set aside; the names are the stage's own.
        seconds: that the command took which finished it, wall clock.
        versions: of the packages, by name.
        device: the kinds of accelerator in the cluster, or the CPU's architecture.
        device_hours: GPU-hours (CPU-hours without GPUs) of all commands that worked on it.
    """

    model_config = ConfigDict(frozen=True)

    stage: str = ""
    key: str = ""
    settings: Mapping[str, Any] = {}
    inputs: Mapping[str, str] = {}
    counts: Mapping[str, Any] = {}
    seconds: float = 0.0
    versions: Mapping[str, str] = {}
    device: str = ""
    device_hours: float | None = None

    @classmethod
    def read(cls, output: Store, name: str = MANIFEST) -> Self:
        """That of an output.

        Raises:
            FileMissing: for an output that is not finished.
            StorageError: for a file that is empty or torn, or holds something else.
        """
        found = output.read_json(name)
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the whole file"
            raise StorageError(
                f"{output.path(name)!r} is not what cwpo_dist writes ({field}: {first['msg']}); "
                "remove it, then run the same command again: what it stood for is made again"
            ) from error

    def has_format(self, form: int) -> bool:
        """Whether the key is one of this format: else another version of cwpo_dist made it."""
        inputs = {name: path.partition("/")[2] for name, path in self.inputs.items()}
        return self.key == key_of(form, self.stage, self.settings, inputs)

    def write(self, output: Store, name: str = MANIFEST) -> None:
        """Commits an output."""
        output.create_json(name, dict(self))
