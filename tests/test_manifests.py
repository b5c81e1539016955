"""What brings a cluster up, checked by machine: schemas, linters, one set of settings for all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import ROOT
from ray.autoscaler._private.util import prepare_config, validate_config

from cwpo_dist.config import AnnotateConfig

CLUSTER = ROOT / "cluster"
SETTINGS: dict[str, Any] = yaml.safe_load((CLUSTER / "settings.yaml").read_text())
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
VM = sorted((CLUSTER / "vm").glob("*.yaml"))
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
SBATCH = (CLUSTER / "slurm" / "cwpo.sbatch").read_text()
BIN = Path(sys.executable).parent


def kuberay(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load(path.read_text())
    return manifest


def ray_cluster(path: Path) -> dict[str, Any]:
    spec: dict[str, Any] = kuberay(path)["spec"]
    return spec.get("rayClusterSpec", spec)


def schema(kind: str) -> dict[str, Any]:
    folder = Path(os.environ.get("CWPO_DATA", "")) / "kuberay"
    file = folder / f"{kind.lower()}-v1.schema.json"
    if not os.environ.get("CWPO_DATA") or not file.is_file():
        # KubeRay's own schema is not ours to copy into the project.
        pytest.skip(f"CWPO_DATA names no folder with kuberay/{file.name}")
    found: dict[str, Any] = json.loads(file.read_text())
    return closed(found)


def closed(part: Any) -> Any:
    """The schema as the API server with strict validation takes it: fields it lists, no others."""
    if isinstance(part, list):
        return [closed(each) for each in part]
    if not isinstance(part, dict):
        return part
    made = {key: closed(value) for key, value in part.items()}
    if part.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    if "properties" in part and "additionalProperties" not in part:
        made["additionalProperties"] = bool(part.get("x-kubernetes-preserve-unknown-fields"))
    return made


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_kuberay_takes_it(path: Path) -> None:
    manifest = kuberay(path)
    assert manifest["apiVersion"] == "ray.io/v1"
    jsonschema.Draft202012Validator(schema(manifest["kind"])).validate(manifest)


def test_kuberay_would_refuse_a_field_it_does_not_know() -> None:
    manifest = kuberay(CLUSTER / "kuberay" / "align.yaml")
    groups = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    groups[0]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    with pytest.raises(jsonschema.ValidationError, match="imagePulPolicy"):
        jsonschema.Draft202012Validator(schema("RayJob")).validate(manifest)


def pods(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Each group of a cluster, with its pod and its only container."""
    spec = ray_cluster(path)
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        yield group, pod, container


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_kuberay_agrees_with_the_settings(path: Path) -> None:
    assert ray_cluster(path)["rayVersion"] == SETTINGS["versions"]["ray"]
    # KubeRay sets RAY_AUTH_MODE and the token itself.
    assert ray_cluster(path)["authOptions"] == {"mode": SETTINGS["env"]["RAY_AUTH_MODE"]}
    wanted = {k: v for k, v in SETTINGS["env"].items() if k != "RAY_AUTH_MODE"}
    for group, pod, container in pods(path):
        assert container["image"] == SETTINGS["image"]
        assert {each["name"]: each["value"] for each in container["env"]} == wanted
        mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
        assert mounts["storage"] == SETTINGS["storage"]
        assert mounts["shm"] == "/dev/shm"
        assert container["resources"]["requests"] == container["resources"]["limits"]
        is_spot = group.get("groupName") == "spot"
        assert group.get("labels") == (SETTINGS["spot_labels"] if is_spot else None)
    head = ray_cluster(path)["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", ["annotate", "align"])
def test_kueue_can_queue_the_jobs(name: str) -> None:
    job = kuberay(CLUSTER / "kuberay" / f"{name}.yaml")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert "suspend" not in job["spec"]  # Kueue's to set
    assert not job["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling")
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["replicas"] == group["maxReplicas"]


def test_the_pools_of_the_annotation_job_fit_its_groups() -> None:
    text = (CLUSTER / "kuberay" / "annotate.yaml").read_text()
    comment = re.findall(r"^#   (annotate:|  .*)$", text, re.MULTILINE)
    pools = AnnotateConfig.model_validate(yaml.safe_load("\n".join(comment))["annotate"]).pools
    groups = ray_cluster(CLUSTER / "kuberay" / "annotate.yaml")["workerGroupSpecs"]
    assert [pool.max_actors for pool in pools] == [group["maxReplicas"] for group in groups]
    stays, spot = pools
    assert stays.labels == {name: f"!{value}" for name, value in SETTINGS["spot_labels"].items()}
    assert spot.labels == SETTINGS["spot_labels"]
    assert spot.min_actors == groups[1]["minReplicas"] == 0


