"""Random blows to drivers of a small recipe, by the hundred; what became of each, in a table.

`python tests/blows.py --blows 1000 --seed 0 --table TABLE.md`. No cluster is in it: each driver is
a fork of this process, which has all libraries in memory, and does the whole recipe of
small_recipe.py over a real store. In a *run*, one blow after another falls upon the drivers of one
recipe; then one more ends it undisturbed. What it leaves must be what a run without blows leaves,
and some order must explain what all drivers saw (history.py). Numbers are drawn from the seed and
the number of the run; of several drivers at once each is struck at its own step, in whatever order
the machine runs them.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before torch and transformers are imported: one thread a process, and no download.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import small_recipe
from blow_table import Blow, judged, table
from blown_run import TTL_S, BlowFailed, Run, Undisturbed
from plants import PLANTS
from strikes import HOUR_S, Strike, cut_power

from cwpo_dist.training import deepspeed_engine as engine  # noqa: F401 (DeepSpeed, so that no fork has to import it)

KINDS = ("kill", "kill two", "kill one of two", "stop", "power", "full", "refuse", "clock")
ON_S3 = ("kill", "kill one of two", "stop", "refuse")  # the others are about a disk, or this host
S3_SHARE = 0.1
MOST_A_RUN = 5
Begun = tuple[Undisturbed, Mapping[str, bytes]]  # a run without blows: its steps, and its outputs
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


def strike(run: Run, kind: str, draw: random.Random, undisturbed: Undisturbed) -> None:
    """One blow, to its end: no driver is alive afterwards."""
    killed = Strike("kill", **undisturbed.drawn(run, draw))
    if kind == "kill":
        run.start(killed)
    elif kind == "kill two":
        run.start(killed)
        run.start(Strike("kill", **undisturbed.drawn(run, draw)))
        run.wait()
        run.kill()
    elif kind == "kill one of two":
        run.start(killed)
        run.start(Strike())
    elif kind == "stop":
        _stop(run, replace(killed, what="stop"))
    elif kind == "power":
        _cut_power(run, killed, draw)
    elif kind == "clock":
        shift = draw.choice([-HOUR_S, HOUR_S])
        run.start(replace(killed, shift_s=shift))
        if draw.random() < 0.5:
            run.start(Strike(shift_s=draw.choice([0.0, -shift])))
    else:
        what = "full" if kind == "full" else "refuse"
        run.start(replace(killed, what=what, thread="MainThread", seed=draw.getrandbits(32)))
    while run.alive:
        run.wait()


def _stop(run: Run, stopped: Strike) -> None:
    """It stands still while another comes, and then goes on."""
    process = run.start(stopped)
    if os.WIFSTOPPED(run.wait(process, or_stopped=True)):
        if next(line["struck"] for line in reversed(run.lines()) if "struck" in line) == "align":
            time.sleep(1.2 * TTL_S)  # else the other is told that it lives, and gives up
        run.wait(run.start(Strike()))
        os.kill(process, signal.SIGCONT)


def _cut_power(run: Run, killed: Strike, draw: random.Random) -> None:
    """All end at once, perhaps just after one has ended well, and the disk is as it may be then."""
    first = run.start(Strike() if draw.random() < 0.25 else killed)
    if draw.random() < 0.5:
        run.start(Strike())
    run.wait(first)
    run.kill()
    number = run.machine.began(op="cut", name="")
    lost = cut_power(Path(run.uri), run.log, draw)
    run.machine.ended(number, outcome="done")
    run.machine.line(struck="the disk", lost=lost)


def blown(run: Run, kinds: list[str], draw: random.Random, undisturbed: Undisturbed) -> list[Blow]:
    """Blows of these kinds, one after another, and a driver that ends the recipe undisturbed."""
    found, place = [], "disk" if run.on_disk else "s3"
    for kind in kinds:
        before = len(run.lines()) if run.log.exists() else 0
        strike(run, kind, draw, undisturbed)
        lines = run.lines()[before:]
        said = tuple(line["said"] for line in lines if "said" in line)
        fell = [line for line in lines if "struck" in line]
        if fell:
            found.append(Blow(kind, place, fell[0]["at"], fell[0]["struck"], said))
        elif said and len(run.alive) == 0 and kind in {"kill", "power"}:
            raise BlowFailed(f"a driver that nothing befell ended by {said}")
        if any("steps" in line for line in lines):  # the recipe is done
            break
    _undisturbed(run)
    return found


def _undisturbed(run: Run) -> None:
    status = run.wait(run.start(Strike()))
    if status:
        told = [f"{line['said']}: {line['message']}" for line in run.lines() if "said" in line]
        raise BlowFailed(f"the last driver, which nothing befell, ended by {told[-1:]}")


def forked(task: Callable[[], Any], answer: Path) -> Any:
    """What a task gives as JSON, done in a fork: it may start threads, this process may not."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            answer.write_text(json.dumps(task()))
            code = 0
        except BaseException as error:  # noqa: BLE001 (a fork must end here, whatever it was)
            sys.stderr.write(f"{error!r}\n")
        os._exit(code)
    if os.waitpid(process, 0)[1]:
        raise BlowFailed(f"no answer in {answer}")
    return json.loads(answer.read_text())


