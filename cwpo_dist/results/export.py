"""A run directory and an arm in; a copy of its policy, adapter or annotator, with its card, out.

An adapter is of use with the model below it alone, so what lies between it and the policy as it was
given comes with it: the adapter of SFT is stacked into it, or SFT's model lies beside it.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError

from cwpo_dist.config import Config, ConfigError, ModelConfig
from cwpo_dist.config.load import parse_config
from cwpo_dist.lm.identity import Identity, identify
from cwpo_dist.manifest import Manifest
from cwpo_dist.node_disk import upload
from cwpo_dist.report.card import BESIDE, Figures, annotator_card, model_card
from cwpo_dist.runs.model_checks import annotator_fault
from cwpo_dist.signing import check_can_sign, sign, write_digests
from cwpo_dist.storage import MANIFEST, Store
from cwpo_dist.storage_faults import is_full
from cwpo_dist.training.lora import ADAPTER_CONFIG
from cwpo_dist.training.saving import ADAPTER, BASE, MODEL
from cwpo_dist.training.stacked_adapters import StackError, stack_adapters

logger = logging.getLogger(__name__)


class ExportError(ValueError):
    """There is nothing to export, or no room for it; the message says what to do."""


def export(
    run: str,
    arm: str | None,
    to: str,
    adapter: bool = False,
    annotator: str | None = None,
    base: str | None = None,
    private_key: Path | None = None,
) -> str:
    """Copies the aligned model of an arm, with its model card (README.md) and digests.json.

    Args:
        run: the run directory, a path or a URI.
        arm: which arm; None when the run has one.
        to: where the copy goes, a path or a URI; must be new or empty.
        adapter: the LoRA adapter alone, instead of the model it is merged into.
        annotator: the role of an annotator that `fit` made, to be copied instead of the policy.
        base: what the adapter names as its base, a hub id; None: what the run knows it by.
        private_key: signs the folder; None: it goes unsigned.

    Returns:
        `to`.

    Raises:
        ExportError: when the run has no such arm, annotator or adapter, the stage is not finished,
            `to` holds files, or there is no room for it.
        SigningError: when it cannot be signed.
    """
    if base is not None and not adapter:
        raise ExportError("--base: names the model below an adapter; give --adapter too")
    if annotator is not None and adapter:
        raise ExportError("--adapter: of the policy alone; an annotator is exported merged")
    with new_folder(to, private_key) as target:
        source = FinishedArm.of(Store(run), arm)
        figures = source.root.read_json(f"arms/{source.name}/metrics.json")
        if annotator is None:
            card = _policy(source, figures, target, base, adapter=adapter)
        else:
            card = _annotator(source, annotator, figures, target)
        target.write("README.md", card.encode())
    return to


@contextmanager
def new_folder(to: str, private_key: Path | None) -> Iterator[Store]:
    """An empty folder to be filled; then its digests are written, and it is signed.

    Raises:
        ExportError: when it holds files, or there is no room for more.
        SigningError: when it cannot be signed.
    """
    target = Store(to)
    if target.is_local and Path(target.root).is_file():
        raise ExportError(f"--to: {to!r} is a file; name a new folder")
    target.sweep()  # what an export left that was killed
    if target.names():
        raise ExportError(f"--to: {to!r} is not empty; name a new folder")
    if private_key is not None:
        check_can_sign(target, private_key)
    with _room(target):
        yield target
        write_digests(target)
        if private_key is not None:
            sign(target, private_key)


@dataclass(frozen=True)
class FinishedArm:
    """One arm of a run: its configuration, and what its stages.json says of each role."""

    root: Store
    name: str
    config: Config
    stages: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, root: Store, arm: str | None) -> FinishedArm:
        """The arm that is asked for, or the run's only one.

        Raises:
            ExportError: where there is no such arm, or one of another version.
        """
        name = _chosen(root, arm)
        return cls(root, name, _config(root, name), root.read_json(f"arms/{name}/stages.json"))

    @property
    def keys(self) -> dict[str, str]:
        """Those of its outputs, by role."""
        return {role: stage["key"] for role, stage in self.stages.items()}

    def finished(self, role: str, stage: str) -> Store:
        """The output of a role.

        Raises:
            ExportError: where it is not done.
        """
        place = self.root.child(stage, self.stages[role]["key"])
        if not place.exists(MANIFEST):
            raise ExportError(f"{place.uri} is not finished; give `cwpo run` its config again")
        return place

    @property
    def align(self) -> Store:
        """The output with the aligned model."""
        return self.finished("align", "align")

    @property
    def sft(self) -> Store | None:
        """The stage between the policy as it was given and `align`."""
        return self.finished("sft", "sft") if "sft" in self.stages else None

    @property
    def policy(self) -> ModelConfig:
        """As it was given."""
        assert self.config.policy is not None, "an aligned arm has a policy"
        return self.config.policy

    @property
    def base(self) -> Identity:
        """What the policy as it was given is known by."""
        first = self.sft or self.align
        if first.exists(BASE):
            return Identity(**first.read_json(BASE))
        return identify(self.policy, Manifest.read(first).settings.get("model_now"))


def _policy(
    source: FinishedArm, figures: Figures, target: Store, base: str | None, adapter: bool
) -> str:
    """Copies the aligned model or its adapter; the card."""
    below = shipped = None
    if adapter:
        below, shipped = _copy_adapter(source, target, base)
    else:
        copy_all(source.align.child(MODEL), target)
    return model_card(
        source.config,
        source.name,
        source.keys,
        {**figures, "versions": Manifest.read(source.align).versions},
        source.base,
        below,
        shipped=shipped is not None,
    )


def _annotator(source: FinishedArm, role: str, figures: Figures, target: Store) -> str:
    """Copies an annotator that `fit` made; its card."""
    fits = [name for name, stage in source.stages.items() if stage["stage"] == "fit"]
    if role not in fits:
        known = f"choose from {', '.join(fits)}" if fits else "it was given, or none was needed"
        raise ExportError(f"--annotator: the arm has no {role!r} made by `fit`; {known}")
    fit = source.finished(role, "fit")
    made, read = Manifest.read(fit), {name: source.keys[name] for name in ("prepare", role)}
    if fault := annotator_fault(fit):
        raise ExportError(f"--annotator: {fit.uri}: {fault}")
    copy_all(fit.child(MODEL), target)
    return annotator_card(source.config, read, _alone(figures["annotator"], made), made)


def _alone(figures: Figures | None, made: Manifest) -> Figures:
    """Of an ensemble's figures those of the one annotator, which goes by its seed."""
    members, name = (figures or {}).get("members"), f"seed {made.settings['seed']}"
    if members is None or all(member["name"].startswith(f"{name}, head") for member in members):
        return figures or {}  # those of its heads are its own
    return next((member for member in members if member["name"] == name), {})


