"""An engine's state out to a stage's folder and back in, at any world size and ZeRO stage.

A checkpoint is the trainable parameters in fp32 and each optimizer state, every tensor whole, as
safetensors, and `state.json`. With LoRA that is the adapter and its moments. It says nothing of
ranks or shards, so it resumes at another world size or stage, with the same data order.

`checkpoints/step-000012-<attempt>/` is written file by file; `commit.json` comes last and lists
them, so a folder that lacks it, or a file it lists, never counts; and no two attempts ever write
into one folder.

Each tensor is gathered whole on all ranks in turn, and rank 0 holds one copy of all parameters (4
bytes each) while it writes. That is right for adapters and models of a few billion parameters;
full fine-tuning of larger ones wants sharded checkpoints, which are not here yet.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cwpo_dist.storage import StorageError, Store, to_json
from cwpo_dist.training.lease import LeaseLost
from cwpo_dist.training.loop import Engine

FOLDER = "checkpoints"
COMMIT = "commit.json"
STATE = "state.json"
PARAMETERS = "parameters"
_NAME = re.compile(r"step-(\d+)-\w+")


class CheckpointError(ValueError):
    """A checkpoint of another run; the message says what differs, and the remedy."""


class CommitFailed(RuntimeError):
    """Rank 0 could not commit; raised on the other ranks, so that none trains on alone."""


@dataclass(frozen=True)
class RunIdentity:
    """What must be equal for a run to be continued.

    Attributes:
        key: of the stage: it hashes all settings and inputs that decide the outcome.
        seed: of order and dropout.
        base: what identifies the model that training started from.
    """

    key: str
    seed: int
    base: str


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        store: its folder.
        step: optimizer steps done.
    """

    store: Store
    step: int

    def tensors(self, name: str) -> _Tensors:
        """One file of tensors: 'parameters' or an optimizer state."""
        return _Tensors(self.store, _file(name))


def newest(stage: Store) -> Checkpoint | None:
    """The committed checkpoint with the most steps; of equals, the first by name."""
    committed = _committed(stage)
    return committed[0] if committed else None


def save(
    stage: Store,
    engine: Engine,
    identity: RunIdentity,
    step: int,
    attempt: str,
    *,
    keep: int,
    fence: Callable[[], None],
) -> None:
    """Commits a checkpoint; called on all ranks, written by rank 0.

    Args:
        stage: the stage's folder.
        engine: whose state is saved.
        identity: of the run.
        step: optimizer steps done.
        attempt: letters and digits, another for each start of the worker group.
        keep: older committed checkpoints beyond so many are removed, and whatever other attempts
            left unfinished.
        fence: called right before the commit; raises where this process may no longer commit.
    """
    folder = stage.child(FOLDER, f"step-{step:06d}-{attempt}")
    failure: Exception | None = None
    for name, key in _files(engine):
        whole = _gather(engine, key)  # by all ranks, also after a failure of rank 0
        if engine.rank == 0 and failure is None:
            failure = _failure_of(_write, folder, name, whole)
    if engine.rank == 0 and failure is None:
        record = {"step": step, "files": [STATE, *(_file(name) for name, _ in _files(engine))]}
        state = to_json({"step": step, **asdict(identity)})
        failure = _failure_of(folder.write, STATE, state)
        failure = failure or _failure_of(fence) or _failure_of(folder.create_json, COMMIT, record)
    failed = engine.total(torch.tensor([float(failure is not None)], dtype=torch.float64))
    if failure is not None:
        raise failure
    if failed:
        raise CommitFailed(f"rank 0 could not commit the checkpoint of step {step}")
    if engine.rank == 0:
        _tidy(stage, keep)


