"""The sbatch script, run whole: stand-ins for Slurm's commands, real Ray nodes, a real `align`.

The stand-ins: `srun` runs its command here under the loopback address of the node it names,
`hostname` says that address, `scontrol` lists the nodes and notes what is put back into the queue.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from ray_head import free_ports
from small_run import small_config

SCRIPT = ROOT / "cluster" / "slurm" / "cwpo.sbatch"
STAND_INS = {
    "srun": r"""
for given; do
  case $given in
    --nodelist=node*) export STAND_IN_ADDRESS=127.0.0.${given#--nodelist=node} ;;
    --nodes=1 | --ntasks=1 | --overlap | --kill-on-bad-exit=1) ;;
    --*) echo "stand-in for srun: $given?" >&2 && exit 64 ;;
    *) break ;;
  esac
  shift
done
exec "$@"
""",
    "hostname": '[[ $1 == --ip-address ]] && echo "$STAND_IN_ADDRESS"\n',
    "scontrol": r"""
case "$1 $2" in
  "show hostnames") tr , '\n' <<< "$3" ;;
  "requeue "*) echo "$2" >> "$STAND_IN_REQUEUED" ;;
  *) exit 64 ;;
esac
""",
    "cwpo": f'exec {sys.executable} -m cwpo_dist.cli "$@"\n',
    "python": f'exec {sys.executable} "$@"\n',
    "ray": f'exec {Path(sys.executable).with_name("ray")} "$@"\n',
}


@dataclass
class Slurm:
    """A folder of stand-ins, and the environment that Slurm gives a job's script."""

    folder: Path
    environment: dict[str, str]
    jobs: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, stage: str, config: dict[str, Any]) -> subprocess.Popen[bytes]:
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(config))
        with (self.folder / "job.log").open("ab") as log:
            job = subprocess.Popen(
                ["bash", str(SCRIPT), str(path)],
                env=self.environment | {"CWPO_STAGE": stage, "CWPO_PORT": str(free_ports(1)[0])},
                stdout=log,
                stderr=log,
                start_new_session=True,  # all that it starts is one group
            )
        self.jobs.append(job)
        return job

    def end(self, job: subprocess.Popen[bytes], seconds: float) -> tuple[int, str]:
        """The exit code and the log, when the job has ended and has left nothing behind."""
        code = job.wait(timeout=seconds)
        deadline = time.monotonic() + 10  # Ray's processes end a moment after `ray start`
        while _group(job.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        left = _group(job.pid)
        assert not left, left
        assert not list(self.folder.glob(".ray-token-*"))
        return code, (self.folder / "job.log").read_text()


def _group(leader: int) -> list[str]:
    listed = subprocess.run(
        ["ps", "-o", "args=", "-g", str(leader)], capture_output=True, text=True
    )
    return [line for line in listed.stdout.splitlines() if "<defunct>" not in line]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}")
        (commands / name).chmod(0o755)
    job = f"{os.getpid()}{time.monotonic_ns() % 1000}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "node1,node2",
        "SLURM_CPUS_PER_TASK": "2",
        "CWPO_IMAGE": "",
        "CWPO_STORAGE": str(tmp_path),
        "CWPO_WAIT_S": "120",
        "STAND_IN_REQUEUED": str(tmp_path / "requeued"),
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(200 * 2**20),
    }
    given = Slurm(tmp_path, environment)
    yield given
    for started in given.jobs:
        if _group(started.pid):  # a test that failed
            os.killpg(started.pid, signal.SIGKILL)
    shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """Human labels alone: `align` and what it needs, one training stage."""
    given = small_config(folder, arms=["human"], sft=None, weak=None, **changes)
    given["align"] |= {"num_workers": 2, "max_steps": 60, "save_steps": 20}
    given["evaluate"] |= {"num_prompts": 0}
    return given


@pytest.mark.long
def test_a_small_align_finishes_on_two_nodes(slurm: Slurm, tmp_path: Path) -> None:
    given = config(tmp_path, align__loss_type="simpo")  # without the stage `reference`
    given["align"] |= {"max_steps": 3, "cpus_per_worker": 2.0}  # a worker fills a node
    code, text = slurm.end(slurm.start("align", given), 250)
    assert code == 0, text[-3000:]
    assert list((tmp_path / "run" / "align").glob("*/model/model.safetensors"))
    assert not (tmp_path / "requeued").exists()


@pytest.mark.long
def test_align_is_put_back_before_its_time_ends_and_finishes_the_next_time(
    slurm: Slurm, tmp_path: Path
) -> None:
    given = config(tmp_path)
    job = slurm.start("align", given)
    align = tmp_path / "run" / "align"
    while job.poll() is None and not list(align.glob("*/checkpoints/*")):
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    code, text = slurm.end(job, 100)
    assert code != 0, "it was done before the signal: give it more steps"
    assert "told to stop: checkpoint at step" in text, text[-3000:]
    assert (tmp_path / "requeued").read_text().split() == [slurm.environment["SLURM_JOB_ID"]]

    code, text = slurm.end(slurm.start("align", given), 200)
    assert code == 0, text[-3000:]
    assert list(align.glob("*/model/model.safetensors"))
    assert (tmp_path / "requeued").read_text().count("\n") == 1
