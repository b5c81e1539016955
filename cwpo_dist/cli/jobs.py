"""The commands that talk to a cluster's job server: submit, status, logs, stop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cwpo_dist import credentials
from cwpo_dist.cli.options import (
    STAGES,
    PairsPerSecond,
    Price,
    RetryRejects,
    Show,
    Trial,
    say,
)
from cwpo_dist.config.load import load_config

Address = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        help="The cluster's job server, such as http://127.0.0.1:8265.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="As printed by `cwpo submit`.")]


def submit(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="[STAGE] CONFIG [OVERRIDES]", help="As for `cwpo run`, or for one stage of it."
        ),
    ],
    address: Address,
    wait: Annotated[bool, typer.Option(help="Follow the job's output until it ends.")] = True,
    python: Annotated[
        str | None, typer.Option(help="Interpreter on the nodes, where it is not Ray's own.")
    ] = None,
    py_module: Annotated[
        list[str] | None, typer.Option(help="A package folder of yours that the job imports.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(help="A further environment variable to pass on, by name.")
    ] = None,
    pending_timeout: Annotated[
        float, typer.Option(help="Seconds a job may wait for its start before we say so.")
    ] = 600.0,
    retry_rejects: RetryRejects = False,
    show: Show = 0,
    price: Price = None,
    pairs_per_second: PairsPerSecond = None,
    trial: Trial = None,
    image: Annotated[
        str | None,
        typer.Option(help="Run in containers of this image, which holds cwpo_dist; needs podman."),
    ] = None,
) -> None:
    """Send a run, or one stage, to a Ray cluster; the same command again attaches or resumes.

    This shell's HF_TOKEN and its AWS, WANDB and MLFLOW credentials travel with the job. Every node
    must see output_dir: give a URI, or a folder that all share.

    Example: cwpo submit annotate run.yaml output_dir=s3://bucket/run --address http://head:8265
    """
    from cwpo_dist.cli.submit import Settings, follow
    from cwpo_dist.cli.submit import submit as send

    stage = what.pop(0) if what[0] in {*STAGES, "run", "plan", "compare"} else "run"
    if not what:
        raise typer.BadParameter("name a CONFIG after the stage", param_hint="CONFIG")
    planning = plan_options(show, price, pairs_per_second, trial)
    options = _options(stage, planning, retry_rejects)
    _name_other(address)
    loaded = load_config(what[0], what[1:])
    _say_what_stays(loaded.output_dir, image)
    settings = Settings(python, tuple(py_module or ()), tuple(env or ()), options, image)
    job = send(loaded, stage, address, settings)
    say(f"{'attached to' if job.attached else 'submitted'} {job.submission_id}")
    if wait and not follow(job.submission_id, address, sys.stdout.write, pending_timeout):
        say(f"{job.submission_id} did not succeed; the same command starts the next attempt")
        raise typer.Exit(1)


def _say_what_stays(output_dir: str, image: str | None) -> None:
    """What the nodes must have, as it does not go with the job."""
    if "://" not in output_dir:
        say(f"output_dir {output_dir!r} is a local path: every node must see it")
    if image is not None and (left := credentials.here()):
        say(f"{', '.join(left)} cannot travel with --image: give the nodes their own")


def _options(stage: str, planning: list[str], retry_rejects: bool) -> tuple[str, ...]:
    """Those of the command that runs there, where they go with it."""
    if retry_rejects and stage != "annotate":
        raise typer.BadParameter("goes with `cwpo submit annotate`", param_hint="--retry-rejects")
    if planning and stage != "plan":
        raise typer.BadParameter("goes with `cwpo submit plan`", param_hint=planning[0])
    return (*planning, *(["--retry-rejects"] if retry_rejects else []))


def plan_options(
    show: int, price: list[str] | None, rate: list[str] | None, trial: str | None
) -> list[str]:
    """What was asked of a plan, as its command line has it."""
    if trial is not None and "://" not in trial:
        trial = str(Path(trial).absolute())  # every node must see it
    given = {"--price": price, "--pairs-per-second": rate, "--trial": [trial] if trial else None}
    asked = [part for name, values in given.items() for v in values or () for part in (name, v)]
    return [*asked, *(["--show", str(show)] if show else [])]


def status(job: JobId, address: Address) -> None:
    """Say how a submitted job stands.

    Example: cwpo status cwpo-run-demo-1a2b3c4d --address http://head:8265
    """
    from cwpo_dist.cli.submit import status as ask

    _name_other(address)
    say(ask(job, address))


def logs(
    job: JobId,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job ends.")] = False,
) -> None:
    """Print what a submitted job has printed.

    Example: cwpo logs cwpo-run-demo-1a2b3c4d --follow --address http://head:8265
    """
    from cwpo_dist.cli.submit import follow as follow_job
    from cwpo_dist.cli.submit import logs as read

    _name_other(address)
    if follow:
        follow_job(job, address, sys.stdout.write)
    else:
        sys.stdout.write(read(job, address))


def stop(job: JobId, address: Address) -> None:
    """Ask a submitted job to end; submitting it again resumes it.

    Example: cwpo stop cwpo-run-demo-1a2b3c4d --address http://head:8265
    """
    from cwpo_dist.cli.submit import stop as ask

    _name_other(address)
    say("stopping" if ask(job, address) else "it had ended before")


def _name_other(address: str) -> None:
    """Says so where the environment names another cluster than the one that is used."""
    from cwpo_dist.cli.job_server import other_cluster

    other = other_cluster(address)
    if other is not None:
        say(f"--address {address} is used, not {other} of the environment")
