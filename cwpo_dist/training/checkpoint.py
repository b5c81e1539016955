"""An engine's state out to a stage's folder and back in, at any world size and ZeRO stage.

A checkpoint is the trainable parameters in fp32 and each optimizer state, each rank's share of them
in a file of its own (see shards.py). With LoRA that is the adapter and its moments. No rank ever
gathers what others hold, and none reads what it does not keep: numbers are found by their parameter
and place in it, so another world size or ZeRO stage needs no conversion, and parameter groups are
made from the config as in any start.

`checkpoints/step-000012-<attempt>/` is written by all ranks at once, beside training, from a copy
in host memory. When all files are on storage, rank 0 writes `commit.json`, which lists them, beside
what the loss has learned: a folder that lacks it, or a file it lists, never counts; and no two
attempts write into one folder.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import nn

from cwpo_dist.redaction import redacted
from cwpo_dist.storage import Store
from cwpo_dist.training.lease import Lease, LeaseHeld, LeaseLost
from cwpo_dist.training.loop import Engine
from cwpo_dist.training.shards import PARAMETERS, Shard, ShardFile, Share

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
COMMIT = "commit.json"
_NAME = re.compile(r"step-(\d+)-\w+")


class CheckpointError(ValueError):
    """A checkpoint of another run, or a damaged one; the message says which, and the remedy."""


class CommitFailed(RuntimeError):
    """Another rank could not write or commit; raised on all others, so that none goes on alone."""


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
        files: one of each rank that wrote it.
        learned: of the task, see `Task.learned`.
    """

    store: Store
    step: int
    files: tuple[str, ...]
    learned: tuple[float, ...] = ()

    def shards(self) -> list[ShardFile]:
        """The files of all ranks."""
        return [ShardFile(self.store, name) for name in self.files]


def newest(stage: Store) -> Checkpoint | None:
    """The committed checkpoint with the most steps; of equals, the first by name."""
    committed = _committed(stage)
    return committed[0] if committed else None


def clear(stage: Store) -> None:
    """Removes the checkpoints of a training that is committed: nothing else could read them.

    A driver that took the lease before the commit may still do so; then it clears in its turn.
    """
    if not stage.names(FOLDER):
        return
    with of_no_use(stage.child(FOLDER)):
        try:
            with Lease.acquire(stage):
                stage.remove(FOLDER)
        except LeaseHeld as held:
            logger.info("%s/%s stays for now: %s", stage.uri, FOLDER, held)


@contextmanager
def of_no_use(folder: Store) -> Iterator[None]:
    """What storage refuses to remove there stays, and is no fault of the run.

    Some services let nobody remove anything: keys that may write alone, locked objects.
    """
    try:
        yield
    except OSError as error:
        why = redacted(str(error))
        logger.warning("in %s is what is of no more use, but stays: %s", folder.uri, why)


class Saver:
    """Writes an engine's checkpoints beside training; at most one is under way.

    All ranks call `begin` and `settle` alike, as both decide together what becomes of a checkpoint.
    """

    def __init__(
        self,
        stage: Store,
        engine: Engine,
        identity: RunIdentity,
        attempt: str,
        *,
        save_total_limit: int,
        fence: Callable[[], None],
    ) -> None:
        """Writes nothing yet.

        Args:
            stage: the stage's folder.
            engine: whose state is saved.
            identity: of the run.
            attempt: letters and digits, the same on all ranks, another for each group.
            save_total_limit: older committed checkpoints beyond so many are removed, and whatever
                other attempts left unfinished.
            fence: called right before a commit; raises where this process may no longer commit.
        """
        self._stage, self._engine, self._identity = stage, engine, identity
        self._attempt, self._save_total_limit, self._fence = attempt, save_total_limit, fence
        self._upload: _Upload | None = None

    @property
    def news(self) -> bool:
        """True when this rank's part of the checkpoint under way is written, or has failed."""
        return self._upload is not None and self._upload.done

    def begin(self, step: int, learned: Sequence[float] = ()) -> None:
        """Copies this rank's state and starts to write it; a collective.

        Args:
            step: optimizer steps done.
            learned: by the task, the same on all ranks.

        Raises:
            OSError, LeaseLost, CommitFailed: as `settle`, for the checkpoint before.
        """
        self.settle(wait=True)
        folder = self._stage.child(FOLDER, f"step-{step:06d}-{self._attempt}")
        name, shard = _file(self._engine.rank), _copied(self._engine)
        self._upload = _Upload(step, folder, name, shard, tuple(learned))

    def settle(self, *, wait: bool = False) -> None:
        """Commits the checkpoint under way if all ranks have written their parts; a collective.

        Args:
            wait: until it is written.

        Raises:
            OSError, LeaseLost: what kept this rank from writing or committing it.
            CommitFailed: on the other ranks.
        """
        upload = self._upload
        if upload is None:
            return
        if wait:
            upload.thread.join()
        pending = self._sum(float(not upload.done))
        self._agree(upload.failure if upload.done else None, upload.step)
        if pending:
            return
        self._upload = None
        leads = self._engine.rank == 0
        self._agree(_failure_of(self._commit, upload) if leads else None, upload.step)
        if leads:
            _tidy(self._stage, self._save_total_limit)

    def _commit(self, upload: _Upload) -> None:
        self._fence()
        files = [_file(rank) for rank in range(self._engine.world_size)]
        record = {"step": upload.step, "files": files, "learned": upload.learned}
        record |= asdict(self._identity)
        upload.folder.create_json(COMMIT, record)

    def _agree(self, failure: Exception | None, step: int) -> None:
        """Returns on all ranks, or raises on all."""
        failed = self._sum(float(failure is not None))
        if failure is not None:
            raise failure
        if failed:
            raise CommitFailed(f"another rank could not write the checkpoint of step {step}")

    def _sum(self, number: float) -> float:
        return float(self._engine.total(torch.tensor([number], dtype=torch.float64)))


