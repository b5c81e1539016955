"""The stage when rows or files are bad, or its driver dies: nothing vanishes or is doubled."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from botocore.exceptions import EndpointConnectionError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepared import add_up, config, files, rejects, row, write

from cwpo_dist.canonical import to_json
from cwpo_dist.config import ConfigError
from cwpo_dist.pairs import cutting
from cwpo_dist.pairs.readers import SourceError
from cwpo_dist.pairs.rejects import RejectsError
from cwpo_dist.pairs.sources import source_fingerprints
from cwpo_dist.stages import prepare as stage
from cwpo_dist.stages.prepare import prepare
from cwpo_dist.storage import MANIFEST, StorageError, Store


@pytest.mark.usefixtures("in_process")
def test_past_max_reject_fraction_the_stage_fails_and_the_rejects_lie_there(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [row(i, chosen="" if i < 6 else "yes") for i in range(100)])
    store = Store(str(tmp_path / "out"))
    with pytest.raises(RejectsError, match=r"6 of 100 rows[^|]*6 × empty answer: chosen"):
        prepare(store, config(path), seed=0)
    assert len(rejects(store)) == 6
    assert prepare(store, config(path, max_reject_fraction=0.06), seed=0)["pairs"] == 94


@pytest.mark.usefixtures("in_process")
def test_one_torn_file_of_many_is_set_aside_and_several_stop_the_stage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(20):
        write(tmp_path / f"{i:02d}.jsonl", [row(f"{i} {j}") for j in range(30)])
    torn = gzip.compress(b"".join(json.dumps(row(os.urandom(9).hex())).encode() for _ in "ab"))
    (tmp_path / "20.jsonl.gz").write_bytes(torn[:-9])
    given_config = config(str(tmp_path / "*.jsonl*"), max_reject_fraction=0.05)
    store = Store(str(tmp_path / "out"))
    with caplog.at_level("WARNING"):
        counts = prepare(store, given_config, seed=0)
    add_up(counts, store)
    assert (counts["pairs"], counts["damaged_files"]) == (600, 1)
    assert counts["rejects"] == {"damaged file": 1}
    (bad,) = rejects(store)
    assert (bad["source"], bad["position"]) == (str(tmp_path / "20.jsonl.gz"), 1)
    assert "20.jsonl.gz cannot be read from here on: EOFError" in caplog.text
    for name in ("21", "22"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(torn[:-9])
    with pytest.raises(SourceError, match=r"3 of 23 files are damaged, more than prepare\.max_rej"):
        prepare(Store(str(tmp_path / "more")), given_config, seed=0)


class Killed(Exception):
    """Stands for the end of the driver."""


@pytest.mark.usefixtures("in_process", "many_files")
def test_a_driver_that_dies_at_any_step_ends_with_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        rows = [row(i, chosen="" if i == 3 else name * (i % 2)) for i in range(12)]
        write(tmp_path / f"{name}.jsonl", rows)
    wanted = config(
        str(tmp_path / "*.jsonl"), rows_per_shard=2, group_column="prompt", max_reject_fraction=1.0
    )
    steps = LimitedSteps(monkeypatch)
    undisturbed = Store(str(tmp_path / "undisturbed"))
    counts = prepare(undisturbed, wanted, seed=0)
    total = steps.taken
    assert total > 20
    for limit in range(total):
        store = Store(str(tmp_path / f"out{limit}"))
        steps.taken, steps.limit = 0, limit
        with pytest.raises(Killed):
            prepare(store, wanted, seed=0)
        steps.limit = None
        assert prepare(store, wanted, seed=0) == counts
        assert files(store) == files(undisturbed)


def killed(*given: Any) -> None:
    raise Killed


@pytest.mark.usefixtures("in_process", "many_files")
def test_a_summary_whose_rows_are_gone_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.jsonl", [row(i) for i in range(50)])
    store = Store(str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_write", killed)
        with pytest.raises(Killed):
            prepare(store, config(path), seed=0)
    store.remove("work/rows/00000-00001.parquet")
    assert prepare(store, config(path), seed=0)["pairs"] == 50


@pytest.mark.usefixtures("in_process", "many_files")
@pytest.mark.parametrize("commits", [True, False], ids=["commits", "dies before its commit"])
def test_of_two_drivers_at_once_both_end_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commits: bool
) -> None:
    """Another does all of it, and removes `work/`, at any step of the first."""
    write(tmp_path / "a.jsonl", [row(i, chosen="" if i == 3 else "a") for i in range(12)])
    write(tmp_path / "b.jsonl", [row(i, chosen="b" * (i % 2)) for i in range(12)])
    wanted = config(
        str(tmp_path / "*.jsonl"), rows_per_shard=2, group_column="prompt", max_reject_fraction=1.0
    )
    undisturbed = Store(str(tmp_path / "undisturbed"))
    monkeypatch.setattr(stage, "_PAUSE_S", 0.0)
    create, taken, other_at = Store.create, 0, -1

    def step(store: Store, name: str, data: bytes) -> bool:
        nonlocal taken
        taken += 1
        if taken == other_at:
            found = prepare(store, wanted, seed=0)
            assert found == counts
            if commits:
                create(store, MANIFEST, to_json({"counts": found}))
        return create(store, name, data)

    monkeypatch.setattr(Store, "create", step)
    counts = prepare(undisturbed, wanted, seed=0)
    steps = taken
    assert steps > 20
    for at in range(1, steps, 3):
        store, taken, other_at = Store(str(tmp_path / f"out{at}")), 0, at
        assert prepare(store, wanted, seed=0) == counts
        store.remove(MANIFEST)
        assert files(store) == files(undisturbed)


@pytest.mark.usefixtures("in_process")
def test_an_outage_while_work_is_read_is_one_sentence(
    tmp_path: Path, s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.jsonl", [row(i) for i in range(20)])
    call = s3fs.S3FileSystem._call_s3

    async def away(filesystem: Any, method: str, *given: Any, **how: Any) -> Any:
        if method == "get_object" and "work" in how["Key"].split("/"):
            raise EndpointConnectionError(endpoint_url="http://s3")
        return await call(filesystem, method, *given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_call_s3", away)
        with pytest.raises(StorageError, match=r"cannot be reached.*check the network") as caught:
            prepare(s3_store, config(path), seed=0)
    assert "\n" not in str(caught.value)
    assert prepare(s3_store, config(path), seed=0)["pairs"] == 20


class LimitedSteps:
    """Counts what changes a store, and ends the driver when a limit is reached."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = 0
        self.limit: int | None = None
        for name in ("create", "remove"):
            monkeypatch.setattr(Store, name, self._counted(getattr(Store, name)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any) -> Any:
            if self.taken == self.limit:
                raise Killed
            self.taken += 1
            return method(*given)

        return step


LINE = st.one_of(
    st.binary(max_size=30).filter(lambda line: b"\n" not in line),
    st.builds(
        lambda prompt, chosen, rejected: json.dumps(
            {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        ).encode(),
        *[st.sampled_from(["x", "y", "", "\ud800", None, 3, ["z"]]) for _ in range(3)],
    ),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINE, max_size=25))
@pytest.mark.usefixtures("in_process", "many_files")
def test_no_line_vanishes_and_none_crashes(tmp_path: Path, lines: list[bytes]) -> None:
    good = json.dumps(row(0)).encode()
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([good, *lines]))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    store = Store(str(tmp_path / "out"))
    given_config = config(str(tmp_path / "x.jsonl"), max_reject_fraction=1.0)
    counts = prepare(store, given_config, seed=0)
    add_up(counts, store)
    assert counts["rows_in"] == 1 + sum(bool(line.strip()) for line in lines)


