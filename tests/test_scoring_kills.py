"""Scoring under blows, with work provably in flight; files then are those of an undisturbed run."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from scoring_driver import POOL, ROWS, SHARDS, held, make_job, write_inputs

from cwpo_dist.cli.app import user_message
from cwpo_dist.pairs.answers import read_answers
from cwpo_dist.scoring.driver import run_shards
from cwpo_dist.scoring.pipeline import committed_rejects, total_counts
from cwpo_dist.storage import StorageError, Store

PATIENCE_S = 120
Driver = subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, ray_local: Any) -> Path:
    """A folder with the inputs, and in `quiet` the files of an undisturbed run."""
    folder = tmp_path_factory.mktemp("kills")
    write_inputs(folder)
    run_shards(make_job(folder, "quiet", seconds=0.0), POOL)
    return folder


def start(folder: Path, output: str, ray_local: Any) -> Driver:
    """A driver in a process of its own, on the same Ray."""
    make_job(folder, output)
    script = Path(__file__).parent / "scoring_driver.py"
    address = ray_local.get_runtime_context().gcs_address
    with (folder / f"{output}.log").open("ab") as log:
        command = [sys.executable, str(script), str(folder), output, address]
        return subprocess.Popen(command, stdout=log, stderr=log)


def in_flight(folder: Path, output: str, driver: Driver) -> list[int]:
    """The processes in which a driver has shards that began and have no committed output."""
    marks = [path.name.split("-") for path in (folder / f"{output}-marks").iterdir()]
    missing = make_job(folder, output).missing()
    own = [int(pid) for index, pid, of in marks if int(index) in missing and int(of) == driver.pid]
    return sorted({pid for pid in own if Path(f"/proc/{pid}").exists()})


def wait_until_busy(folder: Path, output: str, driver: Driver, commits: int) -> list[int]:
    """Until some shards are committed and this driver has others under way; where those are."""
    job, log = make_job(folder, output), folder / f"{output}.log"
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert driver.poll() is None, f"it ended first: {log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        under_way = in_flight(folder, output, driver)
        if under_way and SHARDS - len(job.missing()) >= commits:
            return under_way
        time.sleep(0.01)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def finish(folder: Path, output: str, driver: Driver) -> None:
    assert driver.wait(PATIENCE_S) == 0, (folder / f"{output}.log").read_text()[-4000:]


def assert_undisturbed(folder: Path, output: str) -> None:
    """Byte for byte the files of the quiet run; every row in one place, once."""
    expected, found = Store(str(folder / "quiet")), Store(str(folder / output))
    names = [name for name in found.names() if not name.startswith("held/")]  # no part of it
    assert names == [name for name in expected.names() if not name.startswith("held/")]
    assert len(found.names("scores")) == SHARDS
    for name in names:
        assert found.read(name) == expected.read(name), name
    job = make_job(folder, output)
    rejects = [r for i in range(SHARDS) for r in committed_rejects(job.output, job.file(i))]
    ids = [
        row["answer_id"]
        for i in range(SHARDS)
        for row in job.output.read_table(job.file(i)).to_pylist()
    ] + [row.row for row in rejects]
    given = (read_answers(Store(str(folder)), shard) for shard in range(SHARDS))
    assert sorted(ids) == sorted(answer.answer_id for answers in given for answer in answers)
    assert len(ids) == 2 * SHARDS * ROWS
    counts = total_counts(job)
    assert (counts["rejects"], counts["over_length"]) == (6, 12), "of a long prompt both answers"


def test_a_driver_and_its_actor_killed_while_a_second_driver_works(
    quiet: Path, ray_local: Any
) -> None:
    hold = held(quiet / "two-marks")
    hold.touch()  # else the one whose actors come up first may do it all
    first, second = start(quiet, "two", ray_local), start(quiet, "two", ray_local)
    for driver in (first, second):
        wait_until_busy(quiet, "two", driver, commits=0)
    hold.unlink()
    wait_until_busy(quiet, "two", second, commits=1)
    kill(wait_until_busy(quiet, "two", first, commits=1)[0])
    kill(first.pid)
    assert first.wait() == -signal.SIGKILL, "the first driver had ended"
    assert make_job(quiet, "two").missing(), "nothing was left to do"
    finish(quiet, "two", second)
    assert_undisturbed(quiet, "two")


@pytest.mark.long
def test_a_writer_that_fails_half_way_ends_the_run_and_the_next_one_mends_it(quiet: Path) -> None:
    broken = make_job(quiet, "full", seconds=0.0, full_at=3)
    with pytest.raises(StorageError) as raised:
        run_shards(broken, POOL)
    said = user_message(raised.value) or ""
    # The process can write no more: whichever of its next shards' errors is heard first.
    file = r"'.*part-0000\d\.(\w+\.)?parquet'"
    assert re.match(rf"storage refused to write {file}: .*File too large", said)
    assert 3 in broken.missing()
    assert any("part-00003" in name for name in broken.output.names("rejects")), "not half-way"
    run_shards(make_job(quiet, "full", seconds=0.0), POOL)
    assert_undisturbed(quiet, "full")


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("victims", ["actor", "driver", "both"])
def test_blows_at_random_moments(quiet: Path, ray_local: Any, victims: str, seed: int) -> None:
    dice, output = random.Random(f"{victims}-{seed}"), f"{victims}-{seed}"
    driver = start(quiet, output, ray_local)
    wait_until_busy(quiet, output, driver, commits=dice.randrange(1, SHARDS // 2))
    time.sleep(dice.random() * 0.5)
    under_way = in_flight(quiet, output, driver)
    assert under_way, "nothing was in flight"
    if victims != "driver":
        kill(dice.choice(under_way))
    if victims != "actor":
        kill(driver.pid)
        driver.wait()
        driver = start(quiet, output, ray_local)
    finish(quiet, output, driver)
    assert_undisturbed(quiet, output)