class _Upload:
    """One rank's part of a checkpoint on its way to storage, in a thread of its own."""

    def __init__(
        self, step: int, folder: Store, name: str, shard: Shard, learned: tuple[float, ...]
    ) -> None:
        self.step, self.folder, self.learned = step, folder, learned
        self.failure: Exception | None = None
        self.thread = threading.Thread(
            target=self._write, args=(name, shard), name="checkpoint", daemon=True
        )
        self.thread.start()

    @property
    def done(self) -> bool:
        return not self.thread.is_alive()

    def _write(self, name: str, shard: Shard) -> None:
        try:
            shard.write(self.folder, name)
        except Exception as error:  # noqa: BLE001 (raised again by settle, where training hears it)
            self.failure = error


def load(checkpoint: Checkpoint, engine: Engine, identity: RunIdentity) -> None:
    """Restores an engine; called on all ranks, each of which reads what it keeps.

    Args:
        checkpoint: of any world size and ZeRO stage.
        engine: whose parameters and states are overwritten.
        identity: of the run that goes on.

    Raises:
        CheckpointError: when the checkpoint belongs to another run, or lacks numbers.
    """
    _check(checkpoint, identity)
    engine.start_at(checkpoint.step)
    shards = checkpoint.shards()
    for key in _keys(engine):
        shares = {share.name: share for share in _shares(engine, key)}
        found: Counter[str] = Counter()
        for shard in shards:
            found.update(shard.fill(key, shares))
        for name, share in shares.items():
            if found[name] != share.values.numel():
                raise CheckpointError(
                    f"{checkpoint.store.uri}: it holds {found[name]} of the "
                    f"{share.values.numel()} numbers of {name} ({key}) that this rank keeps; "
                    "remove the checkpoint, and an older one is taken"
                )
    engine.publish()


def trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that training changes, in the module's order."""
    return ((n, p) for n, p in module.named_parameters() if p.requires_grad)


def _keys(engine: Engine) -> list[str]:
    return [PARAMETERS, *engine.state_keys]


def _shares(engine: Engine, key: str) -> Iterator[Share]:
    return engine.shares(None if key == PARAMETERS else key)


def _copied(engine: Engine) -> Shard:
    """What this rank writes: its own, or a part of what all ranks have alike."""
    shares = {key: list(_shares(engine, key)) for key in _keys(engine)}
    if engine.replicated:
        rank, world_size = engine.rank, engine.world_size
        shares = {k: [s.part(rank, world_size) for s in given] for k, given in shares.items()}
    return Shard.copied(shares)


def _file(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


def _failure_of(act: Callable[..., object], *arguments: object) -> Exception | None:
    """What went wrong, kept until all ranks can hear of it."""
    try:
        act(*arguments)
    except (OSError, LeaseLost) as error:
        return error
    return None


def _check(checkpoint: Checkpoint, identity: RunIdentity) -> None:
    held = checkpoint.store.read_json(COMMIT)
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
            held = store.read_json(COMMIT)
            listed, learned = tuple(held["files"]), tuple(held.get("learned", ()))
            if all(f"{FOLDER}/{folder}/{file}" in names for file in listed):
                found.append(Checkpoint(store, int(match[1]), listed, learned))
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def _tidy(stage: Store, save_total_limit: int) -> None:
    """Removes what is no longer needed; the commit first, so that no half ever counts."""
    kept = {checkpoint.store.uri for checkpoint in _committed(stage)[:save_total_limit]}
    with of_no_use(stage.child(FOLDER)):
        for folder in sorted({name.split("/")[1] for name in stage.names(FOLDER)}):
            store = stage.child(FOLDER, folder)
            if store.uri not in kept:
                store.remove(COMMIT)
                store.remove()