def _copy_adapter(
    source: FinishedArm, target: Store, base: str | None
) -> tuple[Identity, Store | None]:
    """The adapter, with SFT's model where it needs that; what it calls its base, and that model."""
    part = source.align.child(ADAPTER)
    if not part.names():
        raise ExportError(
            f"--adapter: {source.align.uri} was trained in full and has no adapter; export the "
            "model without --adapter"
        )
    with tempfile.TemporaryDirectory(prefix="cwpo-export-") as temporary:
        folder = Path(temporary)
        _fetch(part, folder)
        why = _not_on_policy(source, folder)
        shipped = None if why is None else source.sft
        if why is not None and shipped is None:
            raise ExportError(f"--adapter: {why}; export the model without --adapter")
        known = source.base if shipped is None else Identity(BESIDE, on_hub=False)
        if base is not None:
            known = replace(known, name=base, on_hub=True, revision=None)
        names = {"base_model_name_or_path": known.reference, "revision": known.revision}
        settings = json.loads((folder / ADAPTER_CONFIG).read_text()) | names
        (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True))
        upload(folder, target)
    if shipped is not None:
        logger.info("the adapter comes with its base, in %s/: %s", BESIDE, why)
        copy_all(shipped.child(MODEL), target.child(BESIDE))
    return known, shipped


def _not_on_policy(source: FinishedArm, folder: Path) -> str | None:
    """Makes the adapter one on the policy as it was given, or says why it cannot be that."""
    if source.policy.num_hidden_layers is not None:
        return f"the policy is the first {source.policy.num_hidden_layers} layers of its model"
    if source.sft is None:
        return None
    first = source.sft.child(ADAPTER)
    if not first.names():
        return "SFT trained all weights of the policy"
    with tempfile.TemporaryDirectory(prefix="cwpo-export-") as temporary:
        _fetch(first, Path(temporary))
        try:
            stack_adapters(Path(temporary), folder, folder)
        except StackError as error:
            return f"its adapter and that of SFT cannot be made one ({error})"
    return None


def copy_all(source: Store, target: Store) -> None:
    """Copies all files, one after the other, so that no disk needs room for a second copy."""
    for name in source.names():
        if source.is_local:
            target.copy_in(Path(source.path(name)), name)
            continue
        with tempfile.TemporaryDirectory(prefix="cwpo-export-") as temporary:
            file = Path(temporary) / "file"
            source.fetch(name, file)
            target.copy_in(file, name)


def _fetch(source: Store, folder: Path) -> None:
    """Copies all files into a local folder."""
    for name in source.names():
        source.fetch(name, folder / name)


@contextmanager
def _room(target: Store) -> Iterator[None]:
    """Says where a disk is full, and removes what was copied: the command can be repeated."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_full(error):
            raise
        for name in target.names():
            target.remove(name)
        raise ExportError(
            f"--to: no room for the export ({error.__cause__ or error}): free some in {target.uri} "
            f"and in {tempfile.gettempdir()} (TMPDIR), or name other disks, and give the command "
            "again"
        ) from error


def _config(root: Store, arm: str) -> Config:
    """That with which an arm was made."""
    name = f"arms/{arm}/config.json"
    try:
        return parse_config(root.read_json(name))
    except ConfigError as error:
        raise ExportError(
            f"{root.path(name)!r} is not a configuration of this version of cwpo_dist ({error}); "
            "export with the version that wrote it, or run its configuration with this one"
        ) from error


def _chosen(root: Store, arm: str | None) -> str:
    """The arm that is asked for, or the only one."""
    found = (name.split("/") for name in root.names("arms"))
    arms = sorted(arm for _, arm, *rest in found if rest == ["stages.json"])
    if not arms:
        raise ExportError(f"{root.uri!r} has no finished arm; is it a run directory (output_dir)?")
    if arm is None and len(arms) > 1:
        raise ExportError(f"--arm: {root.uri!r} has several; choose from {', '.join(arms)}")
    chosen = arm or arms[0]
    if chosen not in arms:
        raise ExportError(f"--arm: no {chosen!r} in {root.uri!r}; choose from {', '.join(arms)}")
    return chosen
