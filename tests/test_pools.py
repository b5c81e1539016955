"""Pools: what can never be placed is refused; several kinds of nodes share one job."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fleet import SHARDS

from cwpo_dist.config import ConfigError, EvaluateConfig, Pool, PoolConfig
from cwpo_dist.config.load import parse_config
from cwpo_dist.node_disk import staged
from cwpo_dist.placement import Machine, pool_faults
from cwpo_dist.scoring.progress import Progress, Report
from cwpo_dist.storage import Store

PLAIN = Machine(8.0, 0.0, {}, {"zone": "a"})
GPUS = Machine(16.0, 4.0, {"accelerator_type:L4": 1.0, "licence": 2.0}, {"zone": "b"})


def faults(**fields: Any) -> list[str]:
    return list(pool_faults("annotate.", PoolConfig.model_validate(fields), [PLAIN, GPUS]))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cpus_per_actor": 17}, r"annotate\.cpus_per_actor: 17, but the largest node .* has 16"),
        ({"accelerator_type": "H100"}, r"annotate\.accelerator_type: H100, but .* has 0"),
        ({"labels": {"zone": "c"}}, r"annotate\.labels: no node .* has zone=c; start one"),
        ({"labels": {"zone": "!in(a,b)"}}, r"annotate\.labels: no node .* has zone=!in\(a,b\)"),
        ({"resources": {"licence": 3}}, r"annotate\.resources\.licence: 3, but .* has 2"),
        ({"resources": {"tape": 1}}, r"annotate\.resources\.tape: 1, but .* has 0"),
        (
            {"gpus_per_actor": 1, "labels": {"zone": "a"}},
            r"annotate\.cpus_per_actor: 1, but no single .*, gpus_per_actor, labels\.zone",
        ),
        (
            {"gpus_per_actor": 0.5, "num_actors": [9, 20]},
            r"annotate\.num_actors: at least 9, .* 0\.5 GPU, but a cluster of 2 .* room for 8",
        ),
        (
            {"pools": [{"gpus_per_actor": 1}, {"resources": {"tape": 1}}]},
            r"annotate\.pools\.1\.resources\.tape: 1",
        ),
        (
            {"pools": [{"num_actors": [0, 2], "labels": {"zone": "c"}}]},
            r"pools\.0\.labels",
        ),
    ],
)
def test_what_can_never_be_placed_is_refused_by_field(fields: dict[str, Any], said: str) -> None:
    (fault,) = faults(**fields)
    assert re.search(said, fault), fault


@pytest.mark.parametrize(
    "fields",
    [
        {"num_actors": 1000},  # as many as there is room for
        {"gpus_per_actor": 0.5, "num_actors": [8, 20]},
        {"accelerator_type": "L4", "gpus_per_actor": 1, "labels": {"zone": "in(b,c)"}},
        {"labels": {"zone": "!a"}, "resources": {"licence": 2}},
        {"pools": [{"gpus_per_actor": 1}, {"num_actors": [0, 9], "labels": {"zone": "c"}}]},
    ],
)
def test_what_fits_is_not_refused(fields: dict[str, Any]) -> None:
    assert faults(**fields) == []


@pytest.mark.parametrize(
    ("annotate", "said"),
    [
        ({"num_actors": [3, 2]}, "min is above max"),
        ({"gpus_per_actor": 2}, "gpus_per_actor: 2; an actor computes on one GPU .* give 1, or"),
        ({"sharded": True, "batch_invariant": True}, "batch_invariant: .* cannot promise it"),
        ({"cpus_per_actor": 2, "pools": [{}]}, "given beside cpus_per_actor"),
        ({"pools": [{"resources": {"CPU": 2}}]}, r"pools\.0.*resources\.CPU: give cpus_per_actor"),
    ],
)
def test_pools_that_make_no_sense_are_refused(annotate: dict[str, Any], said: str) -> None:
    sources = {"sources": [{"path": "pairs.jsonl"}]}
    with pytest.raises(ConfigError, match=said):
        parse_config({"output_dir": "run", "prepare": sources, "annotate": annotate})


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"gpus_per_actor": 2}, "evaluate.*others in vain: .* or several with engine: vllm"),
        ({"engine": "vllm", "gpus_per_actor": 0.5}, "takes the memory of whole GPUs"),
        ({"engine": "vllm", "pools": [{"gpus_per_actor": 1.5}]}, "1.5; give a whole number"),
    ],
)
def test_gpus_that_no_engine_would_use_are_refused(evaluate: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(
            {"output_dir": "run", "prepare": {"sources": [{"path": "p"}]}, "evaluate": evaluate}
        )


def test_a_gold_model_scores_on_each_of_the_gpus_that_answers_were_written_on() -> None:
    pools = [Pool(num_actors=[0, 2], gpus_per_actor=4, cpus_per_actor=2), Pool(gpus_per_actor=1)]
    config = EvaluateConfig(engine="vllm", pools=pools)
    several, one = config.one_gpu_an_actor().actor_pools()
    assert (several.num_actors, several.gpus_per_actor, several.cpus_per_actor) == ((0, 8), 1, 0.5)
    assert (one.max_actors, one.gpus_per_actor) == (1, 1)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What nodes of several kinds did; they live on this machine, in a process of their own."""
    script = Path(__file__).parent / "fleet.py"
    scratch = tempfile.mkdtemp(prefix="cwpo-")  # short: a socket's path may have 107 bytes
    folder = tmp_path_factory.mktemp("fleet")
    command = [sys.executable, str(script), str(folder)]
    environment = os.environ | {"RAY_TMPDIR": scratch}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    shutil.rmtree(scratch, ignore_errors=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.long
def test_a_fast_pool_takes_more_shards_and_none_waits_behind_the_slow_one(
    fleet: dict[str, Any],
) -> None:
    assert fleet["mixed"].count("fast") > fleet["mixed"].count("slow") > 0
    assert fleet["throughput"]["actors"] == 2
    assert fleet["throughput"]["tail_s"] < 1.5


@pytest.mark.long
def test_actors_run_where_their_resources_are_and_nowhere_else(fleet: dict[str, Any]) -> None:
    assert fleet["custom"] == ["fast"] * SHARDS
    assert "never: pools.1.labels: no node" in fleet["refused"]
    assert "kind=purple" in fleet["refused"]


@pytest.mark.long
def test_a_lost_nodes_shard_is_done_elsewhere_and_a_node_that_comes_works(
    fleet: dict[str, Any],
) -> None:
    assert set(fleet["lost"]) == {"fast", "late"}
    assert 0 < fleet["lost_s"] < 50, "nothing was under way on the lost node, or it waited for it"


@pytest.mark.long
def test_one_pool_does_a_lost_nodes_shard_on_what_is_left(fleet: dict[str, Any]) -> None:
    assert fleet["alone"] == ["fast"] * SHARDS
    assert 0 < fleet["alone_s"] < 50, "nothing was under way on the lost node, or it waited for it"


def test_actors_that_start_at_once_copy_a_remote_model_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = Store(f"memory://{tmp_path.name}/model")
    for name in ("config.json", "weights.bin"):
        store.create(name, name.encode())
    copied, get_file = [], store.filesystem.get_file

    def slow(path: str, to: str) -> None:
        copied.append(path)
        time.sleep(0.1)
        get_file(path, to)

    monkeypatch.setattr(store.filesystem, "get_file", slow)
    with ThreadPoolExecutor(4) as actors:
        places = list(actors.map(lambda _: staged(store), range(4)))
    assert len(set(places)) == 1
    assert len(copied) == 2, "each file once"
    assert (places[0] / "weights.bin").read_bytes() == b"weights.bin"
    shutil.rmtree(places[0])
    half = places[0].with_suffix(".partial")  # as a copier leaves it that was killed
    half.mkdir()
    (half / "weights.bin").write_bytes(b"weig")
    (half / "stale.json").touch()
    assert sorted(path.name for path in staged(store).iterdir()) == ["config.json", "weights.bin"]
    assert (places[0] / "weights.bin").read_bytes() == b"weights.bin"


def test_throughput_is_counted_by_hand() -> None:
    counts = {"rows": 130, "reused": 30, "tokens": 5000, "padded_tokens": 6250, "flops": 10**9}
    counts["rejects"] = 2
    progress = Progress("scores", 10, 7, [Pool(gpus_per_actor=0.5), Pool(cpus_per_actor=3)])
    with progress:
        # The first report was 0.8 s longer on its way than the last one of the same actor.
        for shard, actor, pool, up_s in (
            (7, "gpu", 0, 10.0),
            (8, "cpu", 1, 4.0),
            (9, "gpu", 0, 11.0),
        ):
            progress.add(Report(shard, actor, pool, 3.0, up_s, counts if shard < 9 else {}))
            time.sleep(0.1)
    found = progress.throughput()
    assert found["seconds"] == pytest.approx(11.0, abs=0.05)
    assert found["answers_per_s"] == pytest.approx(200 / 11.0, rel=0.01)
    assert found["padding_share"] == pytest.approx(0.2)
    assert found["useful_flops_per_s"] == pytest.approx(2e9 / 11.0, rel=0.01)
    hours = (0.5 * 11.0 + 3 * 4.0) / 3600
    assert found["device_hours"] == pytest.approx(hours, rel=0.01)
    assert found["device_hours_per_million_answers"] == pytest.approx(hours * 5000, rel=0.01)
    assert found["busy_share"] == pytest.approx(9.0 / 15.0, rel=0.01)
    assert found["tail_s"] == pytest.approx(0.1, abs=0.05)
    assert progress.line().startswith("scores: 100%, 0:00:00 left")
    assert progress.line().endswith("4 set aside, 10/10 shards")


def test_on_a_narrow_terminal_bar_and_rates_have_their_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("TERM", "xterm"), ("FORCE_COLOR", "1"), ("COLUMNS", "60")):
        monkeypatch.setenv(name, value)
    with Progress("scores", 4, 0, [Pool()]) as progress:
        sys.stderr.write("a log line on the way\n")
        progress.add(Report(0, "a", 0, 1.0, 2.0, {"rows": 10}))
        progress.add(Report(1, "a", 0, 1.0, 3.0, {"rows": 10}))  # so soon nothing is drawn again
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    lines = [line for line in re.split(r"[\r\n]+", shown) if line.strip()]
    assert "a log line on the way" in lines, "it stands in a line of its own"
    bar = lines[-1]
    assert len(bar) <= 60
    assert re.match(r"[━╸╺]{12} scores: 25%, 0:00:06 left, 5\.0 answers/s, .*…$", bar), bar
