"""A Ray head that comes up on a machine with no CPU to spare, and says why where it does not.

A raylet waits 15 s for its agent, a Python program, and ends where that is not there by then; what
was started with it ends, too. Ray has no setting for it, so a head that ended so is started again.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

# Ray's settings for one node that is not lost, only slow: Ray gives up a node that is silent, and
# it ends.
PATIENT = {"health_check_timeout_ms": 60_000, "health_check_failure_threshold": 20}
RAY = str(Path(sys.executable).with_name("ray"))
START_S = 1200.0  # beside the tests and 40 others that want a core; what ends is seen at once
_LOG, _STARTED = "head.log", b"Ray runtime started."
_SHOWN = 3000  # characters of a log


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on, no two the same."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(number)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]


@contextmanager
def started_head(answers: Callable[[str], bool]) -> Iterator[str]:
    """A Ray head of two CPUs in processes of its own; the URL of its job server, once it is ready.

    Args:
        answers: whether the job server at a URL does, asked again and again.
    """
    deadline = time.monotonic() + START_S
    while True:
        folder = Path(tempfile.mkdtemp(prefix="cwpo-head-"))
        gcs, dashboard, agent, client = free_ports(4)
        url = f"http://127.0.0.1:{dashboard}"
        process = _started(folder, gcs, dashboard, agent, client)
        try:
            ready = partial(_ready, folder, (agent, client), url, answers)
            if _comes_up(process, ready, deadline):
                yield url
                assert process.poll() is None, f"it ended by itself:\n{_last_words(folder)}"
                return
            assert time.monotonic() < deadline, f"no head comes up:\n{_last_words(folder)}"
        finally:
            _end(process)
            shutil.rmtree(folder, ignore_errors=True)


def _started(
    folder: Path, gcs: int, dashboard: int, agent: int, client: int
) -> subprocess.Popen[bytes]:
    arguments = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}"]
    arguments += ["--num-cpus=2", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
    arguments += ["--object-store-memory=200000000", "--disable-usage-stats"]
    # Nobody needs a server of Ray's clients; where it does not come up the head ends with it.
    arguments += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    # Without this checkout on its path: jobs must bring the package along.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {f"RAY_{name}": str(value) for name, value in PATIENT.items()}
    with (folder / _LOG).open("wb") as log:
        # A group of its own, so that all it starts ends with it, and nothing else does.
        return subprocess.Popen(
            [RAY, *arguments], stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _comes_up(process: subprocess.Popen[bytes], ready: Callable[[], bool], deadline: float) -> bool:
    while process.poll() is None and time.monotonic() < deadline:
        if ready():
            return True
        time.sleep(0.5)
    return False


def _ready(folder: Path, ports: Sequence[int], url: str, answers: Callable[[str], bool]) -> bool:
    """Its job server answers before its raylet is past those 15 s, which Ray says, and the rest."""
    started = _STARTED in (folder / _LOG).read_bytes()
    return started and all(map(_listens, ports)) and answers(url)


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _last_words(folder: Path) -> str:
    logs = [folder / _LOG, *folder.glob("session_latest/logs/raylet.*")]
    return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-_SHOWN:]}" for log in logs)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with suppress(ProcessLookupError):  # what outlived its leader, too
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
