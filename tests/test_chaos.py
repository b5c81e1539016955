"""Jobs on a cluster of several nodes: a blow, secrets, refusals; the whole table with `-m long`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import chaos
import pytest
from chaos import LocalCluster, nodes
from small_run import small_config, write_config
from tiny import save_tiny

from cwpo_dist.config.load import load_config
from cwpo_dist.execution import run as stages
from cwpo_dist.graph import nodes_until
from cwpo_dist.runs.context import Context
from cwpo_dist.scoring.pipeline import commit, part
from cwpo_dist.scoring.retries import attempt
from cwpo_dist.stages import annotate
from cwpo_dist.storage import Store

SECRETS = {
    "HF_TOKEN": "hf_secret-of-this-test",
    "WANDB_API_KEY": "wandb-secret-of-this-test",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-secret-of-this-test",
    "AWS_SECRET_ACCESS_KEY": "aws-secret-of-this-test",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A head and two nodes."""
    made = LocalCluster(2, cpus=1)
    yield made
    made.down()


def annotation(folder: Path, run: Path) -> Path:
    """Every pair scored by a ready reward model that takes its time; the configuration file."""
    whole = small_config(folder, str(run))
    save_tiny(folder / "reward", "bert", hidden_size=256, intermediate_size=1024)
    model = {"model_name_or_path": str(folder / "reward"), "max_length": 400}
    pool = {"model": model, "num_actors": 2, "cpus_per_actor": 0.5}
    config = {name: whole[name] for name in ("output_dir", "prepare", "simulated_labels")}
    config["prepare"] |= {"rows_per_shard": 2, "num_cpus": 0.25}
    return write_config(folder / "run.yaml", config | {"annotate": pool})


@pytest.mark.long
@pytest.mark.usefixtures("in_process")
def test_a_node_dies_under_a_job_and_secrets_stay_secret(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    config = annotation(tmp_path, run)
    loaded = load_config(config)
    context = Context(Store(loaded.output_dir))
    monkeypatch.setattr(stages, "device", lambda: "this one")  # else it asks Ray, and none is here
    stages.execute(context, nodes_until(loaded, "cw", "prepare")["prepare"])
    job = cluster.submit("annotate", config, log, **SECRETS)
    node, _ = chaos.in_flight(cluster, run, "annotate", job, log)
    nodes.kill(cluster.now, node, raylet_only=False)
    assert not list(run.glob("annotate/*/manifest.json")), "nothing was in flight"
    assert job.wait(chaos.PATIENCE_S) == 0, log.read_text()[-4000:]

    made = annotate.shard_job(context, nodes_until(loaded, "cw", "annotate")["annotate"])
    plain = replace(made, output=Store(str(tmp_path / "plain")))
    worker = plain.make_worker()
    for index in plain.indices:
        assert commit(plain, index, attempt(worker, index, part("pairs", index)))
    assert chaos.files(Path(made.output.path("scores"))) == chaos.files(tmp_path / "plain/scores")

    written = [path for place in (run, cluster.state) for path in place.rglob("*")]
    texts = [path.read_bytes() for path in (*written, log) if path.is_file() and is_text(path)]
    assert any(b"Creating runtime env" in text for text in texts), "Ray's logs were not searched"
    for name, secret in (*SECRETS.items(), ("token", (cluster.state / "token").read_text())):
        assert not any(secret.encode() in text for text in texts), name


def is_text(path: Path) -> bool:
    """A log, a manifest, a report; not the file in which the secret travels, nor the token's."""
    return path.suffix in {".log", ".out", ".err", ".json", ".jsonl", ".html", ".txt", ""} and (
        path.name not in {".cwpo-environment.json", "token"}
    )


@pytest.mark.long
def test_nodes_that_cannot_work_together_are_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    """Another version, a folder that each has to itself, a closed way: all told in one answer."""
    other = tmp_path / "other" / "peft-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    cluster.mend()
    nodes.kill(cluster.now, "node2", raylet_only=False)
    nodes.start(cluster.now, "node2", str(other.parent))
    address = cluster.now.node("node2").address
    route = ["ip", "-n", f"{cluster.state.name}-node1", "route"]
    if cluster.now.namespaces:
        subprocess.run([*route, "add", "prohibit", address], check=True)
    log = tmp_path / "log"
    config = annotation(tmp_path, cluster.state / "disk" / "run")
    try:
        assert cluster.submit("plan", config, log).wait(chaos.PATIENCE_S) != 0
    finally:
        if cluster.now.namespaces:
            subprocess.run([*route, "del", "prohibit", address], check=True)
        nodes.kill(cluster.now, "node2", raylet_only=False)
        nodes.start(cluster.now, "node2", python_path="")
    said = " ".join(log.read_text().split())
    assert "has peft 0.0.1 (here " in said
    if cluster.now.namespaces:
        assert "it does not see the driver's file there" in said
        assert f"cannot connect to node {address}" in said


@pytest.fixture
def bucket(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A folder on an S3 server that all nodes can reach, and only over the network."""
    from moto.server import ThreadedMotoServer

    head = cluster.now.head.address
    here = f"{head.rpartition('.')[0]}.1"
    server = ThreadedMotoServer(ip_address=here, port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS["AWS_SECRET_ACCESS_KEY"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("/cluster")
    yield Store("s3://cluster/run")
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_whole_run_on_object_storage_is_killed_and_resumed(
    cluster: LocalCluster, bucket: Store, tmp_path: Path
) -> None:
    """From `prepare` to the report; nothing but the object store is shared by what runs."""
    log, steps = tmp_path / "log", 16
    cluster.mend()
    made = small_config(
        tmp_path,
        bucket.uri,
        sft=None,
        align__max_steps=steps,
        align__num_workers=2,
        prepare__rows_per_shard=1,
        **{f"{stage}__num_actors": 1 for stage in ("annotate", "reference", "evaluate")},
    )
    config = write_config(tmp_path / "run.yaml", made)
    job = cluster.submit("run", config, log)

    def await_first(stage: str, ending: str) -> None:
        while not any(name.endswith(ending) for name in bucket.names(stage)):
            assert job.poll() is None, log.read_text()[-4000:]
            time.sleep(0.05)

    def struck(stage: str, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        in_flight = not any(name.endswith("manifest.json") for name in bucket.names(stage))
        assert in_flight, "nothing was in flight"

    await_first("annotate", ".parquet")
    struck("annotate", next(iter(cluster.at_work(chaos.TITLES["annotate"]).values())))
    await_first("align", "commit.json")
    struck("align", cluster.driver)
    assert job.wait(chaos.PATIENCE_S) == 1
    cluster.finish("run", config, log)
    assert "resuming" in log.read_text()
    assert {"report.html", "metrics.json", "arms/cw/report.html"} < set(bucket.names())
    (metrics,) = [name for name in bucket.names("align") if name.endswith("/metrics.jsonl")]
    lines = bucket.read(metrics).splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    secret = SECRETS["AWS_SECRET_ACCESS_KEY"].encode()
    assert not [name for name in bucket.names() if secret in bucket.read(name)]


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_the_whole_table(tmp_path: Path) -> None:
    """Every fault in every stage; see cluster/README.md for what they took."""
    chaos.main(tmp_path, chaos.ALL)
    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert len(cells) == len(chaos.ALL)
    bad = ("failed", "too late")
    assert [cell for cell in cells if cell["outcome"] in bad or cell["lost"] or cell["twice"]] == []
