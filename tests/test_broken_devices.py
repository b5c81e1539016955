"""A device that breaks costs its actor, not the run; what breaks every device ends it by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from cwpo_dist.config import PoolConfig
from cwpo_dist.pairs.records import REJECT_SCHEMA
from cwpo_dist.scoring.driver import run_shards
from cwpo_dist.scoring.pipeline import ShardJob
from cwpo_dist.scoring.retries import Input, ShardOutput
from cwpo_dist.scoring.tickets import Broken, ShardError, TicketShards
from cwpo_dist.storage import Store

BROKEN = "CUDA error: uncorrectable ECC error encountered\nand more lines"
POOL = PoolConfig(num_actors=2, cpus_per_actor=0.5)


@dataclass
class Breaking:
    """A worker with a device that is broken: for its first shard, for ever, or by one shard.

    As CUDA does, a broken device fails at everything until its process ends.
    """

    trace: Path
    how: str
    broken: bool = False

    def __post_init__(self) -> None:
        (self.trace / f"process-{os.getpid()}").touch()

    def read(self, index: int) -> list[Input[None]]:
        return [Input(f"{index}-{i}", i, None) for i in range(3)]

    def __call__(self, index: int, rows: list[Input[None]]) -> ShardOutput:
        time.sleep(0.3)
        (self.trace / f"tried-{index}-{time.monotonic_ns()}").touch()
        if self.how == "once" and self._first():
            self.broken = True
        if self.how == "always" or (self.how == "by a shard" and index == 4):
            self.broken = True
        if self.broken:
            raise RuntimeError(BROKEN)
        table = pa.table({"square": [index * index] * len(rows)})
        counts = {"rows_in": len(rows), "rows": len(rows)}
        return ShardOutput(table, REJECT_SCHEMA.empty_table(), counts)

    def _first(self) -> bool:
        try:
            (self.trace / "broke").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def job(tmp_path: Path, how: str) -> ShardJob:
    trace = tmp_path / "trace"
    trace.mkdir()
    return ShardJob("squares", Store(str(tmp_path / "out")), 8, partial(Breaking, trace, how))


def traces(tmp_path: Path, of: str) -> list[str]:
    return sorted(path.name for path in (tmp_path / "trace").glob(f"{of}-*"))


@pytest.mark.usefixtures("ray_local")
def test_a_device_that_breaks_once_costs_its_process_and_nothing_else(tmp_path: Path) -> None:
    work = job(tmp_path, "once")
    counts = run_shards(work, POOL)
    assert (counts["rows_in"], counts["rows"]) == (24, 24)
    for index in range(8):
        found = work.output.read_table(work.file(index)).to_pylist()
        assert found == [{"square": index * index}] * 3
    processes = len(traces(tmp_path, "process"))
    assert 2 <= processes <= 3, "two actors, and one in a new process, unless all is done before"
    assert len(traces(tmp_path, "tried")) == 9, "no shard was tried again where it broke"


FAILS = """
import json, sys, time
from pathlib import Path
import ray
from test_broken_devices import POOL, job
from cwpo_dist.scoring.driver import run_shards
from cwpo_dist.scoring.pool import run_pools
from cwpo_dist.scoring.tickets import Broken, ShardError

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
work = job(Path(sys.argv[1]), "by a shard")
try:
    if sys.argv[3] == "first":
        list(run_pools(work, [4], POOL.actor_pools(), Broken({}, {4: {"one", "two"}})))
    run_shards(work, POOL)
except ShardError as error:
    kept = error
end = time.monotonic() + 60
while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < end:
    time.sleep(0.2)
