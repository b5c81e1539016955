"""A configuration in, a job on a running Ray cluster out; and what became of it.

A job's name is a function of its run directory and stage: submitting twice attaches to the job
that runs, and submitting after an end starts the next attempt, which resumes.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import cwpo_dist
from cwpo_dist import credentials
from cwpo_dist.canonical import digest, to_json
from cwpo_dist.cli.job_server import SubmitError, job_server
from cwpo_dist.cli.portable import portable
from cwpo_dist.config import Config, ConfigError
from cwpo_dist.redaction import redacted

PACKAGE = Path(cwpo_dist.__file__).resolve().parent
CONFIG_NAME = "config.yaml"
PENDING_TIMEOUT_S = 600.0
POLL_S = 1.0
LOST_S = 60.0
AGENT_S = 120.0
_NO_AGENT = "No available agent"  # as Ray says it
# Ray kills a job 3 s after it asked it to end; a stage in training needs time for its checkpoint.
STOP_S = 600
ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}
_IMAGE = re.compile(r"[\w./:@-]+")  # Ray puts it into a shell's command as it is
_END = "END-OF-CONFIGURATION"  # of a here-document


@dataclass(frozen=True)
class Submitted:
    """A job on the cluster.

    Attributes:
        submission_id: its name, for `cwpo status | logs | stop`.
        attached: True when it was running already.
    """

    submission_id: str
    attached: bool


@dataclass(frozen=True)
class Settings:
    """How a job runs on the cluster, beside its configuration.

    Attributes:
        python: the interpreter on the cluster's nodes; None: the one that runs Ray.
        py_modules: folders of your own packages that the job imports (a gold function's, say).
        env: names of further environment variables that travel with the job.
        options: of the command that runs there, such as --retry-rejects.
        image: a container image that holds cwpo_dist, in which all of the job's processes run;
            None: on the nodes, and this package travels with the job.
    """

    python: str | None = None
    py_modules: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    image: str | None = None


def submit(config: Config, stage: str, address: str, settings: Settings | None = None) -> Submitted:
    """Sends `cwpo <stage>` to the cluster, or attaches to the job that does this very work.

    Args:
        config: the run; files that it names (templates, a DeepSpeed JSON) travel with the job.
        stage: a stage, or `run` for all of them.
        address: the cluster's job server, such as http://127.0.0.1:8265.
        settings: how the job runs there.

    Raises:
        SubmitError: when the cluster cannot be reached, or runs this directory's stage with
            another configuration.
        ConfigError: for settings that cannot be met.
    """
    settings = settings or Settings()
    with tempfile.TemporaryDirectory(prefix="cwpo-submit-") as name:
        folder = Path(name)
        data = portable(config, folder)
        pack = _packed if settings.image is None else _in_image
        entrypoint, environment = pack(data, stage, folder, settings)
        mark = digest([data, settings.options])
        with job_server(address) as client:
            send = partial(
                client.submit_job,
                entrypoint=entrypoint,
                runtime_env=environment,
                metadata={"cwpo_config": mark},
            )
            return _attach_or_send(client, job_name(str(data["output_dir"]), stage), mark, send)


def _attach_or_send(
    client: JobSubmissionClient, base: str, mark: str, send: Callable[..., str]
) -> Submitted:
    """Attaches to the attempt of this name that runs, or sends the next one.

    A head that came up a moment ago, or is busy, has no agent yet that takes jobs: it is awaited.
    """
    end = time.monotonic() + AGENT_S
    while True:
        attempts = _attempts(client, base)
        for attempt in attempts.values():
            if not attempt.status.is_terminal():
                return _attach(attempt, mark)
        name = base if not attempts else f"{base}-{max(attempts) + 1}"
        try:
            send(submission_id=name)
            return Submitted(name, attached=False)
        except RuntimeError as error:
            if _NO_AGENT in str(error) and time.monotonic() < end:
                time.sleep(POLL_S)
                continue
            # Another submitter may have taken the name in between: then attach to its job.
            if len(_attempts(client, base)) == len(attempts):
                raise


def job_name(output_dir: str, stage: str) -> str:
    """The first submission id of a stage of a run: the same for the same run directory."""
    tail = re.sub(r"[^A-Za-z0-9]+", "-", output_dir.rstrip("/").rsplit("/", 1)[-1]).strip("-")
    return f"cwpo-{stage}-{tail[:40]}-{digest(output_dir)[:8]}"


def status(submission_id: str, address: str) -> str:
    """One line: the job's status, and the cluster's message on it."""
    with job_server(address) as client:
        info = client.get_job_info(submission_id)
        return f"{info.status}: {info.message}" if info.message else str(info.status)


def logs(submission_id: str, address: str) -> str:
    """All that the job has printed so far."""
    with job_server(address) as client:
        return str(client.get_job_logs(submission_id))


def stop(submission_id: str, address: str) -> bool:
    """Asks a job to end; a stage in training checkpoints first. False when it had ended."""
    with job_server(address) as client:
        return bool(client.stop_job(submission_id))


def follow(
    submission_id: str,
    address: str,
    write: Callable[[str], object],
    pending_timeout_s: float = PENDING_TIMEOUT_S,
) -> bool:
    """Hands on a job's output until it ends.

    Returns:
        True when it succeeded.

    Raises:
        SubmitError: when it is still pending after `pending_timeout_s`; it is left as it is.
    """
    with job_server(address) as client:
        _await_start(client, submission_id, pending_timeout_s)
        log = _Log(write)
        while True:
            try:
                asyncio.run(log.tail(client, submission_id))
            except (RuntimeError, aiohttp.ClientError) as error:
                # The connection went, the job did not: read on from where we were.
                write(redacted(f"[connection lost: {error}; connecting again]\n"))
            state = _state(client, submission_id)
            if state.is_terminal():
                return bool(state == JobStatus.SUCCEEDED)
            time.sleep(POLL_S)


def _state(client: JobSubmissionClient, submission_id: str) -> JobStatus:
    """The job's status; patient with a connection that is gone for a while."""
    deadline = time.monotonic() + LOST_S
    while True:
        try:
            return client.get_job_status(submission_id)
        except OSError as error:
            if time.monotonic() > deadline:
                raise SubmitError(
                    f"{submission_id}: its job server has not answered for {LOST_S:.0f} s; when it "
                    "is back, the same command attaches to the job, or resumes where that ended"
                ) from error
            time.sleep(POLL_S)
        except RuntimeError as error:
            if "does not exist" not in str(error):
                raise
            raise SubmitError(
                f"{submission_id}: the cluster was restarted and no longer knows it; the "
                "same command resumes where it ended"
            ) from error


class _Log:
    """Hands on what is new: every connection sends the log from its beginning."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.write = write
        self.printed = 0

    async def tail(self, client: JobSubmissionClient, submission_id: str) -> None:
        position = 0
        async for chunk in client.tail_job_logs(submission_id):
            position += len(chunk)
            if position > self.printed:
                self.write(chunk[self.printed - position :])
                self.printed = position


def _await_start(client: JobSubmissionClient, submission_id: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while client.get_job_status(submission_id) == JobStatus.PENDING:
        if time.monotonic() > deadline:
            message = client.get_job_info(submission_id).message
            raise SubmitError(
                f"{submission_id}: still PENDING after {timeout_s:.0f} s ({message}). The cluster "
                "may lack a free CPU, or be unable to set up the job's environment (a download "
                "that cannot end). It was left as it is: see `cwpo status`, end it with "
                "`cwpo stop`, or wait longer with --pending-timeout"
            )
        time.sleep(POLL_S)


def _command(stage: str, config: str, settings: Settings) -> str:
    command = [settings.python or "python", "-m", "cwpo_dist.cli", stage, config]
    return shlex.join([*command, *settings.options])


def _packed(
    data: Mapping[str, object], stage: str, folder: Path, settings: Settings
) -> tuple[str, dict[str, object]]:
    """The command, and Ray's runtime environment, of a job that runs in `folder`."""
    missing = [variable for variable in settings.env if variable not in os.environ]
    if missing:
        raise ConfigError(f"--env: {', '.join(missing)} is not set here; export it first")
    credentials.pack(folder, settings.env)
    (folder / CONFIG_NAME).write_bytes(to_json(data))  # JSON is YAML
    environment: dict[str, object] = {
        "working_dir": str(folder),
        "py_modules": [str(PACKAGE), *settings.py_modules],
        "excludes": ["__pycache__", "*.pyc"],
        "env_vars": ENVIRONMENT | credentials.IN_JOB,
        "worker_process_setup_hook": "cwpo_dist.credentials.take",
    }
    if settings.python is not None:
        environment["py_executable"] = settings.python
    return _command(stage, CONFIG_NAME, settings), environment


def _in_image(
    data: Mapping[str, object], stage: str, folder: Path, settings: Settings
) -> tuple[str, dict[str, object]]:
    """The same in containers: the configuration is a part of the command, and no secret travels.

    Ray takes no files beside an image, and its variables stand in logs.
    """
    image = str(settings.image)
    if not _IMAGE.fullmatch(image):
        raise ConfigError(
            f"--image: {image!r} is not the name of an image; give registry/cwpo_dist:0.1.0"
        )
    if settings.python or settings.py_modules or settings.env:
        raise ConfigError(
            "--image: Ray takes nothing else beside it. Put your packages into the image, and "
            "variables into the nodes' own (podman's containers.conf); --python, --py-module and "
            "--env go without it"
        )
    templates = [path.name for path in folder.iterdir()]
    if templates:
        raise ConfigError(
            f"--image: the chat template {', '.join(templates)} cannot travel with it; put it into "
            "the model's folder (chat_template: tokenizer)"
        )
    command = _command(stage, "/dev/stdin", settings)
    text = json.dumps(data)  # one line, as Ray's log opens with the command
    return f"{command} <<'{_END}'\n{text}\n{_END}", {"image_uri": image, "env_vars": ENVIRONMENT}


def _attempts(client: JobSubmissionClient, base: str) -> dict[int, JobDetails]:
    """Number of the attempt → job, of all jobs with this name."""
    pattern = re.compile(rf"{re.escape(base)}(?:-(\d+))?")
    found = {}
    for job in client.list_jobs():
        match = pattern.fullmatch(job.submission_id or "")
        if match:
            found[int(match[1] or 1)] = job
    return found


def _attach(job: JobDetails, mark: str) -> Submitted:
    if (job.metadata or {}).get("cwpo_config") != mark:
        raise SubmitError(
            f"{job.submission_id} runs in this output_dir with another configuration or other "
            f"options (--retry-rejects, --price, …): wait for it, "
            f"end it with `cwpo stop {job.submission_id}`, or choose another output_dir"
        )
    return Submitted(str(job.submission_id), attached=True)
