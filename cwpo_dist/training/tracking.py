"""Log records of a training run in; TensorBoard event files, MLflow and W&B runs out.

A run has one identity in each tracker, made of its stage folder, so a resumed one continues it.
Servers, projects and credentials come from the trackers' own environment variables alone, as in
transformers (`MLFLOW_TRACKING_URI`, `WANDB_PROJECT`, `WANDB_MODE`, …), on the node of rank 0; no
file of ours and no record holds them.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cwpo_dist.config import ConfigError, Tracker
from cwpo_dist.storage import Store

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"  # the folder of event files in a stage's own
PROJECT = "cwpo_dist"
PACKAGES: dict[Tracker, str] = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}


class TrackedRun(Protocol):
    """One run in one tracker."""

    def log(self, record: Mapping[str, float]) -> None:
        """Takes the numbers of a step; `step` among them."""

    def flush(self) -> None:
        """Brings what was logged to where it is kept."""

    def close(self) -> None:
        """No further record comes."""


def missing(trackers: Iterable[Tracker]) -> list[str]:
    """What `report_to` names and this environment lacks, each with its remedy."""
    return [
        f"{name!r} is not installed here; pip install 'cwpo_dist[{name}]', or remove it"
        for name in trackers
        if importlib.util.find_spec(PACKAGES[name]) is None
    ]


def open_runs(
    trackers: Iterable[Tracker],
    stage: Store,
    name: str,
    identity: str,
    settings: Mapping[str, Any],
    start: int,
) -> list[TrackedRun]:
    """Opens or continues the run in each tracker; on rank 0 alone.

    Args:
        trackers: of the configuration.
        stage: the stage's folder.
        name: to show.
        identity: the same for every attempt at this stage output, and for no other.
        settings: shown as the run's parameters; free of secrets, as the configuration is.
        start: the steps done: what an attempt that failed logged after them is replaced, or kept
            where a tracker cannot forget.

    Raises:
        ConfigError: for a tracker that is not installed.
    """
    trackers = list(trackers)
    lacking = missing(trackers)
    if lacking:
        raise ConfigError(f"report_to: {'; '.join(lacking)}")
    return [_MAKERS[tracker](stage, name, identity, settings, start) for tracker in trackers]


class _TensorBoard:
    """Event files in `tensorboard/`; several attempts write a file each, read as one run."""

    def __init__(
        self, stage: Store, name: str, identity: str, settings: Mapping[str, Any], start: int
    ) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._event, self._scalar = Event, summary.scalar
        self._store = stage.child(TENSORBOARD)
        self._upload = None if stage.is_local else tempfile.TemporaryDirectory(prefix="cwpo-tb-")
        folder = Path(self._upload.name if self._upload else self._store.root)
        folder.mkdir(parents=True, exist_ok=True)
        # Its SummaryWriter writes from a queue that its own flush does not wait for.
        self._writer = EventsWriter(str(folder / "events"), f".{start:08d}.{uuid.uuid4().hex[:8]}")
        if start:  # steps that an attempt did after its last checkpoint are hidden: they come again
            again = SessionLog(status=SessionLog.START)
            event = Event(wall_time=time.time(), step=start + 1, session_log=again)
            self._writer.write_event(event)
        else:
            lines = "\n".join(f"    {key}: {value}" for key, value in settings.items())
            shown = summary.text("settings", lines)
            self._writer.write_event(Event(wall_time=time.time(), step=0, summary=shown))

    def log(self, record: Mapping[str, float]) -> None:
        step, now = int(record["step"]), time.time()
        for key, value in record.items():
            summary = self._scalar(_by_side(key), value)
            self._writer.write_event(self._event(wall_time=now, step=step, summary=summary))

    def flush(self) -> None:
        self._writer.flush()
        if self._upload:
            for file in Path(self._upload.name).iterdir():
                self._store.write(file.name, file.read_bytes())

    def close(self) -> None:
        self.flush()
        self._writer.close()
        if self._upload:
            self._upload.cleanup()


class _MLflow:
    """A run of the experiment that MLFLOW_EXPERIMENT_NAME names, found again by its tag."""

    TAG = "cwpo_dist.identity"

    def __init__(
        self, stage: Store, name: str, identity: str, settings: Mapping[str, Any], start: int
    ) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError(
                "report_to: mlflow needs MLFLOW_TRACKING_URI in the environment of Ray's nodes"
            )
        self._metric, self._error = Metric, MlflowException
        self._client = MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(experiment)
        number = (
            self._client.create_experiment(experiment) if known is None else known.experiment_id
        )
        found = self._client.search_runs([number], f"tags.`{self.TAG}` = '{identity}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            history = self._client.get_metric_history(self._id, "loss")
            self._last = max((point.step for point in history), default=0)
        else:
            tags = {self.TAG: identity}
            self._id = self._client.create_run(number, tags=tags, run_name=name).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in settings.items()]
            self._client.log_batch(self._id, params=params)
            self._last = 0

    def log(self, record: Mapping[str, float]) -> None:
        """Raw names, as transformers has them; a step that is there already stays as it is."""
        step = int(record["step"])
        if step <= self._last:
            return
        now = int(time.time() * 1000)
        metrics = [self._metric(key, value, now, step) for key, value in record.items()]
        try:
            self._client.log_batch(self._id, metrics=metrics)
        except self._error as error:  # a server that is away must not end a training run
            logger.warning("mlflow did not take step %d: %s", step, error)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _WandB:
    """A run under a fixed id; the machine, the console and the code stay with us."""

    def __init__(
        self, stage: Store, name: str, identity: str, settings: Mapping[str, Any], start: int
    ) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=identity,
            name=name,
            resume="allow",
            config=dict(settings),
            settings=wandb.Settings(
                console="off", save_code=False, disable_git=True, x_disable_meta=True, silent=True
            ),
        )

    def log(self, record: Mapping[str, float]) -> None:
        values = {_by_side(key): value for key, value in record.items()}
        self._run.log(values, step=int(record["step"]))

    def flush(self) -> None:
        """W&B's own process does."""

    def close(self) -> None:
        self._run.finish()


_MAKERS: dict[Tracker, Callable[[Store, str, str, Mapping[str, Any], int], TrackedRun]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _WandB,
}


def _by_side(name: str) -> str:
    """`train/loss`, `eval/loss`: as transformers shows them in TensorBoard and W&B."""
    return f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
