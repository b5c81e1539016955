"""The command line: `cwpo run CONFIG.yaml`, one command a stage, plan, export, submit.

What is heavy to import (torch, ray) is imported by the command that needs it.
"""

from __future__ import annotations

import errno
import io
import sys
from functools import partial
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from cwpo_dist import __version__, credentials
from cwpo_dist.cli import asking, bench, configuration, exporting, jobs, starting_file
from cwpo_dist.cli.options import (
    STAGES,
    ConfigPath,
    Overrides,
    PairsPerSecond,
    Price,
    Resume,
    RetryRejects,
    Show,
    Trial,
    guard_own_ray,
    say,
)
from cwpo_dist.cli.terminal_log import log_to_terminal, told_without_credentials
from cwpo_dist.config import Config
from cwpo_dist.config.load import load_config
from cwpo_dist.redaction import redacted
from cwpo_dist.stop_signals import Preempted, on_stop
from cwpo_dist.terminal_text import harmless

USER_ERROR = 2
_SHOWN = 60  # letters of a name that is too long


app = typer.Typer(
    name="cwpo",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Confidence-weighted preference optimisation over Ray and DeepSpeed.\n\n"
    "Start with `cwpo plan CONFIG.yaml`, which checks a run and says what it costs, "
    "then `cwpo run CONFIG.yaml`. A command that was cut off goes on where it was when "
    "you give it again.",
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"cwpo_dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None: ...


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; faults of the user end in one message.

    Codes:
        0: done, or done before.
        1: `check`, `verify`, `submit --wait`: something is not right, and is named; of other
            commands a fault of this program, with its traceback.
        2: refused, or ended, with one message that names the remedy. What was committed stays, and
            the same command goes on.
        75: told to stop (SIGTERM, SIGUSR1), and did: the same command resumes.
    """
    credentials.take()  # in a submitted job
    sys.excepthook = told_without_credentials
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Ray hands on what workers say there; into a file or pipe it would all come at the end.
        # A name in somebody's files may hold what no terminal can write: it is spelled out.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    told: list[str] = []
    try:
        with on_stop(partial(_end, told)):
            app(args=arguments)
    except SystemExit as end:
        if not told or end.code in {0, None}:  # it was done before it could be stopped
            raise
        _say_stopped(told[0])
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if told:  # it came of the work that was cut off
            _say_stopped(told[0])
        message = user_message(error)
        if message is None:
            raise
        Console(stderr=True).print(
            f"[red]error:[/red] {escape(harmless(message))}", highlight=False, soft_wrap=True
        )
        sys.exit(getattr(error, "exit_code", USER_ERROR))


def _end(told: list[str], signal_name: str) -> bool:
    """Of the errors that a handler may raise, Ray hands on this one alone from its own waits."""
    if not told:  # a second signal leaves alone what ends in order
        told.append(signal_name)
        raise SystemExit(Preempted.exit_code)
    return True


def _say_stopped(signal_name: str) -> NoReturn:
    said = f"{signal_name}: stopped; what was committed stays, and the same command resumes"
    Console(stderr=True).print(said, highlight=False, soft_wrap=True)
    sys.exit(Preempted.exit_code)


def user_message(error: BaseException) -> str | None:
    """The message of an error that this package raised, here or in a Ray worker; else None.

    Errors of the package's own classes are written for the user; a traceback would only hide them.
    """
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # whatever asked for it
        return f"{str(error.filename)[:_SHOWN]!r}…: {error.strerror}; give a shorter one"
    if not any(kind.__module__.startswith("cwpo_dist.") for kind in type(error).__mro__):
        return None
    said = str(getattr(error, "cause", error))  # Ray's wrapper adds the worker's traceback
    said = said.partition("\nFailed to apply UDF ")[0]  # Ray Data adds advice about its own knobs
    return redacted(said)


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
    """Score every answer with the annotator or any one-label reward model.

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

    The directory of a comparison, alone, has its own page written anew. A run that ended before its
    report shows what became of its rows.

    Example: cwpo report runs/seed0 runs/seed1 runs/seed2 --to seeds.html
    """
    from cwpo_dist.results.show import show

    say(f"report: {show(runs, to)}")


@app.command()
def compare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run all trials of the `compare` section, with every seed, and say what they are worth.

    The section has seeds, learning_rates, a baseline, and grids of arms, losses,
    labelled_fractions and flipped_labels. What trials share is made once, independent ones run side
    by side where the cluster has room, and the same command resumes. It leaves comparison.html and
    comparison.json in output_dir. `cwpo plan` says what it will cost.

    Example: cwpo compare run.yaml compare.yaml 'compare.seeds=[0,1]'
    """
    guard_own_ray()
    from cwpo_dist.execution.comparison import compare as compare_trials

    log_to_terminal()
    say(f"comparison: {compare_trials(load_config(config, overrides))}")


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    show: Show = 0,
    price: Price = None,
    pairs_per_second: PairsPerSecond = None,
    trial: Trial = None,
) -> None:
    """Check columns, models, placement and batches, and say what the run will cost.

    Nothing is started and nothing stays written: on a cluster, each node tries output_dir out.

    Example: cwpo plan run.yaml --show 3 --trial s3://bucket/sample --price 2.50
    """
    from cwpo_dist.planning.fleet import Fleet
    from cwpo_dist.planning.plan import plan as make_plan
    from cwpo_dist.planning.plan_table import print_plan

    fleet = Fleet.known(price or (), pairs_per_second or (), trial)
    print_plan(make_plan(load_config(config, overrides), show, fleet))


@app.command()
def check(
    nodes: Annotated[
        Literal["one", "all"],
        typer.Option(help="One device and a second rank, or all devices of all nodes."),
    ] = "one",
    quick: Annotated[bool, typer.Option("--quick", help="No figures of speed.")] = False,
    storage: Annotated[
        str | None, typer.Option(help="What all nodes see, for a checkpoint; of one node its disk.")
    ] = None,
    to: Annotated[str, typer.Option(help="The file of all figures.")] = "check.json",
) -> None:
    """Check this machine, or the cluster of RAY_ADDRESS: is what it computes right, and how fast?

    Devices, drivers and kernels are not seen by tests made elsewhere. Small models of random
    weights are computed on each device and by several ranks, beside plain torch on the CPU: packed
    rows, the optimizer, generation, exchange between ranks, ZeRO 0 to 3, a resumed training. It
    takes some minutes and needs no download. The exit code is 1 where something is wrong.

    Example: cwpo check --nodes all --storage s3://bucket/scratch
    """
    guard_own_ray()
    from cwpo_dist.check.command import check as check_cluster

    log_to_terminal()
    if not check_cluster(nodes, to, quick=quick, storage=storage):
        raise typer.Exit(1)


app.command()(asking.ask)
app.command()(exporting.export)
app.command()(exporting.verify)
app.command()(asking.judge)
app.command()(starting_file.init)
app.command()(configuration.config)
app.add_typer(bench.bench, name="bench")


for _command in (jobs.submit, jobs.status, jobs.logs, jobs.stop):
    app.command()(_command)


def _run(config: Config, until: str | None, resume: bool, retry_rejects: bool = False) -> None:
    guard_own_ray()
    from cwpo_dist.execution import run as stages
    from cwpo_dist.runs.checks import check

    log_to_terminal()
    check(config, until)  # before any worker starts
    if retry_rejects:
        place = stages.retry_rejects(config)
    else:
        place = stages.run(config, until=until, resume=resume)
    say(f"{'report' if until is None else 'run directory'}: {place}")
