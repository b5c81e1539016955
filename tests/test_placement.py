"""Where workers, actors and tasks fit: the plan, the checks before a run and the run agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from small_run import small_config

from cwpo_dist.config import Config, ConfigError
from cwpo_dist.config.load import parse_config
from cwpo_dist.graph import graph
from cwpo_dist.placement import Machine, alive_machines, this_machine, total, training_faults
from cwpo_dist.planning.plan import plan
from cwpo_dist.runs import checks
from cwpo_dist.runs.checks import check
from cwpo_dist.runs.cluster_share import fit_two, need, share
from cwpo_dist.training import group

LICENCE = {"resources_per_worker": {"licence": 1.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("placement")


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What each node of a cluster has; there is no Ray."""
    found: list[dict[str, float]] = []

    def told() -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": node} for node in found]

    monkeypatch.setattr(ray, "nodes", told)
    monkeypatch.setattr(ray, "cluster_resources", lambda: total(alive_machines()))
    monkeypatch.setattr(checks, "available", alive_machines)
    monkeypatch.setattr(checks, "models", lambda *_: ())  # to look at them takes seconds
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    return found


def fit_of(folder: Path, fields: dict[str, Any]) -> Config:
    """A run whose `fit` has these settings."""
    changes = {f"fit__{name}": value for name, value in fields.items()}
    return parse_config(small_config(folder, **changes))


def refusal(act: Callable[..., object], *given: object) -> str:
    with pytest.raises(ConfigError) as error:
        act(*given)
    return str(error.value)


REFUSED: dict[str, tuple[list[dict[str, float]], dict[str, Any], str]] = {
    "a resource that no node has": (
        [{"CPU": 8}, {"CPU": 8}],
        LICENCE,
        "fit.resources_per_worker.licence: 1, but the largest node of a cluster of 2 nodes (16 "
        "CPUs, 0 GPUs) has 0: such a worker can never be placed; lower it, or add a node that has "
        "it",
    ),
    "one that only one node has": (
        [{"CPU": 8, "licence": 1}, {"CPU": 8}],
        LICENCE | {"num_workers": 2},
        "fit.num_workers: at least 2, each of 0.5 CPU, 1 licence, but a cluster of 2 nodes (16 "
        "CPUs, 0 GPUs) has room for 1; lower one of these, or add nodes",
    ),
    "nodes that each lack something": (
        [{"CPU": 0.5, "licence": 1}, {"CPU": 8}],
        LICENCE | {"cpus_per_worker": 1.0},
        "fit.cpus_per_worker: 1, but no single node of a cluster of 2 nodes (8.5 CPUs, 0 GPUs) has "
        "all of cpus_per_worker, resources_per_worker.licence; lower them, or add a node",
    ),
    "many CPUs on small nodes": (
        [{"CPU": 2}] * 4,
        {"cpus_per_worker": 3.0},
        "fit.cpus_per_worker: 3, but the largest node of a cluster of 4 nodes (8 CPUs, 0 GPUs) has "
        "2: such a worker can never be placed; lower it, or add a node that has it",
    ),
    "CPUs by Ray's name": (
        [{"CPU": 2}],
        {"resources_per_worker": {"CPU": 3.0}},
        "fit.resources_per_worker.CPU: 3, but the largest node of a cluster of one node (2 CPUs, 0 "
        "GPUs) has 2: such a worker can never be placed; lower it, or add a node that has it",
    ),
    "a share of CPUs": (
        [{"CPU": 2}],
        {"cpus_per_worker": 0.4, "num_workers": 6},
        "fit.num_workers: at least 6, each of 0.4 CPU, but a cluster of one node (2 CPUs, 0 GPUs) "
        "has room for 5; lower one of these, or add nodes",
    ),
    "GPUs, where there are some": (
        [{"CPU": 8, "GPU": 1}],
        {"num_workers": 2},
        "fit.num_workers: at least 2, each of 0.5 CPU, 1 GPU, but a cluster of one node (8 CPUs, 1 "
        "GPUs) has room for 1; lower one of these, or add nodes",
    ),
    "GPUs, where there are none": (
        [{"CPU": 8}],
        {"use_gpu": True},
        "fit.use_gpu: true, but the largest node of a cluster of one node (8 CPUs, 0 GPUs) has 0: "
        "such a worker can never be placed; lower it, or add a node that has it",
    ),
    "GPUs of workers that use none": (
        [{"CPU": 8, "GPU": 1}],
        {"use_gpu": False, "resources_per_worker": {"GPU": 1.0}},
        "fit.resources_per_worker.GPU: 1, but with use_gpu: false workers on a cluster of one node "
        "(8 CPUs, 1 GPUs) compute on the CPU; change one of the two",
    ),
    "nothing": (
        [{"CPU": 8}],
        {"resources_per_worker": {"CPU": 0.0}},
        "fit.resources_per_worker.CPU: 0, so that a worker takes nothing; give 0.01",
    ),
}