@pytest.mark.parametrize("path", VM, ids=lambda path: path.stem)
def test_rays_launcher_takes_it(path: Path) -> None:
    config = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    options = config["docker"]["run_options"]
    wanted = {f"--env {name}={value}" for name, value in SETTINGS["env"].items()}
    assert {option for option in options if option.startswith("--env")} == wanted
    assert config["docker"]["image"] == SETTINGS["image"]
    assert f"--volume {SETTINGS['storage']}:{SETTINGS['storage']}" in options
    assert config["available_node_types"]["spot"]["labels"] == SETTINGS["spot_labels"]
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert str(SETTINGS["gcs_port"]) in commands[-1]


def test_rays_launcher_would_refuse_a_field_it_does_not_know() -> None:
    config = yaml.safe_load(VM[0].read_text())
    config["available_node_types"]["spot"]["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(config))


def test_the_dockerfile_is_linted() -> None:
    found = subprocess.run(
        [BIN / "hadolint", CLUSTER / "Dockerfile"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


def test_the_image_agrees_with_the_settings() -> None:
    env = DOCKERFILE[DOCKERFILE.rindex("ENV ") :].replace("\\\n", " ").splitlines()[0]
    assert dict(re.findall(r"(\w+)=(\S+)", env)) == SETTINGS["env"]
    assert SETTINGS["storage"] in DOCKERFILE
    assert SETTINGS["image"] in DOCKERFILE
    base = re.search(
        r"^FROM nvidia/cuda:([\d.]+)-cudnn-devel-ubuntu24\.04$", DOCKERFILE, re.MULTILINE
    )
    assert base is not None
    assert base[1].startswith(f"{SETTINGS['cuda']}.")
    major = SETTINGS["cuda"].split(".")[0]
    assert f'torch.version.cuda.split(".")[0] == "{major}"' in DOCKERFILE, (
        "the build checks torch's"
    )
    for name in ("torch", "deepspeed"):
        assert f"{name}=={SETTINGS['versions'][name]}" in DOCKERFILE


def test_the_settings_name_the_versions_we_test() -> None:
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    for name, version in SETTINGS["versions"].items():
        assert f"{name}=={version}" in pinned
        assert metadata.version(name).split("+")[0] == version


def test_deepspeed_knows_the_ops_that_the_image_compiles() -> None:
    wanted = re.findall(r"\bDS_BUILD_\w+(?==1)", DOCKERFILE)
    found = find_spec("deepspeed")  # found, not imported: that takes seconds
    assert found is not None
    assert found.origin is not None
    builders = (Path(found.origin).parent / "ops" / "op_builder").rglob("*.py")
    source = "".join(path.read_text() for path in builders)
    assert wanted
    for name in wanted:
        assert f'BUILD_VAR = "{name}"' in source, name


def test_the_sbatch_script_is_linted() -> None:
    path = CLUSTER / "slurm" / "cwpo.sbatch"
    for command in (["bash", "-n", path], [BIN / "shellcheck", path]):
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr


def test_the_sbatch_script_agrees_with_the_settings() -> None:
    set_there = dict(re.findall(r"^export (\w+)=(\S+)", SBATCH, re.MULTILINE))
    for name, value in SETTINGS["env"].items():
        assert set_there[name] == value.replace(SETTINGS["storage"], "$storage")
    assert f"${{CWPO_STORAGE:-{SETTINGS['storage']}}}" in SBATCH
    assert f"${{CWPO_IMAGE-docker://{SETTINGS['image']}}}" in SBATCH
    assert f"${{CWPO_PORT:-{SETTINGS['gcs_port']}}}" in SBATCH
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", SBATCH, re.MULTILINE))
    assert options["signal"].startswith("B:USR1@")  # to the script, which hands it on
    assert "requeue" in options


def test_the_locked_packages_are_those_of_the_constraints_each_with_its_hashes() -> None:
    pinned = set((ROOT / "constraints.txt").read_text().splitlines())
    locked = set()
    for name in ("packages", "torch", "torch-cpu", "cuda", "build", "model", "tools"):
        text = (ROOT / "release" / f"{name}.txt").read_text()
        assert "://" not in text, "where it is fetched from is the machine's to say"
        entries = re.findall(r"^(\w\S*==.*?) \\\n((?:    --hash=sha256:\w{64}.*\n)+)", text, re.M)
        assert len(entries) == len(re.findall(r"^\w", text, re.M)), name
        locked |= {entry for entry, _ in entries} if name in ("packages", "torch") else set()
    assert locked == pinned