found = {"error": str(kept), "cpus": ray.available_resources().get("CPU")}
found["type"] = type(kept).__name__
Path(sys.argv[2]).write_text(json.dumps(found))  # Ray writes into what is printed
"""


@pytest.mark.parametrize(("task", "most"), [("later", 4), ("first", 1)])
def test_a_shard_that_breaks_every_device_ends_the_run(
    task: str, most: int, tmp_path: Path
) -> None:
    """And its actors go, though its error is kept; in a process of its own, as pytest keeps more.

    Log records with their tracebacks, that is. Also where it is the first task of its actors, as in
    a round that begins when others broke: other objects of Ray Data then lead to them.
    """
    result = tmp_path / "result.json"
    command = [sys.executable, "-c", FAILS, str(tmp_path), str(result), task]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=True)
    found = json.loads(result.read_text())
    assert found["type"] == "RayTaskError(ShardError)", "it comes from the actor that keeps count"
    assert found["cpus"] == 2.0, found
    assert "CUDA error: uncorrectable ECC error encountered" in found["error"]
    tried = [name for name in traces(tmp_path, "tried") if name.startswith("tried-4-")]
    assert max(1, most - 1) <= len(tried) <= most


@pytest.mark.long
@pytest.mark.usefixtures("ray_local")
def test_where_every_device_is_broken_the_run_ends(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"broke 2 times .*no other is left.*reset or replace it"):
        run_shards(job(tmp_path, "always"), POOL)


def test_a_shard_goes_to_another_device_first() -> None:
    shards = TicketShards("squares", [0, 1, 2], 9)
    assert shards.take(0, "t0", "n", "bad") == 0
    assert shards.take(0, "t1", "n", "good") == 1
    shards.broke(0, "t0", "bad", "why")
    assert shards.take(0, "t0", "n", "bad") == 2, "not the one that it broke over"
    assert shards.take(0, "t2", "n", "good") == 0
    shards.broke(0, "t0", "bad", "why")
    assert shards.take(0, "t0", "n", "bad") == "later", "it broke twice"
    assert shards.take(0, "t3", "n", "good") == 2
    for index in range(3):
        shards.done(index)
    assert shards.take(0, "t0", "n", "bad") is None


def test_a_device_alone_gets_its_shard_again() -> None:
    shards = TicketShards("squares", [0], 9)
    assert shards.take(0, "t0", "n", "only") == 0
    shards.broke(0, "t0", "only", "why")
    assert shards.take(0, "t0", "n", "only") == 0
    with pytest.raises(ShardError, match=r"no other is left \(only\)"):
        shards.broke(0, "t0", "only", "why")


def test_three_devices_over_one_shard_are_its_fault() -> None:
    shards = TicketShards("squares", [0, 1], 9)
    for number in range(3):
        assert shards.take(0, f"t{number}", "n", f"d{number}") == 0
        if number < 2:
            shards.broke(0, f"t{number}", f"d{number}", "why")
    with pytest.raises(ShardError, match=r"squares: shard 0 broke 3 devices \(why\)"):
        shards.broke(0, "t2", "d2", "why")


def test_what_another_pool_has_under_way_or_has_done_waits_for_nobody() -> None:
    shards = TicketShards("squares", [0, 1], 9)
    assert shards.take(0, "t0", "n", "a") == 0
    assert shards.take(1, "t0", "n", "b") == 1
    assert shards.take(1, "t1", "n", "c") == 0, "as nothing waits any more"
    shards.broke(0, "t0", "a", "why")
    assert not shards.waiting
    shards.done(0)
    shards.broke(1, "t1", "c", "why")
    assert not shards.waiting


def test_what_waits_for_a_lost_node_alone_is_stranded() -> None:
    """The caller then comes again with other actors, where a broken device is told of by name."""
    shards = TicketShards("squares", [0, 1, 2], 9)
    assert not shards.stranded({"here"}), "no actor has come up yet"
    assert shards.take(0, "t0", "here", "bad") == 0
    assert shards.take(0, "t1", "gone", "good") == 1
    shards.broke(0, "t0", "bad", "why")
    assert shards.take(0, "t0", "here", "bad") == 2
    shards.broke(0, "t0", "bad", "why")
    assert not shards.stranded({"here", "gone"})
    assert shards.stranded({"here"})


def test_a_shard_whose_last_tickets_lie_with_a_broken_device_is_stranded() -> None:
    """Ray Data hands them out ahead, and ends the actor on the good one, which has none left."""
    shards = TicketShards("squares", [0], 4)
    assert shards.take(0, "t0", "n", "bad") == 0
    assert shards.take(0, "t1", "n", "good") is None, "it goes away"
    shards.broke(0, "t0", "bad", "why")
    assert shards.take(0, "t0", "n", "bad") == 0
    shards.broke(0, "t0", "bad", "why")
    assert shards.take(0, "t0", "n", "bad") == "later"
    assert not shards.stranded({"n"}), "two tickets have not asked, and t0 holds up one at most"
    assert shards.take(0, "t2", "n", "bad") == "later"
    assert shards.stranded({"n"})
    known = shards.close()
    assert (known.breaks, known.over, known.all_that_came) == ({"bad": 2}, {0: {"bad"}}, False)
    again = TicketShards("squares", [0], 4, known)
    assert again.take(0, "t0", "n", "bad") == "later", "it is known"
    assert again.take(0, "t1", "n", "new") == 0
    again.broke(0, "t1", "new", "why")
    assert again.take(0, "t1", "n", "newer") == 0
    with pytest.raises(ShardError, match="shard 0 broke 3 devices"):
        again.broke(0, "t1", "newer", "why")


def test_where_only_broken_devices_come_again_that_is_known() -> None:
    shards = TicketShards("squares", [0], 1, Broken({"bad": 2}))
    assert not shards.stranded({"n"}), "the device has not come up yet"
    assert shards.take(0, "t0", "n", "bad") == "later"
    assert shards.stranded({"n"})
    assert shards.close().all_that_came