@pytest.mark.parametrize(("there", "fields", "said"), REFUSED.values(), ids=REFUSED)
def test_what_can_never_be_placed_is_refused_alike(
    there: list[dict[str, float]],
    fields: dict[str, Any],
    said: str,
    nodes: list[dict[str, float]],
    folder: Path,
) -> None:
    nodes.extend(there)
    config = fit_of(folder, fields)
    assert refusal(plan, config) == refusal(check, config) == said
    assert refusal(group.check_placement, "fit", config.fit) == said


@pytest.mark.parametrize(
    ("there", "fields"),
    [
        ([{"CPU": 8, "licence": 2}, {"CPU": 8}], LICENCE | {"num_workers": 2}),
        ([{"CPU": 8, "licence": 1}, {"CPU": 8}], LICENCE | {"num_workers": (1, 2)}),
        ([{"CPU": 4}, {"CPU": 4}], {"cpus_per_worker": 3.0, "num_workers": 2}),
        ([{"CPU": 2}], {"cpus_per_worker": 0.4, "num_workers": 5}),
        ([{"CPU": 8, "GPU": 1}], {"use_gpu": False, "num_workers": 2}),
    ],
)
def test_what_fits_is_not_refused(
    there: list[dict[str, float]],
    fields: dict[str, Any],
    nodes: list[dict[str, float]],
    folder: Path,
) -> None:
    nodes.extend(there)
    config = fit_of(folder, fields)
    check(config)
    group.check_placement("fit", config.fit)


def test_where_nodes_come_on_demand_room_may_come(
    nodes: list[dict[str, float]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.append({"CPU": 1})
    config = fit_of(folder, LICENCE | {"num_workers": 2, "use_gpu": True})
    assert refusal(check, config) == refusal(group.check_placement, "fit", config.fit)
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --no-monitor")
    check(config)
    group.check_placement("fit", config.fit)


def test_before_ray_runs_this_machine_has_what_ray_would_find(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of one's own, unless the environment gives it to the Ray that is started here."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = fit_of(folder, {"resources_per_worker": {"licence": 2.0}})
    found = this_machine()
    assert found.here
    assert found.cpus >= 1
    (fault,) = training_faults("fit", config.fit, [found])
    assert "licence: 2, but the largest node of this machine (" in fault
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 3, "licence": 2}')
    assert this_machine().cpus == 3.0
    assert list(training_faults("fit", config.fit, [this_machine()])) == []


def test_trainings_that_take_the_same_resource_wait_for_each_other(folder: Path) -> None:
    """Side by side, one of them would hold its place in the plan and do nothing."""
    fields = {"sft__resources_per_worker": {"licence": 1.0}}
    fields |= {"fit__resources_per_worker": {"licence": 1.0}}
    nodes = graph(parse_config(small_config(folder, **fields)), "cw")
    two = [nodes["fit"], nodes["sft"]]
    one_licence = total([Machine(8.0, 0.0, {"licence": 1.0})])
    assert not fit_two(two, one_licence)
    assert share(need(nodes["fit"], one_licence), one_licence) == 1.0
    assert fit_two(two, total([Machine(8.0, 0.0, {"licence": 2.0})]))
    assert fit_two(two, total([Machine(4.0, 0.0, {"licence": 1.0})] * 2))


def test_actors_take_resources_of_their_own_from_others(folder: Path) -> None:
    pool = {"num_actors": 4, "cpus_per_actor": 0.5, "resources": {"licence": 1.0}}
    config = parse_config(small_config(folder, annotate=pool))
    node = graph(config, "cw")["annotate"]
    assert need(node, total([Machine(8.0, 0.0, {"licence": 8.0})])) == {"CPU": 2.0, "licence": 4.0}
    assert need(node, total([Machine(8.0, 0.0, {"licence": 1.0})]))["licence"] == 1.0