CHILD = """
import sys, time
import ray
from cwpo_dist.config import PrepareConfig
from cwpo_dist.pairs import cutting, pieces
from cwpo_dist.stages import prepare

cutting.JOIN_BYTES = 1

def slow(*given):
    time.sleep(0.1)
    pieces.read_piece(*given)

prepare.read_piece = slow
ray.init(num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[3])
config = PrepareConfig(sources=[{"path": sys.argv[1]}], rows_per_shard=16)
prepare.prepare(prepare.Store(sys.argv[2]), config, 0)
"""


@pytest.fixture
def ray_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A short path: Ray's sockets below it have names of at most 107 bytes."""
    folder = f"/tmp/cwpo-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long
def test_a_killed_driver_goes_on_where_it_was(
    tmp_path: Path, ray_folder: str, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "JOIN_BYTES", 1)
    for i in range(40):
        write(tmp_path / f"{i}.jsonl", [row(f"{i} {j}") for j in range(20)])
    out = tmp_path / "out"
    command = [sys.executable, "-c", CHILD, str(tmp_path / "*.jsonl"), str(out), ray_folder]
    with subprocess.Popen(command, start_new_session=True) as child:
        deadline = time.monotonic() + 120
        while len(list((out / "work" / "pieces").glob("*.json"))) < 5:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(child.pid, signal.SIGKILL)
    done = len(list((out / "work" / "pieces").glob("*.json")))
    assert done < 40
    wanted = config(str(tmp_path / "*.jsonl"), rows_per_shard=16)
    counts = prepare(Store(str(out)), wanted, seed=0)
    undisturbed = Store(str(tmp_path / "undisturbed"))
    assert prepare(undisturbed, wanted, seed=0) == counts
    # Workers outlive their driver for a moment and may still write what nobody reads any more.
    left = {name: data for name, data in files(Store(str(out))).items() if name[:5] != "work/"}
    assert left == files(undisturbed)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("how", ["longer", "shorter", "gone", "as long"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its pairs would lie under the key of what it was."""
    path, other = tmp_path / "x.jsonl", write(tmp_path / "y.jsonl", [row("other")])
    write(path, [row(i) for i in range(40)])
    reading = stage._read

    def changed(*given: Any) -> None:
        reading(*given)
        if how == "gone":
            path.unlink()
            return
        number = {"longer": 60, "shorter": 20, "as long": 40}[how]
        write(path, [row(99 - i) for i in range(number)])
        os.utime(path, (1.0, 1.0))

    monkeypatch.setattr(stage, "_read", changed)
    store = Store(str(tmp_path / "out"))
    with pytest.raises(
        (SourceError, ConfigError), match=r"x\.jsonl' changed while|nothing to read at"
    ):
        prepare(store, config(str(path), other), seed=0)
    assert not store.names("pairs")


@pytest.mark.usefixtures("in_process")
def test_files_that_come_while_a_folder_is_read_are_the_next_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.jsonl", [row(i) for i in range(40)])
    reading = stage._read

    def grown(*given: Any) -> None:
        reading(*given)
        write(folder / "b.jsonl", [row(i) for i in range(40, 80)])

    monkeypatch.setattr(stage, "_read", grown)
    assert prepare(Store(str(tmp_path / "out")), config(str(folder)), seed=0)["pairs"] == 40
    known = source_fingerprints(config(str(folder)))
    write(folder / "c.jsonl", [row(80)])
    with pytest.raises(SourceError, match="changed before it was read"):
        prepare(Store(str(tmp_path / "again")), config(str(folder)), 0, known)