def warmed(folder: Path) -> Begun:
    """A run without blows: its steps and outputs; what it imported, this process imports, too."""
    small_recipe.write_inputs(folder / "inputs")
    quiet = Run(folder / "quiet", str(folder / "quiet" / "run"), folder / "inputs")
    quiet.folder.mkdir()

    def libraries() -> list[str]:
        small_recipe.stand_in_for_a_cluster()
        small_recipe.drive(small_recipe.configured(quiet.inputs, str(folder / "first" / "run")))
        return list(sys.modules)

    for name in forked(libraries, folder / "modules.json"):
        if name not in sys.modules and not name.startswith("__"):
            try:
                importlib.import_module(name)
            except ImportError:  # some are made by others, under names that no file has
                continue
    gc.collect()
    gc.freeze()  # a fork that collects garbage would copy all this memory
    quiet.wait(quiet.start(Strike()))
    read = {path: path.read_bytes() for path in Path(quiet.uri).rglob("*") if path.is_file()}
    named = {str(path.relative_to(quiet.uri)): data for path, data in read.items()}
    return Undisturbed.of(quiet), named


@contextmanager
def s3_server() -> Iterator[None]:
    """An S3 server on loopback in a process of its own, with a bucket `blows`."""
    command = [sys.executable, "-c", SERVER]
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, text=True)
    assert server.stdout is not None
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",  # pragma: allowlist secret
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        yield
    finally:
        server.kill()
        server.wait()


def make_bucket() -> None:
    """Called in a fork."""
    import s3fs

    s3fs.S3FileSystem().mkdir("/blows")


def lane(folder: Path, args: argparse.Namespace, number: int, begun: Begun) -> None:
    """Every so-manieth run, until this lane's share of the blows has fallen; a line for each."""
    undisturbed, quiet = begun
    fell = 0
    for run_number in range(number, 10**9, args.lanes) if args.run is None else [args.run]:
        if fell >= args.blows / args.lanes:
            break
        draw = random.Random(f"{args.seed} {run_number}")
        s3 = draw.random() < args.s3
        allowed = [kind for kind in args.kinds if not s3 or kind in ON_S3] or list(args.kinds)
        kinds = draw.choices(allowed, k=draw.randint(1, MOST_A_RUN))
        place = folder / f"run-{run_number}"
        place.mkdir()
        uri = f"s3://blows/run-{run_number}" if s3 else str(place / "run")
        run = Run(place, uri, folder / "inputs", PLANTS[args.plant] if args.plant else None)
        result: dict[str, Any] = {"run": run_number, "kinds": kinds, "blows": []}
        try:
            blows = blown(run, kinds, draw, undisturbed)
            answer = place / "judged.json"
            result |= forked(lambda r=run, b=blows: judged(r, quiet, b), answer)  # type: ignore[misc]  # of its defaults
            wrong = result["lost"] + result["doubled"] + result["violations"]
        except BlowFailed as error:
            wrong = [str(error)]
        result["wrong"] = wrong
        fell += max(1, len(result["blows"]))
        with (folder / "results.jsonl").open("a") as lines:
            lines.write(json.dumps(result) + "\n")
        if not wrong and args.run is None:
            shutil.rmtree(place)


def blows(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs; what is said of each."""
    folder.mkdir(parents=True, exist_ok=True)
    with s3_server():
        begun = warmed(folder)
        forked(make_bucket, folder / "bucket.json")
        lanes = [_lane_of_its_own(folder, args, number, begun) for number in range(args.lanes)]
        for process in lanes:
            assert os.waitpid(process, 0)[1] == 0, "a lane broke; see above"
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def _lane_of_its_own(folder: Path, args: argparse.Namespace, number: int, begun: Begun) -> int:
    """Its process."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            lane(folder, args, number, begun)
            code = 0
        except BaseException:  # noqa: BLE001 (a fork must end here, whatever it was)
            traceback.print_exc()
        os._exit(code)
    return process


def main() -> int:
    """The command line; 1 where a run did not end as it must."""
    given = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given.add_argument("--blows", type=int, default=1000)
    given.add_argument("--seed", default="0")
    given.add_argument("--run", type=int, help="this one alone, whose folder is kept")
    given.add_argument("--lanes", type=int, default=2, help="runs at once")
    given.add_argument(
        "--s3", type=float, default=S3_SHARE, help="share of the runs that are on S3"
    )
    given.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    given.add_argument("--plant", choices=PLANTS, help="a fault that the blows must find")
    given.add_argument("--folder", type=Path, help="for runs that fail; else a temporary one")
    given.add_argument("--table", type=Path, help="a Markdown file to write")
    args = given.parse_args()
    if args.run is not None:
        args.lanes = 1
    folder = args.folder or Path(tempfile.mkdtemp(prefix="cwpo-blows-"))
    began = time.monotonic()
    results = blows(folder, args)
    wrong = [result for result in results if result["wrong"]]
    for result in wrong:
        told = "\n  ".join(result["wrong"][:5])
        again = f"--seed {args.seed} --run {result['run']}"
        sys.stdout.write(f"{', '.join(result['kinds'])} ({again}, in {folder}):\n  {told}\n")
    shown = table(results)
    fell = sum(len(result["blows"]) for result in results)
    seen = sum(result.get("operations", 0) for result in results)
    sys.stdout.write(
        f"{shown}\n{fell} blows in {len(results)} runs, {len(wrong)} of them wrong; {seen} "
        f"operations explained; {time.monotonic() - began:.0f} s\n"
    )
    if args.table:
        args.table.write_text(shown)
    if not wrong and args.folder is None:
        shutil.rmtree(folder)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
