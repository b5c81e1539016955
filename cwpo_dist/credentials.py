"""A shell's credentials in, the environment of every process of a submitted job out.

They travel as a file in the job's working directory: Ray shows a job's environment variables on its
dashboard, and writes them into the logs of every node.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from fsspec.config import conf, set_conf_env

# What a job needs to reach models, storage and trackers. Only what is set travels.
PASSED_ON = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "WANDB_API_KEY",
    "WANDB_BASE_URL",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_S3_ENDPOINT_URL",
)
# fsspec's own: FSSPEC_HTTPS holds what its https filesystem is made with. Its folder stays here.
_OF_FSSPEC, _LOCAL = "FSSPEC_", "FSSPEC_CONFIG_DIR"
_FILE = ".cwpo-environment.json"
# The variable of a job that says where it is: a file of that name in anybody's folder is not read.
IN_JOB = {"CWPO_ENVIRONMENT_FILE": _FILE}


def here() -> list[str]:
    """The names of PASSED_ON, and of fsspec's variables, that are set in this shell."""
    fsspecs = (name for name in sorted(os.environ) if name.startswith(_OF_FSSPEC))
    found = [name for name in PASSED_ON if name in os.environ]
    return [*found, *(name for name in fsspecs if name != _LOCAL)]


def pack(folder: Path, further: Sequence[str] = ()) -> None:
    """Writes what is set here of PASSED_ON, and `further` variables, into a job's folder."""
    values = {name: os.environ[name] for name in (*here(), *further) if name in os.environ}
    with os.fdopen(os.open(folder / _FILE, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
        json.dump(values, file)


def take() -> None:
    """Sets what `pack` wrote, when this process is one of a job's; called once in each."""
    files = [Path(os.environ[name]) for name in IN_JOB if name in os.environ]
    for file in filter(Path.is_file, files):
        os.environ.update(json.loads(file.read_text()))
        set_conf_env(conf)  # fsspec may have been imported before
