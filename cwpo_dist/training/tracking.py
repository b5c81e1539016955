"""Log records of a training run in; TensorBoard event files, MLflow and W&B runs out.

A run has one identity in each tracker, made of its stage folder, so a resumed one continues it.
Servers, projects and credentials come from the trackers' own environment variables alone, as in
transformers (`MLFLOW_TRACKING_URI`, `WANDB_PROJECT`, `WANDB_MODE`, …), on the node of rank 0; no
file of ours and no record holds them.

What is here may wait for a server, and raise: `courier.py` keeps both from training.
"""

from __future__ import annotations

import configparser
import importlib.util
import logging
import netrc
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cwpo_dist.config import Tracker
from cwpo_dist.storage import Store
from cwpo_dist.training.courier import Courier, Stamped, TrackedRun

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"  # the folder of event files in a stage's own
PROJECT = "cwpo_dist"
PACKAGES: dict[Tracker, str] = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
# A call to a server that is away ends after so long, unless the user's environment says otherwise:
# MLflow's own 120 s, tried 8 times, are patience that a courier has itself.
CALL_S = 5
MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(CALL_S),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # else it also calls servers that nobody named
}
WANDB_INIT_S = 2 * CALL_S  # it starts a process of its own
WANDB_HOST = re.compile(r"(^|\.)(wandb\.ai|coreweave\.com)$")  # where a login without a URL goes


def missing(trackers: Iterable[Tracker]) -> list[str]:
    """What `report_to` names and this environment lacks, each with its remedy."""
    found = []
    for name in trackers:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            found.append(
                f"{name!r} is not installed here; pip install 'cwpo_dist[{name}]', or remove it"
            )
        elif name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
            found.append(
                "'mlflow' needs MLFLOW_TRACKING_URI, which is not set in the environment of the "
                "training's workers; set it to the server's address, or remove 'mlflow'"
            )
        elif name == "wandb" and not _wandb_can_start():
            found.append(
                "'wandb' needs WANDB_API_KEY, or `wandb login`, in the environment of the "
                "training's workers; set it, or WANDB_MODE=offline, or remove 'wandb'"
            )
    return found


def open_runs(
    trackers: Iterable[Tracker],
    stage: Store,
    name: str,
    identity: str,
    settings: Mapping[str, object],
    start: int,
) -> list[Courier]:
    """Opens or continues the run in each tracker; on rank 0 alone.

    Nothing that goes wrong with a tracker ends a training or makes it wait: it is warned of. Their
    clients are imported by the couriers' threads, as that takes seconds.

    Args:
        trackers: of the configuration.
        stage: the stage's folder.
        name: to show.
        identity: the same for every attempt at this stage output, and for no other.
        settings: shown as the run's parameters; free of secrets, as the configuration is.
        start: the steps done: what an attempt that failed logged after them is replaced, or kept
            where a tracker cannot forget.
    """
    runs = []
    for tracker in trackers:
        if importlib.util.find_spec(PACKAGES[tracker]) is None:  # nodes may differ
            logger.warning("report_to: %r is not installed on this node: left out", tracker)
        else:
            run = _MAKERS[tracker](stage, name, identity, settings, start)
            runs.append(Courier(tracker, run))
    return runs


class _TensorBoard:
    """Event files in `tensorboard/`; several attempts write a file each, read as one run."""

    def __init__(
        self, stage: Store, name: str, identity: str, settings: Mapping[str, object], start: int
    ) -> None:
        self._settings, self._start = settings, start
        self._store = stage.child(TENSORBOARD)
        self._upload = None if stage.is_local else tempfile.TemporaryDirectory(prefix="cwpo-tb-")
        self._writer: Any = None

    def connect(self) -> None:
        if self._writer is not None:
            return
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._event, self._scalar = Event, summary.scalar
        folder = Path(self._upload.name if self._upload else self._store.root)
        folder.mkdir(parents=True, exist_ok=True)
        # Its SummaryWriter writes from a queue that its own flush does not wait for.
        suffix = f".{self._start:08d}.{uuid.uuid4().hex[:8]}"
        writer = EventsWriter(str(folder / "events"), suffix)
        now = time.time()
        if self._start:  # steps that an attempt did after its last checkpoint: they come again
            again = SessionLog(status=SessionLog.START)
            event = Event(wall_time=now, step=self._start + 1, session_log=again)
        else:
            lines = "\n".join(f"    {key}: {value}" for key, value in self._settings.items())
            shown = summary.text("settings", lines)
            event = Event(wall_time=now, step=0, summary=shown)
        writer.write_event(event)
        self._writer = writer

    def log(self, records: Sequence[Stamped]) -> None:
        for moment, numbers in records:
            for key, value in numbers.items():
                shown = self._scalar(_by_side(key), value)
                event = self._event(wall_time=moment, step=int(numbers["step"]), summary=shown)
                self._writer.write_event(event)

    def flush(self) -> None:
        self._writer.flush()
        if self._upload:
            for file in Path(self._upload.name).iterdir():
                self._store.write(file.name, file.read_bytes())

    def close(self) -> None:
        self._writer.close()
        if self._upload:
            self._upload.cleanup()


