"""The command line: `cwpo run CONFIG.yaml`, one command a stage, plan, export, submit.

What is heavy to import (torch, ray) is imported by the command that needs it.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cwpo_dist import __version__, credentials
from cwpo_dist.config import Config
from cwpo_dist.config_file import load_config

# What each stage does, in its order; `cwpo <stage>` exists for each.
STAGES = {
    "prepare": "Read the sources, split them, set bad rows aside: pairs and rejects.",
    "fit": "Train the weak model on the labelled pairs: the annotator.",
    "annotate": "Score every pair with the annotator or any one-label reward model.",
    "weigh": "Scores to preferences: who won, how confidently, with what weight.",
    "sft": "Fine-tune the policy on the chosen answers.",
    "reference": "The SFT policy's log-probabilities of both answers, once.",
    "align": "Confidence-weighted preference optimisation of the policy.",
    "evaluate": "Held-out accuracy, calibration and gold reward accuracy.",
}
USER_ERROR = 2

app = typer.Typer(
    name="cwpo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Confidence-weighted preference optimisation over Ray and DeepSpeed.\n\n"
    "Start with `cwpo plan CONFIG.yaml`, which checks a run and says what it costs, "
    "then `cwpo run CONFIG.yaml`. A command that was cut off goes on where it was when "
    "you give it again.",
)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cwpo_dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None: ...


ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file; see jobs/recipes for examples.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[OVERRIDES]",
        help="key.sub=value or further YAML files, laid over CONFIG from left to right.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Refuse to start a stage afresh if its inputs changed.")
]
RetryRejects = Annotated[
    bool,
    typer.Option(
        "--retry-rejects", help="`annotate`: score again what was set aside for a failure."
    ),
]
Address = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        help="The cluster's job server, such as http://127.0.0.1:8265.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="As printed by `cwpo submit`.")]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; faults of the user end in one message and exit code 2."""
    credentials.take()  # in a submitted job
    try:
        app(args=arguments)
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        message = user_message(error)
        if message is None:
            raise
        Console(stderr=True).print(
            f"[red]error:[/red] {escape(message)}", highlight=False, soft_wrap=True
        )
        sys.exit(USER_ERROR)


def user_message(error: BaseException) -> str | None:
    """The message of an error that this package raised, here or in a Ray worker; else None.

    Errors of the package's own classes are written for the user; a traceback would only hide them.
    """
    if not any(kind.__module__.startswith("cwpo_dist.") for kind in type(error).__mro__):
        return None
    return str(getattr(error, "cause", error))  # Ray's wrapper adds the worker's traceback


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    resume: Resume = False,
) -> None:
    """Do all that is not done yet, arm by arm, and write the report.

    Example: cwpo run run.yaml 'arms=[human,weak,cw]' align.beta=0.1 output_dir=s3://bucket/run
    """
    _run(load_config(config, overrides), until, resume)


def _add_stage(stage: str, does: str) -> None:
    def command(config: ConfigPath, overrides: Overrides = None, resume: Resume = False) -> None:
        _run(load_config(config, overrides), stage, resume)

    command.__doc__ = (
        f"{does}\n\nWhat it needs and is not done yet is done first, and said.\n\n"
        f"Example: cwpo {stage} run.yaml"
    )
    app.command(stage)(command)


for _stage, _does in STAGES.items():
    if _stage != "annotate":
        _add_stage(_stage, _does)


@app.command()
def annotate(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Resume = False,
    retry_rejects: RetryRejects = False,
) -> None:
    """Score every pair with the annotator or any one-label reward model.

    What it needs and is not done yet is done first, and said. --retry-rejects scores again what a
    finished pass set aside for a failure or a score that is not finite, and nothing else.

    Example: cwpo annotate run.yaml annotate.model.model_name_or_path=models/reward
    """
    _run(load_config(config, overrides), "annotate", resume, retry_rejects)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories or URIs.")],
    to: Annotated[
        str | None, typer.Option(help="Where the page goes; needed for more than one run.")
    ] = None,
) -> None:
    """Show the figures of finished runs and write their page; several runs share one.

    Example: cwpo report runs/seed0 runs/seed1 runs/seed2 --to seeds.html
    """
    from cwpo_dist.stages.show import show

    _say(f"report: {show(runs, to)}")


