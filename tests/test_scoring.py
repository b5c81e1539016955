"""The sharded pipeline on a real Ray: each shard once; resumed, killed, or refused."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cwpo_dist.config import ConfigError, PoolConfig
from cwpo_dist.pairs.records import REJECT_SCHEMA
from cwpo_dist.scoring.device_time import held_hours
from cwpo_dist.scoring.driver import run_here, run_shards
from cwpo_dist.scoring.pipeline import ShardJob, commit, total_counts
from cwpo_dist.scoring.retries import Input, ShardOutput
from cwpo_dist.storage import Store

NO_REJECTS = REJECT_SCHEMA.empty_table()


@dataclass
class Squares:
    """A worker whose rows are a function of the shard number; leaves a trace of every call."""

    trace: Path
    killed_at: int = -1
    pause: float = 0.0

    def read(self, index: int) -> list[Input[None]]:
        return [Input(f"{index}-{i}", i, None) for i in range(3)]

    def __call__(self, index: int, rows: list[Input[None]]) -> ShardOutput:
        mark = self.trace / f"{index}-{time.monotonic_ns()}"
        mark.touch()
        time.sleep(self.pause)
        if index == self.killed_at and len(list(self.trace.glob(f"{index}-*"))) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        table = pa.table({"square": [index * index] * len(rows)})
        return ShardOutput(table, NO_REJECTS, {"rows_in": len(rows), "rows": len(rows)})


def job(tmp_path: Path, killed_at: int = -1, shards: int = 6) -> ShardJob:
    trace = tmp_path / "trace"
    trace.mkdir(exist_ok=True)
    store = Store(str(tmp_path / "out"))
    return ShardJob("squares", store, shards, partial(Squares, trace, killed_at))


POOL = PoolConfig(num_actors=2, cpus_per_actor=0.5)


@pytest.mark.usefixtures("ray_local")
def test_every_shard_is_committed_and_a_rerun_does_nothing(tmp_path: Path) -> None:
    counts = run_shards(job(tmp_path), POOL)
    speed = counts.pop("throughput")
    assert counts == {"rows_in": 18, "rows": 18}
    assert speed["shards"] == 6
    assert 1 <= speed["actors"] <= 2, "on a busy machine one may have done all before two is up"
    assert 0 < speed["answers_per_s"] == pytest.approx(18 / speed["seconds"], rel=1e-3)
    assert 0 < speed["device_hours"] <= 2 * 0.5 * speed["seconds"] / 3600 * 1.001
    calls = len(list((tmp_path / "trace").iterdir()))
    assert calls == 6
    assert run_shards(job(tmp_path), POOL) == counts
    assert len(list((tmp_path / "trace").iterdir())) == calls
    (tmp_path / "here").mkdir()
    here, there = job(tmp_path / "here").output, job(tmp_path).output
    assert run_here(job(tmp_path / "here")) == counts
    assert here.names() == there.names("squares")
    assert all(here.read(name) == there.read(name) for name in here.names())


@pytest.mark.usefixtures("ray_local")
def test_a_killed_actor_loses_and_doubles_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    undisturbed = job(tmp_path / "a")
    run_shards(undisturbed, POOL)
    (tmp_path / "b").mkdir()
    disturbed = job(tmp_path / "b", killed_at=3)
    run_shards(disturbed, POOL)
    assert len(list((tmp_path / "b" / "trace").glob("3-*"))) >= 2, "the blow did not fall"
    names = undisturbed.output.names("squares")
    assert disturbed.output.names("squares") == names
    for name in names:
        assert disturbed.output.read(name) == undisturbed.output.read(name)


@pytest.mark.long
@pytest.mark.usefixtures("ray_local")
def test_device_hours_are_those_of_all_drivers(tmp_path: Path) -> None:
    """Two, each with a part, and a third that stops after its first shard."""
    half, rest = (replace(job(tmp_path), selected=part) for part in ((0, 1), (2, 3)))
    speeds = [run_shards(each, POOL)["throughput"] for each in (half, rest)]
    known = sum(speed["device_hours"] for speed in speeds)
    assert held_hours(half.output) == pytest.approx(known, rel=1e-4)

    def stop(_: int) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        run_shards(job(tmp_path), POOL, stop)
    assert held_hours(half.output) > known
    assert held_hours(Store(str(tmp_path))) == held_hours(half.output), "folders below count"


def test_the_first_commit_wins(tmp_path: Path) -> None:
    work = job(tmp_path)
    first = ShardOutput(pa.table({"square": [1]}), NO_REJECTS, {"rows": 1})
    late = ShardOutput(pa.table({"square": [2]}), NO_REJECTS, {"rows": 1})
    assert commit(work, 0, first)
    assert not commit(work, 0, late)
    assert work.output.read_table(work.file(0)).to_pylist() == [{"square": 1}]


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(("field", "amount"), [("cpus_per_actor", 1000), ("gpus_per_actor", 1)])
def test_an_actor_that_fits_nowhere_is_refused_before_start(
    tmp_path: Path, field: str, amount: int
) -> None:
    pool = PoolConfig.model_validate({field: amount})
    with pytest.raises(ConfigError, match=f"{field}: {amount}, .*largest node .* has .*lower it"):
        run_shards(job(tmp_path), pool)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ray_local")
def test_more_actors_than_there_is_room_for_do_no_harm(tmp_path: Path) -> None:
    counts = run_shards(job(tmp_path, shards=12), PoolConfig(num_actors=9, cpus_per_actor=1.5))
    assert counts["rows"] == 36
    assert counts["throughput"]["actors"] <= 2


def test_metrics_reach_rays_exporter(ray_local: Any, tmp_path: Path) -> None:
    """What Ray's dashboard shows: rows and rates, by stage, while the actors live."""
    port = ray_local.nodes()[0]["MetricsExportPort"]
    work = job(tmp_path)
    work = replace(
        work, name="measured", make_worker=partial(Squares, tmp_path / "trace", pause=1.5)
    )
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(run_shards, work, POOL)
        found: list[str] = []
        while not running.done() and not any("cwpo_rows" in line for line in found):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
                lines = page.read().decode().splitlines()
            found = [line for line in lines if 'stage="measured"' in line]
            time.sleep(0.3)
        running.result()
    assert any("cwpo_rows" in line for line in found), found


def test_counts_that_were_reported_are_not_read_back(tmp_path: Path) -> None:
    job = ShardJob("squares", Store(str(tmp_path)), 3, partial(Squares, tmp_path))
    for index in range(3):
        rows = pa.table({"x": list(range(index + 1))})
        commit(job, index, ShardOutput(rows, NO_REJECTS, {"rows_in": index + 1, "rows": index + 1}))
    everything = total_counts(job)
    assert everything["rows"] == 6
    (tmp_path / job.file(1)).unlink()
    assert total_counts(job, {"rows_in": 2, "rows": 2}, {1}) == everything