def load(checkpoint: Checkpoint, engine: Engine, identity: RunIdentity) -> None:
    """Restores an engine; called on all ranks.

    Raises:
        CheckpointError: when the checkpoint belongs to another run.
    """
    _check(checkpoint, identity)
    engine.start_at(checkpoint.step)
    for name, key in _files(engine):
        with checkpoint.tensors(name).opened() as tensors:
            for parameter_name, parameter in trainable(engine.module):
                engine.assign(parameter, key, tensors.get_tensor(parameter_name))


def trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that training changes, in the module's order."""
    return ((n, p) for n, p in module.named_parameters() if p.requires_grad)


@dataclass(frozen=True)
class _Tensors:
    """A safetensors file in a store."""

    store: Store
    name: str

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """Reads tensor by tensor; a remote file is copied to this node for the while."""
        if self.store.is_local:
            with safe_open(self.store.path(self.name), framework="pt") as tensors:
                yield tensors
            return
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / self.name
            self.store.filesystem.get_file(self.store.path(self.name), str(local))
            with safe_open(local, framework="pt") as tensors:
                yield tensors


def _gather(engine: Engine, key: str | None) -> dict[str, Tensor]:
    """All trainable parameters, or one state of each; kept on rank 0 alone."""
    whole = {}
    for name, parameter in trainable(engine.module):
        value = engine.full(parameter, key)
        if engine.rank == 0:
            # A copy: DeepSpeed's may be a view of a larger buffer, torch's the live weight.
            whole[name] = value.to("cpu", torch.float32, copy=True).contiguous()
    return whole


def _files(engine: Engine) -> list[tuple[str, str | None]]:
    """Each file's name and the key of the state in it."""
    return [(PARAMETERS, None), *((key, key) for key in engine.state_keys)]


def _file(name: str) -> str:
    return f"{name}.safetensors"


def _failure_of(act: Callable[..., object], *arguments: object) -> Exception | None:
    """What went wrong, kept until all ranks can hear of it."""
    try:
        act(*arguments)
    except (OSError, LeaseLost) as error:
        return error
    return None


def _write(folder: Store, name: str, tensors: dict[str, Tensor]) -> None:
    if folder.is_local:  # in place: nobody reads the folder before its commit
        Path(folder.root).mkdir(parents=True, exist_ok=True)
        _save(tensors, Path(folder.path(_file(name))))
        return
    with tempfile.TemporaryDirectory(prefix="cwpo-checkpoint-") as scratch:
        _save(tensors, Path(scratch) / name)
        folder.copy_in(Path(scratch) / name, _file(name))


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"checkpoint: cannot write {path}: {error}. The checkpoint before stays; free space, "
            "then run the same command again"
        ) from error


def _check(checkpoint: Checkpoint, identity: RunIdentity) -> None:
    held = checkpoint.store.read_json(STATE)
    for name, value in asdict(identity).items():
        if held[name] != value:
            raise CheckpointError(
                f"{checkpoint.store.uri}: its {name} is {held[name]!r}, this run's is {value!r}; "
                "use another output_dir, or remove the checkpoints"
            )


def _committed(stage: Store) -> list[Checkpoint]:
    """Newest first; of equal steps, the first by name."""
    names = set(stage.names(FOLDER))
    found = []
    for folder in sorted({name.split("/")[1] for name in names}):
        match = _NAME.fullmatch(folder)
        store = stage.child(FOLDER, folder)
        if match and f"{FOLDER}/{folder}/{COMMIT}" in names:
            listed = store.read_json(COMMIT)["files"]
            if all(f"{FOLDER}/{folder}/{file}" in names for file in listed):
                found.append(Checkpoint(store, int(match[1])))
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def _tidy(stage: Store, keep: int) -> None:
    """Removes what is no longer needed; the commit first, so that no half ever counts."""
    kept = {checkpoint.store.uri for checkpoint in _committed(stage)[:keep]}
    for folder in sorted({name.split("/")[1] for name in stage.names(FOLDER)}):
        store = stage.child(FOLDER, folder)
        if store.uri not in kept:
            store.remove(COMMIT)
            store.remove()