@app.command()
def compare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run all trials of the `compare` section, with every seed, and say what they are worth.

    What trials share is made once, independent ones run side by side where the cluster has room,
    and the same command resumes. `cwpo plan` says what it will cost.

    Example: cwpo compare jobs/recipes/hh-compare.yaml 'compare.seeds=[0,1]'
    """
    _guard_own_ray()
    from cwpo_dist.stages.comparison import compare as compare_trials

    _log_to_terminal()
    _say(f"comparison: {compare_trials(load_config(config, overrides))}")


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(help="Print this many rows as the models see them.")] = 0,
    price: Annotated[
        float | None, typer.Option(help="Of a device-hour: a GPU, or a CPU where a pool has none.")
    ] = None,
    pairs_per_second: Annotated[
        float | None, typer.Option(help="Pairs that one device annotates a second.")
    ] = None,
    trial: Annotated[
        str | None, typer.Option(help="A finished run of a sample, whose rate to take.")
    ] = None,
) -> None:
    """Check columns, models, placement and batches, and say what the run will cost.

    Nothing is started and nothing stays written: on a cluster, each node tries output_dir out.

    Example: cwpo plan run.yaml --show 3 --trial s3://bucket/sample --price 2.50
    """
    from cwpo_dist.stages.plan import plan as make_plan
    from cwpo_dist.stages.plan_table import print_plan

    print_plan(make_plan(load_config(config, overrides), show, price, pairs_per_second, trial))


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory or URI.")],
    to: Annotated[str, typer.Option(help="An empty or new folder, or a URI.")],
    arm: Annotated[str | None, typer.Option(help="Needed when the run has several arms.")] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The LoRA adapter alone, not merged.")
    ] = False,
) -> None:
    """Copy an arm's aligned model: a Hugging Face folder that loads anywhere.

    Example: cwpo export runs/demo --arm cw --to models/aligned
    """
    from cwpo_dist.stages.export import export as copy_model

    _say(f"model: {copy_model(run, arm, to, adapter)}")


@app.command()
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
) -> None:
    """Send a run, or one stage, to a Ray cluster; the same command again attaches or resumes.

    This shell's HF_TOKEN and its AWS, WANDB and MLFLOW credentials travel with the job. Every node
    must see output_dir: give a URI, or a folder that all share.

    Example: cwpo submit annotate run.yaml output_dir=s3://bucket/run --address http://head:8265
    """
    from cwpo_dist.submit import Settings, follow
    from cwpo_dist.submit import submit as send

    stage = what.pop(0) if what[0] in {*STAGES, "run", "plan", "compare"} else "run"
    if not what:
        raise typer.BadParameter("name a CONFIG after the stage", param_hint="CONFIG")
    if retry_rejects and stage != "annotate":
        raise typer.BadParameter("goes with `cwpo submit annotate`", param_hint="--retry-rejects")
    loaded = load_config(what[0], what[1:])
    if "://" not in loaded.output_dir:
        _say(f"output_dir {loaded.output_dir!r} is a local path: every node must see it")
    settings = Settings(python, tuple(py_module or ()), tuple(env or ()), retry_rejects)
    job = send(loaded, stage, address, settings)
    _say(f"{'attached to' if job.attached else 'submitted'} {job.submission_id}")
    if wait and not follow(job.submission_id, address, sys.stdout.write, pending_timeout):
        _say(f"{job.submission_id} did not succeed; the same command starts the next attempt")
        raise typer.Exit(1)


@app.command()
def status(job: JobId, address: Address) -> None:
    """Say how a submitted job stands.

    Example: cwpo status cwpo-run-demo-1a2b3c4d --address http://head:8265
    """
    from cwpo_dist.submit import status as ask

    _say(ask(job, address))


@app.command()
def logs(
    job: JobId,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job ends.")] = False,
) -> None:
    """Print what a submitted job has printed.

    Example: cwpo logs cwpo-run-demo-1a2b3c4d --follow --address http://head:8265
    """
    from cwpo_dist.submit import follow as follow_job
    from cwpo_dist.submit import logs as read

    if follow:
        follow_job(job, address, sys.stdout.write)
    else:
        sys.stdout.write(read(job, address))


@app.command()
def stop(job: JobId, address: Address) -> None:
    """Ask a submitted job to end; submitting it again resumes it.

    Example: cwpo stop cwpo-run-demo-1a2b3c4d --address http://head:8265
    """
    from cwpo_dist.submit import stop as ask

    _say("stopping" if ask(job, address) else "it had ended before")


def _guard_own_ray() -> None:
    """A token for the Ray that this process starts; must be set before ray is imported.

    Ray would otherwise write one into HOME, and every later `ray start` of this user would ask
    for it.
    """
    names = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if not any(os.environ.get(name) for name in names):
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


class _Stderr(logging.Handler):
    """Logs to what is stderr at the moment: while a progress bar is shown, that prints above it."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{self.format(record)}\n")


def _run(config: Config, until: str | None, resume: bool, retry_rejects: bool = False) -> None:
    _guard_own_ray()
    from cwpo_dist.stages import run as stages
    from cwpo_dist.stages.checks import check

    _log_to_terminal()
    check(config, until)  # before any worker starts
    if retry_rejects:
        place = stages.retry_rejects(config)
    else:
        place = stages.run(config, until=until, resume=resume)
    _say(f"{'report' if until is None else 'run directory'}: {place}")


def _log_to_terminal() -> None:
    handlers = [_Stderr()]
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)
    logging.getLogger("cwpo_dist").setLevel(logging.INFO)


def _say(text: str) -> None:
    Console(soft_wrap=True).print(escape(text), highlight=False)


if __name__ == "__main__":
    main()