class _MLflow:
    """A run of the experiment that MLFLOW_EXPERIMENT_NAME names, found again by its tag."""

    TAG = "cwpo_dist.identity"

    def __init__(
        self, stage: Store, name: str, identity: str, settings: Mapping[str, object], start: int
    ) -> None:
        self._name, self._identity, self._settings = name, identity, settings

    def connect(self) -> None:
        if not os.environ.get("MLFLOW_TRACKING_URI"):  # else it makes a database of its own here
            raise RuntimeError("MLFLOW_TRACKING_URI is not set")
        for variable, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(variable, value)
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(), Metric
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(experiment)
        number = (
            self._client.create_experiment(experiment) if known is None else known.experiment_id
        )
        found = self._client.search_runs([number], f"tags.`{self.TAG}` = '{self._identity}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            history = self._client.get_metric_history(self._id, "loss")
            self._last = max((point.step for point in history), default=0)
        else:
            tags = {self.TAG: self._identity}
            self._id = self._client.create_run(number, tags=tags, run_name=self._name).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in self._settings.items()]
            self._client.log_batch(self._id, params=params)
            self._last = 0

    def log(self, records: Sequence[Stamped]) -> None:
        """Raw names, as transformers has them; a step that is there already stays as it is."""
        metrics = [
            self._metric(key, value, int(moment * 1000), int(numbers["step"]))
            for moment, numbers in records
            if numbers["step"] > self._last
            for key, value in numbers.items()
        ]
        if metrics:
            self._client.log_batch(self._id, metrics=metrics)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _WandB:
    """A run under a fixed id; the machine, the console and the code stay with us."""

    def __init__(
        self, stage: Store, name: str, identity: str, settings: Mapping[str, object], start: int
    ) -> None:
        self._name, self._identity, self._settings = name, identity, settings
        self._run: Any = None

    def connect(self) -> None:
        if self._run is not None:  # its own process keeps what its server does not take
            return
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self._identity,
            name=self._name,
            resume="allow",
            config=dict(self._settings),
            settings=wandb.Settings(
                console="off",
                save_code=False,
                disable_git=True,
                x_disable_meta=True,
                silent=True,
                init_timeout=WANDB_INIT_S,
            ),
        )

    def log(self, records: Sequence[Stamped]) -> None:
        for _, numbers in records:
            values = {_by_side(key): value for key, value in numbers.items()}
            self._run.log(values, step=int(numbers["step"]))

    def flush(self) -> None:
        """W&B's own process does."""

    def close(self) -> None:
        self._run.finish()


def _wandb_can_start() -> bool:
    """True with what W&B looks for: a key or token, a login, or a mode that needs neither.

    It is not asked itself: it would start a process.
    """
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    settings = _wandb_settings()
    mode = os.environ.get("WANDB_MODE") or settings.get("mode", "online")
    if mode not in {"online", "run", "shared"} or "api_key" in settings:
        return True
    url = os.environ.get("WANDB_BASE_URL") or settings.get("base_url", "")
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host == urlsplit(url).netloc or WANDB_HOST.search(host) for host in hosts)


def _wandb_settings() -> Mapping[str, str]:
    """What `wandb login`, `wandb offline` and `wandb init` write."""
    home = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    here = Path(os.environ.get("WANDB_DIR", ".")) / "wandb"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read([home / "settings", here / "settings"])
    except configparser.Error:
        return {}
    return parser["default"] if parser.has_section("default") else {}


_MAKERS: dict[Tracker, Callable[[Store, str, str, Mapping[str, object], int], TrackedRun]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _WandB,
}


def _by_side(name: str) -> str:
    """`train/loss`, `eval/loss`: as transformers shows them in TensorBoard and W&B."""
    return f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
